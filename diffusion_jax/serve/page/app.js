// The page: tabs, each a form of the request's schema beside what it draws, and all pictures drawn so far.

import { generate, json } from "/page/api.js";
import { Form } from "/page/controls.js";
import { base64, bytes, download, element, find, source } from "/page/dom.js";
import * as history from "/page/history.js";
import { story } from "/page/how.js";
import { Session } from "/page/live.js";
import { Paint } from "/page/paint.js";
import { settingsOf } from "/page/settings.js";
import { Stage, card } from "/page/stage.js";
import { Viewer } from "/page/viewer.js";

const PART = 60; // pictures in the list, until more are wanted
const [description, model, stays] = await Promise.all([json("/openapi.json"), json("/api/model"), history.open()]).catch((error) => {
  find("#server").textContent = error.message;
  throw error;
});
const { Request, LiveRequest } = description.components.schemas, properties = Request.properties;

// -- forms ------------------------------------------------------------------------------------------------------------

const START = { default: model.prompt, description: "" };
const SEED = { description: "The same seed draws the same picture. Lock keeps it for the next ones." };
const SAMPLING = ["steps", "guidance", "solver", "spacing"], SIZE = ["width", "height"];
const TABS = {
  text: { names: ["prompt", "num_images", "seed"], more: ["negative_prompt", ...SAMPLING, ...SIZE], texts: { prompt: START, seed: SEED }, action: "Draw" },
  live: { names: ["prompt", "strength", "seed"], more: ["negative_prompt", ...SAMPLING], texts: { prompt: START, seed: SEED, strength: { default: 0.6, description: "How much of your painting changes." }, steps: { default: model.live_steps } } },
  edit: { names: ["prompt", "seed"], more: ["negative_prompt", "strength", ...SAMPLING], texts: { prompt: { ...START, description: "What the marked part shows." }, strength: { default: 1 }, seed: SEED }, action: "Draw the marked part" },
  words: { names: ["prompt", "seed"], more: ["negative_prompt", ...SAMPLING], texts: { prompt: { title: "What to change", description: "Such as: make it night.", default: "" }, seed: SEED }, action: "Edit" },
  style: { names: ["other_prompt", "prompt", "strength", "seed"], more: ["negative_prompt", "steps", "guidance"], texts: { other_prompt: { title: "What the picture shows", description: "" }, prompt: { title: "In which style", description: "These words are added.", default: model.vocabulary.styles.at(2) ?? "" }, strength: { default: 0.8 }, seed: SEED }, action: "Restyle" },
  morph: { names: ["prompt", "other_prompt", "num_images", "seed", "other_seed"], more: ["negative_prompt", ...SAMPLING, ...SIZE], texts: { prompt: { ...START, title: "From", description: "" }, other_prompt: { title: "To", description: "Empty for the same.", default: model.other_prompt }, seed: { ...SEED, title: "First seed" }, other_seed: { description: "" }, num_images: { title: "Frames", description: "How many pictures from one to the other.", default: Math.min(12, properties.num_images.maximum), minimum: 2 } }, action: "Morph" },
  how: { names: ["prompt", "seed"], texts: { prompt: START, seed: SEED }, action: "Show how" },
};
// an inpainting model does nothing else, a consistency model cannot be inverted, and few models read reference pictures
const usable = (tab) => (tab === "edit" || !model.needs_image) && (tab !== "style" || properties.task.enum.includes(tab)) && (tab !== "words" || model.references > 0);
const forms = Object.fromEntries(Object.entries(TABS).map(([tab, table]) => [tab, new Form(find(`#${tab} form`), tab === "live" ? LiveRequest.properties : properties, table, model)]));
const MODEL = `${model.name} ${model.origin}`; // settings are kept for each model

find("#model").textContent = `${model.name}, ${model.size[1]} x ${model.size[0]} pixels, weights: ${model.origin}`;

for (const [tab, form] of Object.entries(forms)) {
  const kept = await history.read(`${MODEL} ${tab}`);
  if (kept) form.restore(kept);
  for (const event of ["input", "toggle"]) form.form.addEventListener(event, () => history.write(`${MODEL} ${tab}`, form.state()), true);
  form.isNew = !kept;
}

// -- canvases ---------------------------------------------------------------------------------------------------------

