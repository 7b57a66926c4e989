// The pictures of a request, large: their places at once, what they will become, and what they are.

import { element, source } from "/page/dom.js";

const COLUMNS = [1, 1, 2, 2, 2, 3, 3, 3, 3, 3]; // by the number of pictures; 4 for more

/** A picture with its caption, as a button. */
export function card(image, caption, open) {
  const button = element("button", { type: "button", title: caption }, element("img", { src: source(image), alt: "" }), element("span", { textContent: caption }));
  button.onclick = open;
  return button;
}

export class Stage {
  constructor(place) {
    Object.assign(this, { place, cards: [] });
  }

  /** Make place for pictures of a width and height. */
  begin(count, width, height) {
    this.place.dataset.columns = COLUMNS[count] ?? 4;
    this.cards = Array.from({ length: count }, () => {
      const empty = element("div", { className: "coming" });
      empty.style.aspectRatio = `${width} / ${height}`;
      return empty;
    });
    this.place.replaceChildren(...this.cards);
  }

  set(number, made) {
    this.cards[number]?.replaceWith(made);
    this.cards[number] = made;
  }

  preview(number, image) {
    this.set(number, element("div", { className: "coming" }, element("img", { src: source(image), alt: "" })));
  }

  /** Take away what has not become a picture. */
  end() {
    this.place.querySelectorAll(".coming").forEach((each) => each.remove());
    this.place.dataset.columns = COLUMNS[this.place.children.length] ?? 4;
  }
}
