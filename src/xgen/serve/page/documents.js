/** Documents: files that are dropped or chosen and long texts that are pasted, with their names and tokens. */

import { countText } from "./api.js";
import { preview } from "./dialogs.js";
import { byId, count, icon, iconButton, make, plural } from "./dom.js";

/** A pasted text from so many characters on becomes a document: about a page, more than fits a text box well. */
export const LONG_PASTE = 3000;
// Far more than any window holds, little enough to be counted at once.
const LARGEST = 16 * 1024 * 1024;

/** A file as a document. Throws an Error that says why it cannot be one. */
export async function documentOf(file) {
  if (file.size > LARGEST) {
    throw new Error(`${file.name} has ${count(file.size)} bytes; at most ${count(LARGEST)} can be attached.`);
  }
  let bytes;
  try {
    bytes = await file.arrayBuffer();
  } catch {
    throw new Error(`${file.name} cannot be read. Folders cannot be attached.`);
  }
  return { name: file.name, text: decoded(bytes, file.name), tokens: null };
}

// The mark that programs put before UTF-16, by its first byte.
const WIDE = { "255,254": "utf-16le", "254,255": "utf-16be" };

function decoded(bytes, name) {
  const mark = new Uint8Array(bytes, 0, Math.min(2, bytes.byteLength)).join();
  try {
    const text = new TextDecoder(WIDE[mark] ?? "utf-8", { fatal: true }).decode(bytes);
    if (!text.includes("\u0000")) return text.replace(/\r\n?/g, "\n");
  } catch {
    // Not text in that encoding: said below.
  }
  throw new Error(`${name} is not a text file in UTF-8 or UTF-16. Save it as plain text first.`);
}

/** Files and pasted texts of the message that is being written. `changed` is called after every change. */
export class Documents {
  constructor(element, { changed, insert, refused }) {
    Object.assign(this, { element, changed, insert, refused, items: [] });
  }

  set(documents) {
    this.items = documents.map((document) => ({ ...document }));
    this.draw();
    this.countMissing();
  }

  countMissing() {
    for (const document of this.items) if (document.tokens === null) this.count(document);
  }

  async addFiles(files) {
    for (const file of files) {
      try {
        this.add(await documentOf(file));
      } catch (error) {
        this.refused(error.message);
      }
    }
  }

  addPasted(text) {
    const numbers = this.items.map(({ name }) => Number(/^Pasted text (\d+)$/.exec(name)?.[1] ?? 0));
    this.add({ name: `Pasted text ${Math.max(0, ...numbers) + 1}`, text, tokens: null });
  }

  add(document) {
    this.items.push(document);
    this.draw();
    this.changed();
    this.count(document);
  }

  async count(document) {
    try {
      document.tokens = await countText(document.text, false);
      document.problem = undefined;
    } catch (error) {
      // The meter tells the same for the whole message; here it is enough not to show a wrong number.
      document.problem = error.message;
    }
    this.draw();
    this.changed();
  }

  remove(document) {
    const at = this.items.indexOf(document);
    this.items.splice(at, 1);
    this.draw();
    this.changed();
    // The focused button is gone; its neighbour is where a reader would expect to be.
    const neighbour = this.element.children[Math.min(at, this.items.length - 1)];
    (neighbour?.querySelector("button") ?? byId("draft")).focus();
  }

  draw() {
    const focused = this.element.contains(globalThis.document.activeElement)
      ? [...this.element.querySelectorAll("button")].indexOf(globalThis.document.activeElement) : -1;
    this.element.hidden = this.items.length === 0;
    this.element.replaceChildren(...this.items.map((document) => chip(document, {
      open: () => this.open(document), remove: () => this.remove(document) })));
    if (focused >= 0) this.element.querySelectorAll("button")[focused]?.focus();
  }

  async open(document) {
    if (!(await preview(document, true))) return;
    this.remove(document);
    this.insert(document.text);
  }
}

function size({ tokens, problem }) {
  if (problem) return "not counted";
  return tokens === null ? "counting…" : plural(tokens, "token");
}

/** A document as a small card: its name, its tokens, and a button that takes it away where `remove` is given. */
export function chip(document, { open, remove }) {
  const name = make("span", { class: "chip-name", text: document.name, dir: "auto" });
  const tokens = make("span", { class: "chip-size", text: size(document), title: document.problem });
  const given = { type: "button", class: "chip-open", title: `Show ${document.name}`, on: { click: open } };
  const body = make("button", given, icon("file"), name, tokens);
  const away = remove && iconButton("close", `Remove ${document.name}`, remove);
  return make("li", { class: "chip" }, body, away);
}
