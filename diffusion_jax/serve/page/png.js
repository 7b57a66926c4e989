// The settings in a PNG: the text chunks that pictures made here have.

const TEXT = new TextDecoder();

/** The texts of a PNG, an ArrayBuffer, by name; {} for any other file. */
export function textsOf(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer), found = {};
  if (bytes.length < 16 || view.getUint32(0) !== 0x89504e47) return found;
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const kind = TEXT.decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    if (kind !== "iTXt" && kind !== "tEXt") continue;
    const end = data.indexOf(0);
    // iTXt: name, 0, compressed, method, language, 0, translated name, 0, text
    const start = kind === "tEXt" ? end + 1 : data.indexOf(0, data.indexOf(0, end + 3) + 1) + 1;
    if (kind === "tEXt" || data[end + 1] === 0) found[TEXT.decode(data.subarray(0, end))] = TEXT.decode(data.subarray(start));
  }
  return found;
}