const paints = {};
for (const tab of ["live", "edit", "words", "style"]) {
  const stay = () => paints[tab] && history.write(`${MODEL} ${tab} canvas`, paints[tab].values().image);
  paints[tab] = new Paint(find(`#${tab}`), model.size, tab === "edit", (text) => forms[tab].say(text, true), stay);
  const kept = await history.read(`${MODEL} ${tab} canvas`);
  if (kept) await paints[tab].open(kept);
}
const results = {}; // by tab, the base64 of the last one

function showResult(tab, image) {
  results[tab] = image;
  Object.assign(find(`#${tab} .result`), { src: source(image), hidden: false });
  find(`#${tab} .empty`).hidden = true;
}

addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase(), paint = paints[selected];
  if (!(event.ctrlKey || event.metaKey) || !"zy".includes(key) || !paint?.brush || find("dialog").open) return;
  if (event.target.matches("textarea, input[type=number]")) return;
  event.preventDefault();
  if (key === "y" || event.shiftKey) paint.redo();
  else paint.undo();
});

// -- requests ---------------------------------------------------------------------------------------------------------

const inSeconds = (seconds) => (seconds >= 1 ? `, about ${Math.round(seconds)} s` : "");

/** Run one request of a tab. take: ({number, seed, image, settings}) gets each picture, preview: (number, base64). */
async function run(tab, values, take, preview = () => {}, animation = () => {}) {
  const form = forms[tab], stop = new AbortController(), count = values.num_images ?? 1;
  let done = 0, begun = false;
  form.cancel.onclick = () => stop.abort();
  form.progress(0);
  form.say("waiting");
  if (matchMedia("(max-width: 52rem)").matches) find(`#${tab} .stage`).scrollIntoView();
  try {
    for await (const [event, data] of generate(values, stop.signal)) {
      if (event === "queued" && begun) form.say("The process that draws ended. It is started again, then this is drawn again.");
      else if (event === "queued") form.say(data.position ? `${data.position} before you${inSeconds(data.seconds)}` : `next${inSeconds(data.seconds)}`);
      if (event === "preparing") form.say(`preparing ${data.width} x ${data.height}${inSeconds(data.seconds)}`);
      if (event === "progress") {
        begun = true;
        form.say(`step ${data.done} of ${data.total}` + (done ? `, ${done} of ${count} pictures done` : ""));
        form.progress((done + data.done / data.total) / count);
        for (const [number, image] of Object.entries(data.previews)) preview(Number(number), image, data);
      }
      if (event === "picture") {
        done += 1;
        await take(data);
      }
      if (event === "animation") await animation(data);
    }
    form.say("done");
    return true;
  } catch (error) {
    if (error.name === "AbortError") form.say("cancelled");
    else form.fail(error);
    return false;
  } finally {
    form.progress(null);
  }
}

function submits(tab, action) {
  find(`#${tab} form`).addEventListener("submit", (event) => {
    event.preventDefault();
    if (forms[tab].go.disabled || !TABS[tab].action) return;
    forms[tab].roll();
    action(forms[tab].values());
  });
}

// -- pictures that stay -----------------------------------------------------------------------------------------------

const current = {}; // by tab, the pictures that it shows large: they are not in the list below it
const cards = new WeakMap();
let part = PART, removed = null;

const open = (record) => viewer.open([...history.records], history.records.indexOf(record));

/** Keep a picture, and give its card. */
async function keep(tab, { image, settings, gif }) {
  const record = { at: Date.now(), tab, image, settings, ...(gif && { gif }) };
  (current[tab] ??= []).push(record);
  await history.add(record).catch(() => forms[tab].say("The browser has no room for more pictures: save and delete some.", true));
  showList();
  const made = card(image, captionOf(record), () => open(record));
  made.record = record;
  return made;
}

const captionOf = (record) => history.caption(record, history.records[history.records.indexOf(record) + 1], model);

function showList() {
  const others = history.records.filter((record) => !current[selected]?.includes(record));
  find("#gallery .pictures").replaceChildren(...others.slice(0, part).map((record) => {
    if (!cards.has(record)) cards.set(record, card(record.image, "", () => open(record)));
    const made = cards.get(record);
    made.title = find("span", made).textContent = captionOf(record);
    return made;
  }));
  find("#gallery").hidden = !history.records.length && !removed;
  find("#gallery .more").hidden = others.length <= part;
  find("#gallery .undelete").hidden = !removed;
}

