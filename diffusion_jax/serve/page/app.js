// The page: tabs, each a form of the request's schema beside what it draws, and the pictures drawn so far.

import { Live, generate, json } from "/page/api.js";
import { Form, element } from "/page/controls.js";
import { Paint } from "/page/paint.js";
import { textsOf } from "/page/png.js";

const KEPT = 60; // pictures in the gallery
const STYLE_WORDS = "line drawing";
const find = (selector, inside = document) => inside.querySelector(selector);
const source = (base64) => `data:image/png;base64,${base64}`;
const [description, model] = await Promise.all([json("/openapi.json"), json("/api/model")]);
const { Request, LiveRequest } = description.components.schemas, properties = Request.properties;

const SAMPLING = ["solver", "spacing", "steps", "guidance"];
const START = model.prompt;
const TABS = {
  text: { names: ["prompt", "negative_prompt", "steps", "guidance", "seed", "num_images"], more: ["solver", "spacing", "width", "height"], texts: { prompt: { default: START } }, action: "Draw" },
  live: { names: ["prompt", "strength", "steps", "guidance", "seed"], more: ["negative_prompt", "solver", "spacing"], texts: { prompt: { default: START }, strength: { default: 0.85 }, steps: { default: model.live_steps } } },
  edit: { names: ["prompt", "steps", "guidance", "seed"], more: ["negative_prompt", "strength", "solver", "spacing"], texts: { prompt: { default: START }, strength: { default: 1 } }, action: "Draw the marked part" },
  style: { names: ["other_prompt", "prompt", "strength", "steps", "guidance", "seed"], more: ["negative_prompt"], texts: { other_prompt: { title: "What the picture shows" }, prompt: { title: "With the style's words", default: STYLE_WORDS }, strength: { default: 0.8 } }, action: "Restyle" },
  morph: { names: ["prompt", "other_prompt", "num_images", "seed", "other_seed"], more: ["negative_prompt", ...SAMPLING, "width", "height"], texts: { prompt: { title: "From", default: START }, other_prompt: { title: "To", default: model.other_prompt }, seed: { title: "First seed" }, num_images: { title: "Frames", default: Math.min(12, properties.num_images.maximum), minimum: 2 } }, action: "Morph" },
  how: { names: ["prompt", "seed"], texts: { prompt: { default: START } }, action: "Show how" },
};
// an inpainting model does nothing else, and a consistency model cannot be inverted
const usable = (tab) => (tab === "edit" || !model.needs_image) && (tab !== "style" || properties.task.enum.includes(tab));
const forms = Object.fromEntries(Object.entries(TABS).map(([tab, table]) => [tab, new Form(find(`#${tab} form`), tab === "live" ? LiveRequest.properties : properties, table)]));
const paints = Object.fromEntries(["live", "edit", "style"].map((tab) => [tab, new Paint(find(`#${tab}`), model.size, tab === "edit")]));
const shown = {}; // by tab, the base64 of its last result

find("#model").textContent = `${model.name}, ${model.size[1]} x ${model.size[0]} pixels, weights: ${model.origin}`;

function say(text, isError = false) {
  find("#status").textContent = text;
  find("#status").classList.toggle("error", isError);
}

// -- requests ---------------------------------------------------------------------------------------------------------

/** Run one request of a tab. take: ({number, seed, image, settings}) gets each picture, preview: (number, base64). */
async function run(tab, values, take, preview = () => {}, count = values.num_images ?? 1) {
  const form = forms[tab], stop = new AbortController();
  let done = 0;
  form.cancel.onclick = () => stop.abort();
  form.progress(0);
  say("");
  try {
    for await (const [event, data] of generate(values, stop.signal)) {
      if (event === "queued" && data.position) say(`${data.position} before you`);
      if (event === "progress") {
        say(`step ${data.done} of ${data.total}`);
        form.progress((done + data.done / data.total) / count);
        for (const [number, image] of Object.entries(data.previews)) preview(Number(number), image, data);
      }
      if (event === "picture") {
        done += 1;
        take(data);
      }
      if (event === "animation") form.animation?.(data.image);
    }
    say("done");
    return true;
  } catch (error) {
    const cancelled = error.name === "AbortError";
    say(cancelled ? "cancelled" : error.message, !cancelled);
    return false;
  } finally {
    form.progress(null);
  }
}

function card(image, caption, open) {
  const picture = element("img", { src: source(image), alt: "" });
  const button = element("button", { type: "button" }, picture, element("span", { textContent: caption }));
  button.onclick = open;
  return button;
}

