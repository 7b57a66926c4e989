// A canvas of the model's size: to draw on, or to mark a part of a picture.

export class Paint {
  /** panel: the tab that has the canvas and its tools. size: [height, width], pixels. masks: whether the brush marks. */
  constructor(panel, [height, width], masks) {
    const find = (name) => panel.querySelector(name);
    Object.assign(this, { canvas: find("canvas"), masks, brush: find(".brush"), colour: find(".colour"), version: 0 });
    this.canvas.style.aspectRatio = `${width} / ${height}`;
    this.layers = [0, 1].map(() => Object.assign(document.createElement("canvas"), { width, height }));
    Object.assign(this.canvas, { width, height });
    [this.picture, this.mask] = this.layers.map((layer) => layer.getContext("2d", { willReadFrequently: true }));
    this.place = [width / 2, height / 2];
    this.blank();
    if (this.brush) this.listen();
    find(".clear")?.addEventListener("click", () => (masks ? this.unmask() : this.blank()));
    find(".open").addEventListener("change", (event) => this.open(event.target.files[0]));
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.place = this.at(event);
      this.line(this.place);
    });
    canvas.addEventListener("pointermove", (event) => event.buttons && this.line(this.at(event)));
    canvas.addEventListener("keydown", (event) => {
      const [x, y] = this.place, far = Math.max(1, this.brush.value / 2);
      const to = { ArrowLeft: [x - far, y], ArrowRight: [x + far, y], ArrowUp: [x, y - far], ArrowDown: [x, y + far], " ": [x, y] }[event.key];
      if (!to) return;
      event.preventDefault();
      const inside = [Math.min(Math.max(to[0], 0), canvas.width), Math.min(Math.max(to[1], 0), canvas.height)];
      if (event.key === " " || event.shiftKey) this.line(inside);
      this.place = inside;
      this.show(true);
    });
    canvas.addEventListener("blur", () => this.show());
  }

  at({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    return [(clientX - box.left) / box.width * this.canvas.width, (clientY - box.top) / box.height * this.canvas.height];
  }

  line(to) {
    const pen = this.masks ? this.mask : this.picture;
    Object.assign(pen, { lineCap: "round", lineWidth: this.brush.value, strokeStyle: this.masks ? "#fff" : this.colour.value });
    pen.beginPath();
    pen.moveTo(...this.place);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
    this.place = to;
    this.changed();
  }

  blank() {
    this.picture.fillStyle = "#fff";
    this.picture.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.unmask();
  }

  unmask() {
    this.mask.fillStyle = "#000";
    this.mask.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.changed();
  }

  changed() {
    this.version += 1;
    this.show();
  }

  /** Show the picture, with the mask in colour over it; cursor: also where the keys are. */
  show(cursor = false) {
    const pen = this.canvas.getContext("2d"), { width, height } = this.canvas;
    pen.drawImage(this.picture.canvas, 0, 0);
    if (this.masks) {
      const shown = pen.getImageData(0, 0, width, height), mask = this.mask.getImageData(0, 0, width, height).data;
      for (let i = 0; i < mask.length; i += 4) {
        if (mask[i] > 127) [0, 1, 2].forEach((k) => (shown.data[i + k] = shown.data[i + k] * 0.45 + [220, 70, 60][k] * 0.55));
      }
      pen.putImageData(shown, 0, 0);
    }
    if (cursor) {
      Object.assign(pen, { lineWidth: 1, strokeStyle: "#2f5fa8" });
      pen.beginPath();
      pen.arc(...this.place, Math.max(1, this.brush.value / 2), 0, 7);
      pen.stroke();
    }
  }

  /** Take a picture, a file or an address, cropped to the canvas at its centre. */
  async open(source) {
    if (!source) return;
    const blob = typeof source === "string" ? await (await fetch(source)).blob() : source;
    const image = await createImageBitmap(blob), { width, height } = this.canvas;
    const scale = Math.max(width / image.width, height / image.height);
    const [w, h] = [image.width * scale, image.height * scale];
    this.blank();
    this.picture.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
    this.changed();
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