async function remove(record) {
  removed = record;
  await history.remove(record);
  for (const made of document.querySelectorAll(".stage .pictures button")) if (made.record === record) made.remove();
  for (const tab of Object.keys(current)) current[tab] = current[tab].filter((other) => other !== record);
  showList();
}

find("#gallery .more").onclick = () => { part += PART; showList(); };
find("#gallery .undelete").onclick = async () => {
  const record = removed;
  removed = null;
  await history.add(record);
  showList();
};
find("#gallery .save").onclick = () => download(history.zip(history.records.map((record) => [history.fileName(record), record.image])), "pictures.zip");
find("#gallery .empty-all").onclick = async () => {
  if (!confirm(`Delete all ${history.records.length} pictures?`)) return;
  removed = null;
  await history.clear();
  for (const tab of ["text", "morph"]) find(`#${tab} .pictures`).replaceChildren();
  showList();
};
find("#gallery .hint").textContent += stays ? " The pictures stay in this browser until you delete them." : " This browser keeps nothing: save what you want to keep.";

// -- what each tab does -----------------------------------------------------------------------------------------------

const stages = { text: new Stage(find("#text .pictures")), morph: new Stage(find("#morph .frames")) };

submits("text", async (values) => {
  current.text = [];
  showList();
  find("#examples").classList.add("small");
  stages.text.begin(values.num_images, values.width, values.height);
  await run("text", { ...values, previews: "some" }, async (data) => stages.text.set(data.number, await keep("text", data)), (number, image) => stages.text.preview(number, image));
  stages.text.end();
});

submits("edit", (values) => {
  if (!paints.edit.marked) return forms.edit.say("Mark a part of the picture with the brush first.", true);
  drawResult("edit", { ...values, ...paints.edit.values() });
});
for (const tab of ["edit", "words"]) find(`#${tab} .again`).onclick = () => results[tab] ? paints[tab].open(source(results[tab])) : forms[tab].say("There is no result yet.", true);

const restyle = ({ other_prompt, prompt, ...values }, image) => ({ ...values, image, other_prompt, prompt: [other_prompt, prompt].filter(Boolean).join(", "), task: "style" });
for (const [tab, request] of [["style", restyle], ["words", (values, image) => ({ ...values, references: [image] })]]) submits(tab, (values) => {
  if (!paints[tab].hasPicture) return forms[tab].say("Open a picture first, or send one here from the list below.", true);
  drawResult(tab, request(values, paints[tab].values().image));
});

async function drawResult(tab, values) {
  current[tab] = [];
  await run(tab, { ...values, previews: "some" }, async (data) => {
    showResult(tab, data.image);
    await keep(tab, data);
  }, (_, image) => showResult(tab, image));
}

submits("morph", async (values) => {
  const frames = [], place = find("#morph .animation");
  current.morph = [];
  place.replaceChildren();
  showList();
  stages.morph.begin(values.num_images, values.width, values.height);
  await run("morph", { ...values, task: "morph", previews: "some" }, (data) => {
    frames[data.number] = data;
    stages.morph.set(data.number, card(data.image, `frame ${data.number + 1}`, () => viewer.open(frames.filter(Boolean), frames.filter(Boolean).indexOf(data))));
  }, (number, image) => stages.morph.preview(number, image), async (data) => place.append(await keep("morph", { ...data, settings: { ...values, task: "morph" } })));
  stages.morph.end();
});

submits("how", story(model, properties.num_images.maximum, (values, take, preview) => run("how", values, take, preview)));

const sessions = ["live", "edit"].map((tab) => {
  let version, images;
  const wanted = () => selected === tab && (tab === "live" || find("#edit .while").checked);
  const state = () => {
    if (version !== paints[tab].version) [version, images] = [paints[tab].version, paints[tab].values()];
    const { solver, spacing, steps, guidance, ...values } = forms[tab].values();
    return { ...values, ...(tab === "live" && { solver, spacing, steps, guidance }), ...images };
  };
  return new Session(wanted, state, async (blob, speed) => {
    showResult(tab, await base64(blob));
    find(`#${tab} .speed`).textContent = speed;
    if (find(".error", forms[tab].form) || forms[tab].message.textContent === Session.WAITING) forms[tab].say("");
  }, (text, isError) => forms[tab].say(text, isError));
});
const connect = () => sessions.forEach((session) => session.update());
find("#edit .while").onchange = connect;
find("#live .keep").onclick = async () => {
  if (!results.live) return forms.live.say("There is no picture yet.", true);
  await keep("", { image: results.live, settings: settingsOf(bytes(results.live).buffer, model) });
  forms.live.say("kept below");
};

