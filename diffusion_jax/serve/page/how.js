// How it works: one picture into noise and back, the schedule, guidance and solvers side by side.

import { element, find, source } from "/page/dom.js";

const FRAMES = 8, STEPS = 8;
const CHOSEN = ["ddim", "dpmpp_2m", "unipc", "ddpm"];

/** Returns what draws the story for the values of the form. run: (values, take, preview) -> whether it is done. */
export function story(model, most, run) {
  const scales = model.guided ? [1, 2, 4, 8] : [], solvers = CHOSEN.filter((name) => model.solvers.includes(name));
  find("#scales").closest("article").hidden = !scales.length;
  find("#solvers").closest("article").hidden = !solvers.length;
  drawCurves(model.curves);

  const tile = (place, image, caption) => find(place).append(element("figure", {}, element("img", { src: source(image), alt: "" }), element("figcaption", { textContent: caption })));

  return async (values) => {
    for (const place of ["#forward", "#backward", "#scales", "#solvers"]) find(place).replaceChildren();
    let clean;
    const base = { ...values, steps: STEPS };
    const believed = (_, image, { done }) => tile("#backward", image, `step ${done}`);
    if (!await run({ ...base, previews: "all" }, ({ image }) => (clean = image), believed)) return;
    const count = Math.min(FRAMES, most);
    const noised = { task: "noise", image: clean, seed: values.seed, num_images: count };
    if (!await run(noised, ({ number, image }) => tile("#forward", image, `t = ${(number / (count - 1)).toFixed(2)}`))) return;
    for (const guidance of scales) {
      if (!await run({ ...base, guidance }, ({ image }) => tile("#scales", image, `scale ${guidance}`))) return;
    }
    for (const solver of solvers) {
      if (!await run({ ...base, solver }, ({ image }) => tile("#solvers", image, model.solver_names[solver] ?? solver))) return;
    }
  };
}

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
