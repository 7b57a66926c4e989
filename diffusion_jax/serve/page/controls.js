// Forms, made from the schema of a request: what a field is called, what it may be, and how it is entered.

import { element } from "/page/dom.js";
import { suggestions } from "/page/words.js";

const MOST_SEED = 2 ** 32 - 1;
const dice = () => Math.floor(Math.random() * (MOST_SEED + 1));

/** What a property of the schema may be: its own bounds, or those of the one that is not null. */
const plain = (property) => property.anyOf ? { ...property, ...property.anyOf.find((kind) => kind.type !== "null") } : property;

/** Whether a property can only be one number. */
const fixed = ({ minimum, maximum }) => minimum !== undefined && minimum === maximum;

/** A form for some fields of the schema: prompts, button and message first, then the others, and those folded away. */
export class Form {
  /**
   * form: the element to fill.
   * properties: of the schema.
   * names: the fields to show; those of `more` are folded away.
   * texts: other titles, help and defaults, {name: {title, description, default}}.
   * action: the word on the button.
   * model: its vocabulary, and its names of solvers and spacings.
   */
  constructor(form, properties, { names, more = [], texts = {}, action }, model) {
    Object.assign(this, { form, inputs: {}, properties, model });
    const field = (name) => this.field(name, { ...plain(properties[name]), ...texts[name] });
    const first = names.filter((name) => /^(other_)?prompt$/.test(name));
    form.append(...first.map(field));
    this.go = element("button", { type: "submit", className: "go", textContent: action });
    this.cancel = element("button", { type: "button", className: "cancel", textContent: "Cancel", hidden: true });
    this.bar = element("progress", { max: 1, value: 0, hidden: true, ariaLabel: "Progress" });
    this.message = element("p", { className: "message", role: "status" });
    if (action) form.append(element("div", { className: "actions" }, this.go, this.cancel), this.bar);
    form.append(this.message, ...names.filter((name) => !first.includes(name)).map(field));
    const rest = more.map(field).filter((made) => !made.hidden);
    this.more = element("details", { hidden: !rest.length }, element("summary", { textContent: "More settings" }), element("div", {}, ...rest));
    form.append(this.more);
    this.listen();
  }

