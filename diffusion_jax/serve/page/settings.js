// The settings in a PNG: the texts of pictures made here, and those of AUTOMATIC1111's web UI and its relatives.

const TEXT = new TextDecoder(), LATIN = new TextDecoder("latin1");

/** The texts of a PNG, an ArrayBuffer, by name; {} for any other file. */
function textsOf(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer), found = {};
  if (bytes.length < 16 || view.getUint32(0) !== 0x89504e47) return found;
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const kind = TEXT.decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    if (kind !== "iTXt" && kind !== "tEXt") continue;
    const end = data.indexOf(0), name = TEXT.decode(data.subarray(0, end));
    // iTXt: name, 0, compressed, method, language, 0, translated name, 0, text
    if (kind === "tEXt") found[name] = LATIN.decode(data.subarray(end + 1));
    else if (data[end + 1] === 0) found[name] = TEXT.decode(data.subarray(data.indexOf(0, data.indexOf(0, end + 3) + 1) + 1));
  }
  return found;
}

const key = (name) => name.toLowerCase().replace(/[^a-z0-9+]/g, "");

/** The solver and spacing that a name such as "DPM++ 2M Karras" stands for; {} for an unknown one. */
function sampler(name, { solver_names, spacing_names }) {
  for (const [solver, label] of Object.entries(solver_names)) {
    if (key(name) === key(label)) return { solver };
    const spacing = Object.keys(spacing_names).find((each) => key(name) === key(`${label} ${spacing_names[each]}`));
    if (spacing !== undefined) return { solver, spacing };
  }
  return {};
}

/** The settings in the text "parameters": prompt, "Negative prompt: …", and a line "Steps: 20, Sampler: Euler a, …". */
export function ofParameters(text, names) {
  const lines = text.trim().split("\n");
  const last = /^Steps: \d/.test(lines.at(-1)) ? lines.pop() : "";
  const [prompt, negative_prompt = ""] = lines.join("\n").split(/\n?Negative prompt:/).map((part) => part.trim());
  const found = Object.fromEntries([...last.matchAll(/\s*([\w ]+):\s*("(?:\\.|[^"])*"|[^,]*)(?:,|$)/g)].map(([, name, value]) => [name, value]));
  const [width, height] = (found.Size ?? "").split("x");
  const spacing = Object.keys(names.spacing_names).find((each) => key(names.spacing_names[each]) === key(found["Schedule type"] ?? "?"));
  const all = { prompt, negative_prompt, steps: found.Steps, guidance: found["CFG scale"], seed: found.Seed, width, height, strength: found["Denoising strength"], ...sampler(found.Sampler ?? "", names), ...(spacing !== undefined && { spacing }) };
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined));
}

/** The settings in a PNG, an ArrayBuffer, or null. */
export function settingsOf(buffer, names) {
  const texts = textsOf(buffer);
  if (texts.prompt !== undefined) return texts;
  return texts.parameters === undefined ? null : ofParameters(texts.parameters, names);
}