/** Add a picture to the gallery, and give its card. */
function keep({ image, settings }) {
  const caption = `${settings.prompt || "no prompt"} · ${settings.seed}`;
  const gallery = find("#gallery .pictures");
  gallery.prepend(card(image, caption, () => open(image, settings)));
  while (gallery.children.length > KEPT) gallery.lastChild.remove();
  return card(image, caption, () => open(image, settings));
}

async function drawInto(tab, values) {
  const place = find(`#${tab} .pictures`), cards = {};
  place.replaceChildren();
  const set = (number, made) => {
    if (cards[number]) cards[number].replaceWith(made);
    else place.append(made);
    cards[number] = made;
  };
  const preview = (number, image) => {
    const made = card(image, "…", () => {});
    made.classList.add("coming");
    set(number, made);
  };
  const finished = await run(tab, values, (data) => set(data.number, keep(data)), preview);
  if (!finished) place.querySelectorAll(".coming").forEach((each) => each.remove());
}

function submits(tab, action) {
  find(`#${tab} form`).addEventListener("submit", (event) => {
    event.preventDefault();
    if (forms[tab].go.disabled) return;
    forms[tab].roll();
    action(forms[tab].values());
  });
}

function result(tab) {
  return (data) => {
    shown[tab] = data.image;
    find(`#${tab} .result`).src = source(data.image);
    if (data.settings) keep(data);
  };
}

submits("text", (values) => drawInto("text", { ...values, previews: "some" }));

submits("edit", (values) => {
  if (!paints.edit.marked) return say("mark a part of the picture with the brush first", true);
  run("edit", { ...values, ...paints.edit.values(), previews: "some" }, result("edit"), (_, image) => result("edit")({ image }));
});
find("#edit .again").onclick = () => shown.edit && paints.edit.open(source(shown.edit));

submits("style", (values) => {
  const prompt = [values.other_prompt, values.prompt].filter(Boolean).join(", ");
  const asked = { ...values, ...paints.style.values(), prompt, task: "style", previews: "some" };
  run("style", asked, result("style"), (_, image) => result("style")({ image }));
});

submits("morph", async (values) => {
  const frames = {}, place = find("#morph .pictures");
  place.replaceChildren();
  forms.morph.animation = (image) => {
    const settings = { ...values, task: "morph" };
    place.replaceChildren(keep({ image, settings }), ...Object.values(frames).map((one) => card(one.image, `frame ${one.number + 1}`, () => open(one.image, one.settings))));
  };
  await run("morph", { ...values, task: "morph" }, (data) => (frames[data.number] = data));
});

// -- live -------------------------------------------------------------------------------------------------------------

const sessions = {};
const wants = { live: () => !find("#live").hidden, edit: () => !find("#edit").hidden && find("#edit .while").checked };

function connect() {
  for (const [tab, wanted] of Object.entries(wants)) {
    if (wanted() && !sessions[tab]) {
      let version, images;
      const state = () => {
        if (version !== paints[tab].version) [version, images] = [paints[tab].version, paints[tab].values()];
        const { solver, spacing, steps, guidance, ...values } = forms[tab].values();
        return { ...values, ...(tab === "live" && { solver, spacing, steps, guidance }), ...images };
      };
      const show = async (blob, seconds) => {
        shown[tab] = await base64(blob);
        find(`#${tab} .result`).src = source(shown[tab]);
        find(`#${tab} .speed`).textContent = `${Math.round(1000 * seconds)} ms`;
        say("");
      };
      sessions[tab] = new Live(state, show, (text) => say(text, true));
    } else if (!wanted() && sessions[tab]) {
      sessions[tab].close();
      delete sessions[tab];
    }
  }
}

function base64(blob) {
  return new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(blob);
  });
}

find("#edit .while").onchange = connect;
find("#live .keep").onclick = () => shown.live && keep({ image: shown.live, settings: { ...forms.live.values(), live: "yes" } });

// -- how it works -----------------------------------------------------------------------------------------------------

const FRAMES = 8, STEPS = 8;
const SCALES = model.guided ? [1, 2, 4, 8] : [];
const SOLVERS = ["ddim", "dpmpp_2m", "unipc", "ddpm"].filter((name) => model.solvers.includes(name));
find("#scales").closest("article").hidden = !SCALES.length;
find("#solvers").closest("article").hidden = !SOLVERS.length;

function tile(place, image, caption) {
  find(place).append(element("figure", {}, element("img", { src: source(image), alt: "" }), element("figcaption", { textContent: caption })));
}