// -- examples ---------------------------------------------------------------------------------------------------------

const examples = model.examples.map((image) => ({ image, settings: settingsOf(bytes(image).buffer, model) }));

function showExample(example) {
  forms.text.cancel.onclick?.();
  forms.text.enter(example.settings, false);
  stages.text.begin(1, ...model.size.toReversed());
  stages.text.set(0, card(example.image, "an example", () => viewer.open([example], 0)));
  find("#examples").classList.add("small");
  current.text = [];
  showList();
  forms.text.say("An example and its settings. Draw makes it again, then others.");
}

find("#examples .pictures").append(...(examples.length ? examples.map((example) => card(example.image, example.settings.prompt, () => showExample(example))) : [...new Set(model.prompts)].slice(0, 8).map((prompt) => {
  const button = element("button", { type: "button", className: "words-only", textContent: prompt });
  button.onclick = () => {
    forms.text.enter({ prompt });
    forms.text.form.requestSubmit();
  };
  return button;
})));
if (examples.length && forms.text.isNew) forms.text.enter(examples[0].settings, false);

// -- a picture by itself, and pictures that are dropped in ------------------------------------------------------------

const viewer = new Viewer(find("dialog"), properties, model, {
  use: restore,
  remove,
  send: ({ image, settings }, tab) => {
    paints[tab].open(source(image));
    const prompt = settings.prompt ?? "", style = model.vocabulary.styles.find((word) => prompt.endsWith(`, ${word}`));
    if (tab === "style") forms.style.enter({ other_prompt: style ? prompt.slice(0, -style.length - 2) : prompt });
    select(tab);
  },
});
for (const button of document.querySelectorAll("dialog [data-to]")) button.hidden = !usable(button.dataset.to);

/** Enter the settings of a picture where it was made. */
function restore({ settings, tab }) {
  const made = { "live canvas": "live", mask: "edit", references: "words" }[settings.made_with] ?? { style: "style", morph: "morph" }[settings.task];
  const to = ["edit", "text", tab, made].findLast((each) => each && usable(each));
  const prompt = to === "style" ? (settings.prompt ?? "").replace(`${settings.other_prompt}, `, "") : settings.prompt;
  forms[to].enter({ ...settings, prompt });
  select(to);
  forms[to].say("The settings of the picture are entered.");
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
  if (event.target.closest?.("figure") && paints[selected]) return paints[selected].open(file);
  const settings = settingsOf(await file.arrayBuffer(), model);
  if (settings) return viewer.open([{ image: await base64(file), settings }], 0);
  forms[selected].say(`${file.name} has no settings of a picture. Drop a picture on a canvas to use it.`, true);
});

// -- tabs and the state of the server ---------------------------------------------------------------------------------

const all = [...document.querySelectorAll("[role=tab]")], controls = (tab) => tab.getAttribute("aria-controls");
const tabs = all.filter((tab) => usable(controls(tab)));
for (const tab of all) tab.hidden = !tabs.includes(tab);
var selected; // hoisted: what is above asks for it

function select(id) {
  selected = id;
  for (const tab of all) {
    const chosen = controls(tab) === id;
    tab.ariaSelected = String(chosen);
    tab.tabIndex = chosen ? 0 : -1;
    find(`#${controls(tab)}`).hidden = !chosen;
  }
  connect();
  showList();
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

const theme = (scheme) => (document.documentElement.style.colorScheme = scheme);
theme(await history.read("theme") ?? "");
find("#theme").onclick = () => {
  const isDark = (document.documentElement.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  theme(isDark ? "light" : "dark");
  history.write("theme", isDark ? "light" : "dark");
};

async function watch() {
  const { status, message } = await json("/health").catch((error) => error);
  const words = { warming: "preparing: the first pictures take longer", starting: "the model is loaded again", failed: "the server cannot draw: its log says why" };
  find("#server").textContent = message ?? words[status] ?? "";
  if (selected === "live" && ["starting", "failed"].includes(status)) forms.live.say(words[status], true); // until the next frame
  setTimeout(watch, 4000);
}
watch();
document.body.ariaBusy = "false";