  listen() {
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.tagName === "TEXTAREA" && !event.shiftKey) {
        event.preventDefault();
        this.form.requestSubmit();
      }
    });
    this.form.addEventListener("invalid", ({ target }) => this.wrong(target, target.validationMessage), true);
    this.form.addEventListener("input", ({ target }) => target.removeAttribute("aria-invalid"));
  }

  field(name, property) {
    const { title, description, type, default: own, minimum, maximum, multipleOf } = property;
    const choices = property.enum ?? (property.const && [property.const]);
    const id = `${this.form.parentElement.id}-${name}`;
    const label = element("label", { htmlFor: id, textContent: title ?? name });
    let input, beside = [], below = [], hidden = false;
    if (choices) {
      const names = this.model[`${name}_names`] ?? {};
      input = element("select", { id }, ...choices.map((value) => new Option(names[value] || value || "Automatic", value)));
      input.value = own;
      hidden = choices.length === 1;
    } else if (type === "string") {
      input = element("textarea", { id, rows: 2, value: own, maxLength: property.maxLength });
      hidden = name === "negative_prompt" && fixed(this.properties.guidance); // which needs guidance
      if (name !== "negative_prompt") below = [suggestions(input, this.model.vocabulary)];
    } else {
      const step = multipleOf ?? (type === "integer" ? 1 : 0.05);
      const bounds = { min: minimum ?? 0, max: maximum ?? MOST_SEED, step };
      const most = property["x-slider"] ?? maximum;
      input = element("input", { id, type: "number", required: true, ...bounds, value: own ?? "" });
      hidden = fixed({ minimum, maximum });
      if (name.endsWith("seed")) beside = this.seed(input);
      else if (most <= 200) {
        const slider = element("input", { type: "range", ...bounds, max: most, value: own, ariaLabel: title, tabIndex: -1 });
        slider.oninput = () => (input.value = slider.value);
        input.addEventListener("input", () => (slider.value = input.value));
        beside = [slider];
      }
    }
    this.inputs[name] = input;
    const entry = beside.length ? element("span", {}, ...(beside.length === 1 ? [...beside, input] : [input, ...beside])) : input;
    const help = element("small", { id: `${id}-help`, textContent: description ?? "", hidden: !description });
    if (description) input.setAttribute("aria-describedby", help.id);
    return element("div", { className: `field ${name}`, hidden }, label, entry, ...below, help);
  }

  /** The buttons of a seed. */
  seed(input) {
    input.value = dice();
    input.fresh = true;
    input.addEventListener("input", () => (input.fresh = true));
    const lock = element("button", { type: "button", textContent: "Lock", title: "Keep this seed", ariaPressed: "false" });
    lock.onclick = () => {
      lock.ariaPressed = String(lock.ariaPressed !== "true");
      input.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const roll = element("button", { type: "button", textContent: "Dice", title: "A new seed" });
    roll.onclick = () => { input.value = dice(); input.dispatchEvent(new Event("input", { bubbles: true })); };
    input.locked = () => lock.ariaPressed === "true";
    input.lock = (locked = true) => (lock.ariaPressed = String(locked));
    return [lock, roll];
  }

  /** Say something beside the button. */
  say(text, isError = false) {
    this.message.textContent = text;
    this.message.classList.toggle("error", isError);
  }

  /** Say what is wrong with a field, and show it. */
  wrong(input, reason) {
    if (this.more.contains(input)) this.more.open = true;
    input.setAttribute("aria-invalid", "true");
    const label = input.closest(".field").querySelector("label").textContent;
    this.say(reason.startsWith(label) ? reason : `${label}: ${reason}`, true);
  }

  /** Say an error of a request. */
  fail({ message, field }) {
    const input = this.inputs[field];
    if (input && !input.closest(".field").hidden) this.wrong(input, message.replace(`${field}: `, ""));
    else this.say(message, true);
    this.message.scrollIntoView({ block: "nearest" });
  }

  /** What is entered, as a request. */
  values() {
    return Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [
      name, input.type === "number" ? Number(input.value) : input.value,
    ]));
  }

  /** Enter values, such as a picture's settings; what is no field here or cannot be changed is left out. */
  enter(settings, lock = true) {
    for (const [name, value] of Object.entries(settings)) {
      const input = this.inputs[name];
      if (!input || input.closest(".field").hidden) continue;
      if (input.tagName === "SELECT" && ![...input.options].some((option) => option.value === value)) continue;
      input.value = value;
      if (lock) input.lock?.();
      input.dispatchEvent(new Event("input", { bubbles: true }));
    }
  }

  /** Everything that the form shows, for `restore`. */
  state() {
    const names = (has) => Object.keys(this.inputs).filter((name) => has(this.inputs[name]));
    return { values: this.values(), locked: names((input) => input.locked?.()), fresh: names((input) => input.fresh), open: this.more.open };
  }

  restore({ values, locked, fresh, open }) {
    this.enter(values, false);
    for (const [name, input] of Object.entries(this.inputs)) {
      input.lock?.(locked.includes(name));
      input.fresh = fresh.includes(name);
    }
    this.more.open = open;
  }

  /** Before a request: new seeds, unless they are locked or were not used yet. */
  roll() {
    for (const input of Object.values(this.inputs)) {
      if (input.locked && !input.locked() && !input.fresh) input.value = dice();
      input.fresh = false;
    }
    this.form.dispatchEvent(new Event("input"));
  }

  /** Show how much is done, in [0, 1]; null for nothing running. */
  progress(part) {
    this.go.disabled = part !== null;
    this.cancel.hidden = this.bar.hidden = part === null;
    this.bar.value = part ?? 0;
  }
}
