// A picture by itself, as large as the window: the ones before and after it, its settings, and what to do with it.

import { bytes, download, element, find, source } from "/page/dom.js";
import { fileName } from "/page/history.js";

export class Viewer {
  /**
   * dialog: the element.
   * titles: of settings.
   * names: of solvers and spacings.
   * actions: {use, send, remove} of a picture; send also gets the tab that it goes to.
   */
  constructor(dialog, titles, names, { use, send, remove }) {
    Object.assign(this, { dialog, titles, names, list: [], index: 0 });
    const of = (name) => find(name, dialog);
    of(".close").onclick = () => dialog.close();
    of(".before").onclick = () => this.step(-1);
    of(".after").onclick = () => this.step(1);
    of(".zoom").onclick = (event) => this.zoom(event);
    of(".use").onclick = () => this.leave(use);
    of(".delete").onclick = () => this.leave(remove);
    of(".save").onclick = () => this.save(this.picture.image, "png", "image/png");
    of(".gif").onclick = () => this.save(this.picture.gif, "gif", "image/gif");
    for (const button of dialog.querySelectorAll("[data-to]")) button.onclick = () => this.leave((picture) => send(picture, button.dataset.to));
    dialog.onclick = ({ target }) => target === dialog && dialog.close();
    dialog.onkeydown = ({ key }) => {
      if (key === "ArrowLeft") this.step(-1);
      if (key === "ArrowRight") this.step(1);
      if (key === "Delete" && this.picture.at) this.leave(remove);
    };
  }

  get picture() { return this.list[this.index]; }

  open(list, index) {
    Object.assign(this, { list, index });
    this.show();
    this.dialog.showModal();
  }

  leave(action) {
    this.dialog.close();
    action(this.picture);
  }

  step(by) {
    if (!this.list[this.index + by]) return;
    this.index += by;
    this.show();
  }

  save(content, ending, type) {
    download(new Blob([bytes(content)], { type }), fileName(this.picture, ending));
  }

  show() {
    const of = (name) => find(name, this.dialog), { image, gif, at, settings } = this.picture;
    Object.assign(of("img"), { src: source(image), alt: settings.prompt || "no prompt" });
    of(".zoom").ariaPressed = "false";
    of("h2").textContent = settings.prompt || "no prompt";
    of(".place").textContent = this.list.length > 1 ? `${this.index + 1} of ${this.list.length}` : "";
    of(".before").disabled = !this.index;
    of(".after").disabled = this.index === this.list.length - 1;
    of(".gif").hidden = !gif;
    of(".delete").hidden = !at;
    const words = { ...this.names.spacing_names, ...this.names.solver_names };
    const rows = Object.entries(settings).filter(([name, value]) => value !== "" && name !== "prompt");
    of("dl").replaceChildren(...rows.flatMap(([name, value]) => [
      element("dt", { textContent: this.titles[name]?.title ?? name.replaceAll("_", " ") }),
      element("dd", { textContent: (["solver", "spacing"].includes(name) && words[value]) || value }),
    ]));
  }

  /** Twice as large, with what was clicked in sight; or as large as the window again. */
  zoom({ currentTarget, clientX, clientY }) {
    const box = currentTarget.getBoundingClientRect(), frame = find(".frame", this.dialog);
    currentTarget.ariaPressed = String(currentTarget.ariaPressed !== "true");
    const part = clientX ? [(clientX - box.left) / box.width, (clientY - box.top) / box.height] : [0.5, 0.5];
    frame.scrollTo(part[0] * frame.scrollWidth - frame.clientWidth / 2, part[1] * frame.scrollHeight - frame.clientHeight / 2);
  }
}
