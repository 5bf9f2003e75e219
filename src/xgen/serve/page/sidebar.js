/** The list of conversations: open, rename, delete; export and import. */

import { confirmed } from "./dialogs.js";
import { announce, byId, download, iconButton, listen, make } from "./dom.js";
import { exported, imported, list, load, remove, save } from "./store.js";

const UNNAMED = "Untitled";

export class Sidebar {
  /** `chat` shows conversations; `told` has {trouble(text or null), opened()}. */
  constructor(chat, told) {
    Object.assign(this, { chat, told, renaming: null });
    this.list = byId("conversations");
    byId("new-chat").addEventListener("click", () => this.begin());
    byId("export").addEventListener("click", () => this.export());
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.import(event.target));
  }

  begin() {
    this.chat.show(null);
    this.told.opened();
    this.chat.composer.focus();
  }

  draw() {
    // A field that is being typed in must not be swept away by a reply that ends meanwhile.
    if (this.renaming) return;
    const all = list();
    const rows = all.map(({ id, title }) => [id, title, this.chat.runs.has(id)]);
    const shown = JSON.stringify([rows, this.chat.conversation.id]);
    byId("export").disabled = this.chat.conversation.messages.length === 0;
    // Drawn anew only when it changed: the focus may be in it.
    if (shown === this.shown) return;
    this.shown = shown;
    this.list.replaceChildren(...all.map((entry) => this.row(entry)));
    byId("no-conversations").hidden = all.length > 0;
  }

  row({ id, title }) {
    const name = title || UNNAMED;
    const current = id === this.chat.conversation.id ? "true" : null;
    const busy = this.chat.runs.has(id);
    const given = { type: "button", class: "conversation-open", "aria-current": current, title: name, dir: "auto" };
    const shown = make("span", { class: busy ? "busy" : null, text: name });
    const opener = make("button", { ...given, on: { click: () => this.open(id) } }, shown);
    const rename = iconButton("edit", `Rename ${name}`, () => this.rename(id));
    const remove = iconButton("remove", `Delete ${name}`, () => this.remove(id, name));
    return make("li", { class: "conversation", "data-id": id }, opener, rename, remove);
  }

  open(id) {
    const conversation = load(id);
    if (!conversation) {
      this.told.trouble("This conversation cannot be read any more. Another tab may have deleted it.");
      this.draw();
      return;
    }
    this.chat.show(conversation);
    this.told.opened();
    this.chat.composer.focus();
  }

  rowOf(id) {
    return [...this.list.children].find((row) => row.dataset.id === id);
  }

  rename(id) {
    const conversation = load(id);
    if (!conversation) return this.draw();
    const field = make("input", { type: "text", "aria-label": "New name", maxlength: "200" });
    field.value = conversation.title;
    this.renaming = id;
    const end = (keep) => this.renamed(conversation, keep ? field.value.trim() : conversation.title);
    listen(field, {
      keydown: (event) => {
        if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
        event.preventDefault();
        event.stopPropagation();
        end(event.key === "Enter");
      },
      blur: () => { if (this.renaming) end(true); },
    });
    this.rowOf(id).replaceChildren(field);
    field.select();
    return field.focus();
  }

  renamed(conversation, title) {
    Object.assign(this, { renaming: null, shown: null });
    conversation.title = title || conversation.title;
    this.told.trouble(save(conversation));
    this.draw();
    this.rowOf(conversation.id)?.querySelector("button").focus();
  }

  async remove(id, name) {
    if (!(await confirmed(`Delete “${name}”?`))) {
      this.rowOf(id)?.querySelector("button").focus();
      return;
    }
    this.chat.runs.get(id)?.controller.abort();
    this.chat.forget(id);
    remove(id);
    if (this.chat.conversation.id === id) this.chat.show(null);
    else this.draw();
    announce(`${name} was deleted`);
    (this.list.querySelector("button") ?? byId("new-chat")).focus();
  }

  export() {
    const { conversation } = this.chat;
    const name = (conversation.title || UNNAMED).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
    download(`${name || "conversation"}.json`, exported(conversation, this.chat.model));
  }

  async import(input) {
    const [file] = input.files;
    if (!file) return;
    const text = await file.text();
    input.value = "";
    try {
      const conversation = imported(text);
      this.told.trouble(save(conversation));
      this.chat.show(conversation);
      this.told.opened();
    } catch (error) {
      this.told.trouble(`${file.name} cannot be imported: ${error.message}.`);
    }
  }
}
