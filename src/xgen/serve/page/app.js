/** Joins the parts: asks the server what it is, then shows the mode that fits it. */

import { json, mayAskAgain, onKeyNeeded, ServerError, stubbornly } from "./api.js";
import { Chat } from "./chat.js";
import { Complete } from "./complete.js";
import { prepareDrop } from "./composer.js";
import { askKey, prepareDialogs, showShortcuts } from "./dialogs.js";
import { documentOf } from "./documents.js";
import { announce, byId, drawIcons, listen, make, textButton } from "./dom.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { forget, idOfKey, keep } from "./store.js";

const THEMES = { system: "as the system", light: "light", dark: "dark" };
const narrow = window.matchMedia("(max-width: 820px)");

class App {
  constructor() {
    drawIcons();
    prepareDialogs();
    onKeyNeeded(askKey);
    const told = {
      trouble: (said) => this.trouble(said),
      listed: () => this.sidebar?.draw(),
      openSettings: (input) => this.openSettings(input),
    };
    this.settings = new Settings(() => this.settingsChanged());
    this.chat = new Chat(this.settings, told);
    this.complete = new Complete(this.settings, told);
    this.sidebar = new Sidebar(this.chat, { ...told, opened: () => this.opened() });
    this.mode = "chat";
    this.prepareButtons();
    this.prepareTabs();
    listen(window, { keydown: (event) => this.key(event), storage: (event) => this.storedElsewhere(event) });
    prepareDrop((files) => this.dropped(files));
    this.drawTheme();
  }

  async begin() {
    const waiting = (said) => this.banner(said);
    mayAskAgain();
    try {
      this.props = await stubbornly(() => json("props"), { waiting });
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.banner(error.message, textButton("Try again", () => this.begin()));
      return;
    }
    this.banner(null);
    byId("app").classList.toggle("base", !this.props.chat);
    byId("model").textContent = this.props.model;
    document.title = `${this.props.model} · XGen`;
    this.useModel(this.props.model);
    this.settings.begin(this.props);
    this.chat.begin(this.props);
    this.complete.begin(this.props);
    byId("tab-chat").disabled = !this.props.chat;
    byId("tab-chat").title = this.props.chat ? "" : "This model has no chat template: it goes on from a text.";
    this.show(this.props.chat ? "chat" : "complete");
    await this.listModels();
  }

  // Adapters are other names of the same model; with none there is nothing to choose.
  async listModels() {
    const names = (await stubbornly(() => json("v1/models"), { waiting: () => {} })).data.map(({ id }) => id);
    const select = byId("models");
    select.replaceChildren(...names.map((name) => make("option", { value: name, text: name })));
    select.hidden = names.length < 2;
    byId("model").parentElement.hidden = names.length > 1;
    select.value = this.props.model;
    select.addEventListener("change", () => this.useModel(select.value));
  }

  useModel(name) {
    this.chat.model = name;
    this.complete.model = name;
  }

  settingsChanged() {
    this.chat.composer.refuse(null);
    this.complete.refuse(null);
    this.chat.meter.changed();
    this.complete.meter.changed();
  }

  banner(said, ...more) {
    byId("banner").hidden = said === null;
    byId("banner").replaceChildren(...(said === null ? [] : [said, " ", ...more]));
  }

  trouble(said) {
    // Said once, not at every keystroke for as long as the reason lasts.
    if (said === this.lastTrouble) return;
    this.lastTrouble = said;
    byId("trouble").hidden = said === null;
    byId("trouble-text").textContent = said ?? "";
  }

  prepareButtons() {
    const clicks = {
      "open-side": () => this.toggleSide(), "close-side": () => this.toggleSide(false), veil: () => this.closeDrawers(),
      "open-settings": () => this.toggleSettings(), "close-settings": () => this.toggleSettings(false),
      "open-shortcuts": () => showShortcuts(), theme: () => this.nextTheme(),
      "trouble-close": () => { byId("trouble").hidden = true; },
      skip: (event) => { event.preventDefault(); this.box.focus(); },
    };
    for (const [id, click] of Object.entries(clicks)) byId(id).addEventListener("click", click);
  }

  prepareTabs() {
    for (const mode of ["chat", "complete"]) {
      listen(byId(`tab-${mode}`), {
        click: () => this.show(mode),
        keydown: (event) => {
          if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
          this.show(this.mode === "chat" ? "complete" : "chat");
          byId(`tab-${this.mode}`).focus();
        },
      });
    }
  }

  get box() {
    return byId(this.mode === "chat" ? "draft" : "prompt");
  }

