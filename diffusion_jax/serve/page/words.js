// Words that the model knows, to choose from while a prompt is typed.

import { element } from "/page/dom.js";

const SHOWN = 6;

/** [word, the whole prompt with it] for a text that is being typed. */
export function completions(text, { names, colours, styles, grounds }) {
  const all = [...new Set([...names, ...colours, ...styles, ...grounds])], typed = text.toLowerCase();
  const begun = typed.match(/[^\s,]*$/)[0] && [/[^\s,]+ +[^\s,]+ +[^\s,]+$/, /[^\s,]+ +[^\s,]+$/, /[^\s,]+$/].map((end) => typed.match(end)?.[0]).filter(Boolean);
  for (const part of begun || []) {
    const hits = all.filter((word) => word.toLowerCase().startsWith(part) && word.length > part.length);
    if (hits.length) return hits.slice(0, SHOWN).map((word) => [word, text.slice(0, text.length - part.length) + word]);
  }
  if (!text.trim() || !styles.length) return names.filter((word) => word !== text).slice(0, SHOWN).map((word) => [word, word]);
  const [what, ...rest] = text.trim().replace(/[\s,]+$/, "").split(",");
  const tail = rest.length ? `,${rest.join(",")}` : "";
  return [
    ...(styles.some((word) => typed.includes(word)) ? [] : styles.map((word) => [word, `${what}${tail}, ${word}`])),
    ...(/ on (a|an|the) /.test(typed) ? [] : [2, 3].map((i) => grounds.at((text.length + i) % grounds.length)).map((word) => [word, `${what} ${word}${tail}`])),
  ];
}

/** Buttons with words under a prompt: the arrow down leads there from the prompt. */
export function suggestions(input, vocabulary) {
  const row = element("div", { className: "words", role: "group", ariaLabel: "Suggestions" });
  const choose = (text) => {
    input.value = text;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    input.focus();
  };
  const show = () => row.replaceChildren(...completions(input.value, vocabulary).map(([word, text]) => {
    const button = element("button", { type: "button", textContent: word, tabIndex: -1 });
    button.onclick = () => choose(text);
    return button;
  }));
  input.addEventListener("input", show);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" || input.selectionEnd < input.value.length || !row.firstChild) return;
    event.preventDefault();
    row.firstChild.focus();
  });
  row.addEventListener("keydown", (event) => {
    const to = { ArrowRight: "nextSibling", ArrowDown: "nextSibling", ArrowLeft: "previousSibling", ArrowUp: "previousSibling" }[event.key];
    if (event.key === "Escape") input.focus();
    if (!to) return;
    event.preventDefault();
    (event.target[to] ?? (to === "previousSibling" ? input : event.target)).focus();
  });
  show();
  return row;
}
