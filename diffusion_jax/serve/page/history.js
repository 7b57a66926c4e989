// Pictures and settings that stay: in the browser's own database.

import { bytes } from "/page/dom.js";

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const NAMED = { seed: (value) => `seed ${value}`, solver: (value, names) => names[value] ?? value, spacing: (value, names) => names[value] || value || "automatic", steps: (value) => `${value} steps`, guidance: (value) => `guidance ${value}`, strength: (value) => `strength ${value}`, negative_prompt: (value) => `not ${value || "anything"}`, width: (value) => `${value} wide`, height: (value) => `${value} high`, task: (value) => value, made_with: (value) => value };

let database = null;
const store = (name, mode) => database.transaction(name, mode).objectStore(name);

export const records = []; // {id, at, tab, image, gif, settings}, newest first

/** Open the database and read the pictures. Returns whether there is one: a private window may have none. */
export async function open() {
  try {
    const request = indexedDB.open("diffusion_jax", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
      request.result.createObjectStore("values");
    };
    database = await done(request);
    records.push(...(await done(store("pictures").getAll())).reverse());
  } catch {
    database = null;
  }
  return database !== null;
}

/** Add a picture, or put a removed one back. Throws if the browser has no room for it; it is in the list all the same. */
export async function add(record) {
  const index = records.findIndex((other) => other.at <= record.at);
  records.splice(index < 0 ? records.length : index, 0, record);
  if (database) record.id = await done(store("pictures", "readwrite").put(record));
  return record;
}

export async function remove(record) {
  records.splice(records.indexOf(record), 1);
  if (database) await done(store("pictures", "readwrite").delete(record.id));
}

export async function clear() {
  records.length = 0;
  if (database) await done(store("pictures", "readwrite").clear());
}

export const read = (name) => database ? done(store("values").get(name)) : undefined;
export const write = (name, value) => database && done(store("values", "readwrite").put(value, name)).catch(() => {});

/** What makes a picture another one than the picture before it: the seed, the solver, … */
export function caption({ settings }, older, names) {
  const isNew = !older || older.settings.prompt !== settings.prompt;
  const differs = Object.keys(NAMED).filter((name) => name === "seed" ? settings.seed !== undefined : !isNew && (settings[name] ?? "") !== (older.settings[name] ?? ""));
  const told = differs.map((name) => NAMED[name](settings[name], { ...names.solver_names, ...names.spacing_names })).filter(Boolean);
  const prompt = [settings.prompt || "no prompt", settings.task === "morph" && settings.other_prompt].filter(Boolean).join(" → ");
  return [...(isNew ? [prompt] : []), ...told].join(" · ");
}

/** A name for the file of a picture: "a red apple", 7 -> "a-red-apple-7". */
export function fileName({ settings }, ending = "png") {
  const words = (settings.prompt ?? "").toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60) || "picture";
  return `${words}-${settings.seed ?? 0}.${ending}`;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  for (let k = 0; k < 8; k += 1) i = i & 1 ? 0xedb88320 ^ (i >>> 1) : i >>> 1;
  return i;
});
const crc = (data) => ~data.reduce((sum, byte) => TABLE[(sum ^ byte) & 255] ^ (sum >>> 8), -1);

/** A ZIP file, not compressed, as PNGs are. files: [name, base64]. */
export function zip(files) {
  const parts = [], directory = [], names = new Map();
  let at = 0;
  for (const [name, content] of files) {
    const count = (names.get(name) ?? 0) + 1;
    names.set(name, count);
    const label = new TextEncoder().encode(count > 1 ? name.replace(/(\.\w+)$/, `-${count}$1`) : name), data = bytes(content);
    // version, flags (names in UTF-8), method, time, date, CRC, two lengths, length of the name, of what follows it
    const common = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21], [4, crc(data)], [4, data.length], [4, data.length], [2, label.length], [2, 0]];
    const head = packed([[4, 0x04034b50], ...common]);
    parts.push(head, label, data);
    directory.push(packed([[4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, at]]), label);
    at += head.length + label.length + data.length;
  }
  const length = directory.reduce((sum, part) => sum + part.length, 0);
  const end = packed([[4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, length], [4, at], [2, 0]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

const packed = (numbers) => new Uint8Array(numbers.flatMap(([size, value]) => Array.from({ length: size }, (_, i) => (value >>> (8 * i)) & 255)));
