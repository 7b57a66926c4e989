// A canvas of the model's size: to draw on, or to mark a part of a picture.

import { element, find } from "/page/dom.js";

const UNDOS = 40;
const SWATCHES = { red: "#d92b2b", orange: "#f08a24", yellow: "#f7d92a", green: "#4fae3c", blue: "#3f8fe0", purple: "#8e55c4", pink: "#f58ab5", brown: "#8a5a35", black: "#2e2e2e", white: "#ffffff" };

export class Paint {
  /**
   * panel: the tab that has the canvas and its tools.
   * size: [height, width], pixels.
   * masks: whether the brush marks.
   * tell: (text) tells an error.
   * stay: () is called after each change that is complete.
   */
  constructor(panel, [height, width], masks, tell, stay) {
    const of = (name) => find(name, panel);
    Object.assign(this, { canvas: of("canvas"), masks, tell, stay, brush: of(".brush"), colour: of(".colour"), eraser: of(".eraser"), version: 0 });
    Object.assign(this, { undone: [], strokes: [], buttons: { undo: of(".undo"), redo: of(".redo") }, ring: of(".ring"), hasPicture: false });
    this.canvas.style.aspectRatio = `${width} / ${height}`;
    Object.assign(this.canvas, { width, height });
    [this.picture, this.mask, this.base] = [0, 1, 2].map(() => element("canvas", { width, height }).getContext("2d", { willReadFrequently: true }));
    this.place = [width / 2, height / 2];
    this.blank();
    if (this.brush) this.listen(of(".swatches"));
    of(".clear")?.addEventListener("click", () => this.change(() => (masks ? this.unmask() : this.blank())));
    of(".open").addEventListener("change", ({ target }) => {
      this.open(target.files[0]);
      target.value = "";
    });
  }

  listen(swatches) {
    const { canvas, ring } = this;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.begin();
      this.place = this.at(event);
      this.line(this.place);
    });
    canvas.addEventListener("pointermove", (event) => {
      const place = this.at(event);
      if (event.buttons) this.line(place);
      this.circle(place);
    });
    canvas.addEventListener("pointerup", () => this.stay());
    for (const gone of ["pointerleave", "blur"]) canvas.addEventListener(gone, () => (ring.hidden = true));
    canvas.addEventListener("keydown", (event) => this.key(event));
    for (const [name, button] of Object.entries(this.buttons)) button.onclick = () => this[name]();
    this.eraser.onclick = () => (this.eraser.ariaPressed = String(this.eraser.ariaPressed !== "true"));
    this.colour?.addEventListener("input", () => (this.eraser.ariaPressed = "false"));
    for (const [name, colour] of Object.entries(swatches ? SWATCHES : {})) {
      const swatch = element("button", { type: "button", className: "swatch", ariaLabel: name, title: name });
      swatch.style.background = colour;
      swatch.onclick = () => {
        this.colour.value = colour;
        this.eraser.ariaPressed = "false";
      };
      swatches.append(swatch);
    }
  }

  key(event) {
    const [x, y] = this.place, far = Math.max(1, this.brush.value / 2);
    const to = { ArrowLeft: [x - far, y], ArrowRight: [x + far, y], ArrowUp: [x, y - far], ArrowDown: [x, y + far], " ": [x, y] }[event.key];
    if (!to || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const inside = [Math.min(Math.max(to[0], 0), this.canvas.width), Math.min(Math.max(to[1], 0), this.canvas.height)];
    if (event.key === " " || event.shiftKey) this.change(() => this.line(inside));
    this.place = inside;
    this.circle(inside);
  }

  at({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    return [(clientX - box.left) / box.width * this.canvas.width, (clientY - box.top) / box.height * this.canvas.height];
  }

  /** Show the brush as a ring. */
  circle([x, y]) {
    const { width, height } = this.canvas;
    this.ring.hidden = false;
    Object.assign(this.ring.style, { left: `${100 * x / width}%`, top: `${100 * y / height}%`, width: `${100 * this.brush.value / width}%` });
  }

  line(to) {
    const pen = this.masks ? this.mask : this.picture, erases = this.eraser.ariaPressed === "true";
    const own = this.masks ? "#fff" : this.colour.value;
    const under = this.masks ? "#000" : pen.createPattern(this.base.canvas, "no-repeat");
    Object.assign(pen, { lineCap: "round", lineWidth: this.brush.value, strokeStyle: erases ? under : own });
    pen.beginPath();
    pen.moveTo(...this.place);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
    this.place = to;
    this.changed();
  }

  // -- undo -----------------------------------------------------------------------------------------------------------

  pixels() {
    return [this.picture, this.mask, this.base].map((pen) => pen.getImageData(0, 0, this.canvas.width, this.canvas.height));
  }

  /** Remember how it is now, before a change. */
  begin() {
    this.strokes = [...this.strokes, this.pixels()].slice(-UNDOS);
    this.undone = [];
    this.enable();
  }

  change(action) {
    this.begin();
    action();
    this.stay();
  }

  undo() { this.step(this.strokes, this.undone); }
  redo() { this.step(this.undone, this.strokes); }

  step(from, to) {
    if (!from.length) return;
    to.push(this.pixels());
    from.pop().forEach((pixels, i) => [this.picture, this.mask, this.base][i].putImageData(pixels, 0, 0));
    this.enable();
    this.changed();
    this.stay();
  }

  enable() {
    if (!this.brush) return;
    this.buttons.undo.disabled = !this.strokes.length;
    this.buttons.redo.disabled = !this.undone.length;
  }

  // -- what is on it --------------------------------------------------------------------------------------------------

  blank() {
    for (const pen of [this.picture, this.base]) {
      pen.fillStyle = "#fff";
      pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    }
    this.unmask();
  }

  unmask() {
    this.mask.fillStyle = "#000";
    this.mask.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.changed();
  }

  /** Show the picture, with the mask in colour over it. */
  changed() {
    this.version += 1;
    const pen = this.canvas.getContext("2d"), { width, height } = this.canvas;
    pen.drawImage(this.picture.canvas, 0, 0);
    if (!this.masks) return;
    const shown = pen.getImageData(0, 0, width, height), mask = this.mask.getImageData(0, 0, width, height).data;
    for (let i = 0; i < mask.length; i += 4) {
      if (mask[i] > 127) [0, 1, 2].forEach((k) => (shown.data[i + k] = shown.data[i + k] * 0.45 + [220, 70, 60][k] * 0.55));
    }
    pen.putImageData(shown, 0, 0);
  }

  /** Take a picture, a file or an address, cropped to the canvas at its centre. */
  async open(source) {
    if (!source) return;
    let image;
    try {
      image = await createImageBitmap(typeof source === "string" ? await (await fetch(source)).blob() : source);
    } catch {
      return this.tell(`${source.name ?? "This file"} is no picture that this browser can open`);
    }
    const { width, height } = this.canvas, scale = Math.max(width / image.width, height / image.height);
    const [w, h] = [image.width * scale, image.height * scale];
    this.hasPicture = true;
    this.change(() => {
      this.blank();
      for (const pen of [this.picture, this.base]) pen.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
      this.changed();
    });
  }

  /** The picture, and for a mask also it, as data URLs. */
  values() {
    const image = this.picture.canvas.toDataURL("image/png");
    return this.masks ? { image, mask: this.mask.canvas.toDataURL("image/png") } : { image };
  }

  get marked() {
    return this.mask.getImageData(0, 0, this.canvas.width, this.canvas.height).data.some((value, i) => i % 4 === 0 && value > 127);
  }
}