  show(mode) {
    if (mode === "chat" && this.props && !this.props.chat) return;
    this.mode = mode;
    for (const name of ["chat", "complete"]) {
      byId(name).hidden = name !== mode;
      byId(`tab-${name}`).setAttribute("aria-selected", String(name === mode));
      byId(`tab-${name}`).tabIndex = name === mode ? 0 : -1;
    }
    byId("system-row").hidden = mode !== "chat";
    if (mode === "chat") this.chat.composer.edited();
    else this.complete.edited();
    // On a phone the focus would call up the keyboard over the page.
    if (!narrow.matches) this.box.focus();
  }

  opened() {
    this.show("chat");
    if (narrow.matches) this.toggleSide(false);
  }

  toggleSide(open = !this.sideOpen) {
    byId("app").classList.toggle(narrow.matches ? "side-open" : "side-closed", narrow.matches ? open : !open);
    this.drawDrawers();
    if (open) byId("new-chat").focus();
    else byId("open-side").focus();
  }

  get sideOpen() {
    const { classList } = byId("app");
    return narrow.matches ? classList.contains("side-open") : !classList.contains("side-closed");
  }

  toggleSettings(open = byId("settings").hidden) {
    byId("settings").hidden = !open;
    this.drawDrawers();
    if (open) byId("close-settings").focus();
    else byId("open-settings").focus();
  }

  openSettings(input) {
    byId("settings").hidden = false;
    this.drawDrawers();
    input.focus();
  }

  drawDrawers() {
    byId("open-side").setAttribute("aria-expanded", String(this.sideOpen));
    byId("open-settings").setAttribute("aria-expanded", String(!byId("settings").hidden));
    const covered = narrow.matches && (this.sideOpen || !byId("settings").hidden);
    byId("veil").hidden = !covered;
    document.querySelector(".middle").inert = covered;
  }

  closeDrawers() {
    if (!byId("settings").hidden) this.toggleSettings(false);
    else if (this.sideOpen) this.toggleSide(false);
  }

  nextTheme() {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % names.length];
    if (next === "system") {
      delete document.documentElement.dataset.theme;
      forget("xgen.theme");
    } else {
      document.documentElement.dataset.theme = next;
      keep("xgen.theme", next);
    }
    this.drawTheme();
    announce(`Colours: ${THEMES[next]}`);
  }

  drawTheme() {
    const label = `Colours: ${THEMES[document.documentElement.dataset.theme ?? "system"]}`;
    byId("theme").title = label;
    byId("theme").setAttribute("aria-label", label);
  }

  async dropped(files) {
    if (this.mode === "chat") {
      await this.chat.composer.documents.addFiles(files);
      this.chat.composer.focus();
      return;
    }
    try {
      const documents = await Promise.all(files.map(documentOf));
      this.complete.insertFiles(documents.map(({ text }) => text));
    } catch (error) {
      this.complete.refuse(error.message);
    }
  }

  storedElsewhere({ key }) {
    const id = idOfKey(key);
    if (id) this.chat.changedElsewhere(id);
    if (id || key?.startsWith("xgen.title.")) this.sidebar.draw();
  }

  key(event) {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") this.escape();
    if (!event.altKey || event.ctrlKey || event.metaKey) return;
    // By the place of the key: with Alt, some keyboards write another letter.
    const actions = {
      KeyN: () => this.sidebar.begin(), KeyH: () => this.toggleSide(), KeyS: () => this.toggleSettings(),
      KeyR: () => (this.mode === "chat" ? this.chat.again() : this.complete.start()), KeyI: () => this.box.focus(),
      KeyK: () => showShortcuts(), KeyM: () => this.show(this.mode === "chat" ? "complete" : "chat"),
      KeyG: () => { if (this.mode === "complete") this.complete.goOn(); },
    };
    const action = actions[event.code];
    if (!action) return;
    event.preventDefault();
    action();
  }

  escape() {
    if (this.complete.strip.open) this.complete.strip.hide();
    else if (narrow.matches && !byId("veil").hidden) this.closeDrawers();
    else if (this.mode === "chat" && this.chat.run) this.chat.stop();
    else if (this.mode === "complete" && this.complete.run) this.complete.stop();
    else if (this.mode === "chat" && this.chat.editing) this.chat.cancelEdit();
    else if (!byId("settings").hidden) this.toggleSettings(false);
  }
}

const app = new App();
narrow.addEventListener("change", () => app.drawDrawers());
app.drawDrawers();
app.begin();