submits("how", async (values) => {
  for (const place of ["#forward", "#backward", "#scales", "#solvers"]) find(place).replaceChildren();
  let clean;
  const base = { ...values, steps: STEPS };
  const believed = (_, image, { done }) => tile("#backward", image, `step ${done}`);
  if (!await run("how", { ...base, previews: "all" }, (data) => (clean = data.image), believed)) return;
  const count = Math.min(FRAMES, properties.num_images.maximum);
  const noised = { task: "noise", image: clean, seed: values.seed, num_images: count };
  if (!await run("how", noised, ({ number, image }) => tile("#forward", image, `t = ${(number / (count - 1)).toFixed(2)}`))) return;
  for (const guidance of SCALES) {
    if (!await run("how", { ...base, guidance }, ({ image }) => tile("#scales", image, `scale ${guidance}`))) return;
  }
  for (const solver of SOLVERS) {
    if (!await run("how", { ...base, solver }, ({ image }) => tile("#solvers", image, solver))) return;
  }
});

function drawCurves({ t, alpha, sigma }) {
  const most = Math.max(...alpha, ...sigma), last = t.at(-1);
  for (const [name, values] of [["alpha", alpha], ["sigma", sigma]]) {
    const points = values.map((value, i) => `${(8 + 384 * t[i] / last).toFixed(1)},${(122 - 114 * value / most).toFixed(1)}`);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", name);
    path.setAttribute("d", `M${points.join("L")}`);
    find("#curves").append(path);
  }
}
drawCurves(model.curves);

// -- a picture by itself, and pictures that are dropped in -----------------------------------------------------------

const dialog = find("dialog");

function open(image, settings) {
  const picture = find("img", dialog);
  picture.src = source(image);
  picture.alt = settings.prompt ?? "";
  const rows = Object.entries(settings).filter(([name, value]) => value !== "" && name !== "config");
  find("dl", dialog).replaceChildren(...rows.flatMap(([name, value]) => [
    element("dt", { textContent: properties[name]?.title ?? name }), element("dd", { textContent: value }),
  ]));
  Object.assign(find(".save", dialog), { href: source(image), download: `${settings.seed ?? "picture"}.png` });
  find(".use", dialog).onclick = () => restore(settings);
  dialog.querySelectorAll("[data-to]").forEach((button) => (button.onclick = () => {
    paints[button.dataset.to].open(source(image));
    if (button.dataset.to === "style") forms.style.enter({ other_prompt: settings.prompt ?? "" });
    dialog.close();
    select(button.dataset.to);
  }));
  dialog.showModal();
}
for (const button of dialog.querySelectorAll("[data-to]")) button.hidden = !usable(button.dataset.to);
find(".close", dialog).onclick = () => dialog.close();

/** Enter the settings of a picture where it was made. */
function restore(settings) {
  const tab = ["edit", settings.task === "morph" ? "morph" : "text"].findLast(usable);
  forms[tab].enter(settings);
  dialog.close();
  select(tab);
  say("settings restored");
}

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const file = event.dataTransfer.files[0];
  if (!file) return;
  const tab = event.target.closest?.("[role=tabpanel]")?.id;
  if (event.target.closest?.("figure") && paints[tab]) return paints[tab].open(file);
  const settings = textsOf(await file.arrayBuffer());
  if (settings.prompt === undefined) return say("this file has no settings of a picture; drop it on a canvas to use it", true);
  open(await base64(file), settings);
});

// -- tabs and state ---------------------------------------------------------------------------------------------------

const all = [...document.querySelectorAll("[role=tab]")], controls = (tab) => tab.getAttribute("aria-controls");
const tabs = all.filter((tab) => usable(controls(tab)));
for (const tab of all) tab.hidden = !tabs.includes(tab);

function select(id) {
  for (const tab of all) {
    const chosen = controls(tab) === id;
    tab.ariaSelected = String(chosen);
    tab.tabIndex = chosen ? 0 : -1;
    find(`#${controls(tab)}`).hidden = !chosen;
  }
  connect();
}

for (const [i, tab] of tabs.entries()) {
  tab.onclick = () => select(controls(tab));
  tab.onkeydown = ({ key }) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[key];
    if (to === undefined) return;
    const next = tabs[(to + tabs.length) % tabs.length];
    next.focus();
    next.click();
  };
}

select(controls(tabs[0]));

async function watch() {
  const { status } = await json("/health").catch(() => ({ status: "gone" }));
  const words = { warming: "preparing: the first pictures take longer", starting: "the model is loaded again", failed: "the server cannot draw", gone: "the server does not answer" };
  find("#server").textContent = words[status] ?? "";
  setTimeout(watch, 4000);
}
watch();
