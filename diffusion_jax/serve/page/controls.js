// Forms, made from the schema of a request: what a field is called, what it may be, and how it is entered.

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
};

export { element };

const MOST_SEED = 2 ** 32 - 1;
const dice = () => Math.floor(Math.random() * (MOST_SEED + 1));

/** What a property of the schema may be: its own bounds, or those of the one that is not null. */
const plain = (property) => property.anyOf ? { ...property, ...property.anyOf.find((kind) => kind.type !== "null") } : property;

/** Whether a property can only be one number. */
const fixed = ({ minimum, maximum }) => minimum !== undefined && minimum === maximum;

/** A form for some fields of the schema. */
export class Form {
  /**
   * form: the element to fill.
   * properties: of the schema.
   * names: the fields to show; those of `more` are folded away.
   * texts: other titles and defaults, {name: {title, default}}.
   * action: the word on the button.
   */
  constructor(form, properties, { names, more = [], texts = {}, action }) {
    Object.assign(this, { form, inputs: {}, properties });
    const field = (name) => this.field(name, { ...plain(properties[name]), ...texts[name] });
    form.append(...names.map(field));
    const rest = more.map(field).filter((made) => !made.hidden);
    if (rest.length) form.append(element("details", {}, element("summary", { textContent: "More" }), element("div", {}, ...rest)));
    this.go = element("button", { type: "submit", className: "go", textContent: action });
    this.cancel = element("button", { type: "button", className: "cancel", textContent: "Cancel", hidden: true });
    this.bar = element("progress", { max: 1, value: 0, hidden: true, ariaLabel: "Progress" });
    if (action) form.append(element("div", { className: "actions" }, this.go, this.cancel), this.bar);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.tagName === "TEXTAREA" && !event.shiftKey) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
  }

  field(name, property) {
    const { title, description, type, default: own, minimum, maximum, multipleOf } = property;
    const choices = property.enum ?? (property.const && [property.const]);
    const id = `${this.form.parentElement.id}-${name}`;
    const label = element("label", { htmlFor: id, textContent: title ?? name, title: description ?? "" });
    let input, beside = [], hidden = false;
    if (choices) {
      input = element("select", { id }, ...choices.map((value) => new Option(value || "automatic", value)));
      input.value = own;
      hidden = choices.length === 1;
    } else if (type === "string") {
      input = element("textarea", { id, rows: name === "prompt" ? 3 : 2, value: own });
      hidden = name === "negative_prompt" && fixed(this.properties.guidance); // which needs guidance
    } else {
      const step = multipleOf ?? (type === "integer" ? 1 : 0.05);
      const bounds = { min: minimum ?? 0, max: maximum ?? MOST_SEED, step };
      const most = property["x-slider"] ?? maximum;
      input = element("input", { id, type: "number", ...bounds, value: own ?? "" });
      hidden = fixed({ minimum, maximum });
      if (name.endsWith("seed")) {
        input.value = dice();
        input.fresh = true;
        input.addEventListener("input", () => (input.fresh = true));
        const lock = element("button", { type: "button", textContent: "Lock", title: "Keep this seed", ariaPressed: "false" });
        lock.onclick = () => (lock.ariaPressed = String(lock.ariaPressed !== "true"));
        const roll = element("button", { type: "button", textContent: "Dice", title: "A new seed" });
        roll.onclick = () => { input.value = dice(); input.dispatchEvent(new Event("input", { bubbles: true })); };
        beside = [lock, roll];
        input.locked = () => lock.ariaPressed === "true";
        input.lock = () => (lock.ariaPressed = "true");
      } else if (most <= 200) {
        const slider = element("input", { type: "range", ...bounds, max: most, value: own, ariaLabel: title, tabIndex: -1 });
        slider.oninput = () => (input.value = slider.value);
        input.addEventListener("input", () => (slider.value = input.value));
        input.slide = () => (slider.value = input.value);
        beside = [slider];
      }
    }
    this.inputs[name] = input;
    const entry = beside.length ? element("span", {}, ...(input.slide ? [...beside, input] : [input, ...beside])) : input;
    return element("div", { className: `field ${name}`, hidden }, label, entry);
  }

  /** What is entered, as a request. */
  values() {
    return Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [
      name, input.type === "number" ? Number(input.value) : input.value,
    ]));
  }

  /** Enter values, such as a picture's settings; what is no field here is left out. */
  enter(settings) {
    for (const [name, value] of Object.entries(settings)) {
      const input = this.inputs[name];
      if (!input || (input.tagName === "SELECT" && ![...input.options].some((option) => option.value === value))) continue;
      input.value = value;
      input.slide?.();
      input.lock?.();
    }
  }

  /** Before a request: new seeds, unless they are locked or were not used yet. */
  roll() {
    for (const input of Object.values(this.inputs)) {
      if (input.locked && !input.locked() && !input.fresh) input.value = dice();
      input.fresh = false;
    }
  }

  /** Show how much is done, in [0, 1]; null for nothing running. */
  progress(part) {
    this.go.disabled = part !== null;
    this.cancel.hidden = this.bar.hidden = part === null;
    this.bar.value = part ?? 0;
  }
}
