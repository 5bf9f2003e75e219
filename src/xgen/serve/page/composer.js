/** The box one writes in: text, documents, what is typed, pasted or dropped, and a draft that outlives the page. */

import { Documents, LONG_PASTE } from "./documents.js";
import { byId, listen } from "./dom.js";
import { forget, keep, kept } from "./store.js";

const PLACE = "xgen.draft";
const DELAY = 300;

export class Composer {
  constructor({ send, changed, recall }) {
    this.box = byId("draft");
    this.changed = changed;
    this.documents = new Documents(byId("documents"), {
      changed: () => this.edited(),
      insert: (text) => this.insert(text),
      refused: (message) => this.refuse(message),
    });
    listen(this.box, {
      input: () => this.edited(),
      paste: (event) => this.pasted(event),
      keydown: (event) => this.key(event, send, recall),
    });
    listen(byId("composer"), { submit: (event) => { event.preventDefault(); send(); } });
    this.prepareFiles();
    window.addEventListener("pagehide", () => this.store());
  }

  prepareFiles() {
    const files = byId("attach-files");
    byId("attach").addEventListener("click", () => files.click());
    files.addEventListener("change", async () => {
      await this.documents.addFiles([...files.files]);
      // Otherwise choosing the same file again would change nothing.
      files.value = "";
      this.focus();
    });
  }

  key(event, send, recall) {
    // While a character is composed (Chinese, Japanese, Korean), Enter ends the composition.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && this.empty) {
      event.preventDefault();
      recall();
    }
  }

  pasted(event) {
    const files = [...event.clipboardData.files];
    const text = event.clipboardData.getData("text/plain");
    if (files.length && !text) {
      event.preventDefault();
      this.documents.addFiles(files);
    } else if (text.length >= LONG_PASTE) {
      event.preventDefault();
      this.documents.addPasted(text.replace(/\r\n?/g, "\n"));
    }
  }

  insert(text) {
    this.focus();
    this.box.setRangeText(text, this.box.selectionStart, this.box.selectionEnd, "end");
    this.edited();
  }

  get empty() {
    return this.box.value === "" && this.documents.items.length === 0;
  }

  get draft() {
    const documents = this.documents.items.map(({ name, text, tokens }) => ({ name, text, tokens }));
    return { content: this.box.value, documents };
  }

  set draft({ content, documents }) {
    this.box.value = content;
    this.documents.set(documents);
    this.edited();
  }

  clear() {
    this.draft = { content: "", documents: [] };
  }

  focus() {
    this.box.focus();
  }

  edited() {
    grow(this.box);
    this.refuse(null);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.store(), DELAY);
    this.changed();
  }

  /** Why nothing was sent or attached; null takes it away. */
  refuse(message) {
    byId("notice").hidden = message === null;
    byId("notice").textContent = message ?? "";
  }

  store() {
    clearTimeout(this.timer);
    if (this.empty) {
      forget(PLACE);
      return;
    }
    // Where documents find no room, what was typed by hand still does.
    const trouble = keep(PLACE, JSON.stringify(this.draft));
    if (trouble) keep(PLACE, JSON.stringify({ content: this.box.value, documents: [] }));
  }

  restore() {
    try {
      const { content, documents } = JSON.parse(kept(PLACE));
      if (typeof content === "string" && Array.isArray(documents)) this.draft = { content, documents };
    } catch {
      // No draft, or none that can be read.
    }
  }
}

/** As tall as its text; the stylesheet says how tall at most. */
export function grow(box) {
  box.style.blockSize = "auto";
  box.style.blockSize = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
}

/** Takes files that are dropped anywhere on the page. */
export function prepareDrop(take) {
  const veil = byId("drop");
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  // Entering a child fires "leave" for its parent: only the balance says whether the pointer is still here.
  let inside = 0;
  const show = (step) => {
    inside = Math.max(0, inside + step);
    veil.hidden = inside === 0;
  };
  listen(window, {
    dragenter: (event) => { if (hasFiles(event)) show(1); },
    dragleave: (event) => { if (hasFiles(event)) show(-1); },
    dragover: (event) => { if (hasFiles(event)) event.preventDefault(); },
    drop: (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      inside = 0;
      show(0);
      take([...event.dataTransfer.files]);
    },
  });
}
