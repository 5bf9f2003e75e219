/** The Complete tab: a text, what the model writes after it, and how sure it was of every token. */

import { ConnectionLost, ServerError, events, mayAskAgain, open, patiently, streamed } from "./api.js";
import { grow } from "./composer.js";
import { announce, byId, copyText, download, listen } from "./dom.js";
import { stageOf, stats, statsText } from "./message.js";
import { Meter } from "./meter.js";
import { keep, kept } from "./store.js";
import { Alignment, Strip, drawLegend, entriesOf } from "./tokens.js";

const PLACE = "xgen.complete";
const DELAY = 300;
const ALTERNATIVES = 5;
const MOST_UNDONE = 50;

export class Complete {
  constructor(settings, told) {
    Object.assign(this, { settings, told, model: "", run: null, past: [], stats: null });
    this.box = byId("prompt");
    this.strip = new Strip(byId("strip"), (index, text) => this.pick(index, text));
    const prospect = () => ({ content: this.whole });
    this.meter = new Meter(byId("complete-meter"), byId("complete-warning"), { prospect, settings });
    drawLegend(byId("legend"));
    listen(this.box, { input: () => this.edited(), keydown: (event) => this.key(event) });
    const buttons = {
      "run-complete": () => this.start(), "stop-complete": () => this.stop(), "go-on": () => this.goOn(),
      undo: () => this.undo(), "take-in": () => this.takeIn(),
      "copy-complete": () => this.copy(), "export-complete": () => this.export(),
    };
    for (const [id, click] of Object.entries(buttons)) byId(id).addEventListener("click", click);
    window.addEventListener("pagehide", () => this.store());
    this.restore();
  }

  begin(props) {
    this.meter.begin(props.context_length);
    this.draw();
  }

  get whole() {
    return this.box.value + this.strip.text;
  }

  key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      this.start();
    }
  }

  edited() {
    grow(this.box);
    this.refuse(null);
    this.changed();
  }

  changed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.store(), DELAY);
    this.meter.changed();
  }

  async insertFiles(texts) {
    this.box.setRangeText(texts.join("\n"), this.box.selectionStart, this.box.selectionEnd, "end");
    this.edited();
    this.box.focus();
  }

  refuse(message) {
    byId("complete-notice").hidden = message === null;
    byId("complete-notice").textContent = message ?? "";
  }

  /** From the text alone; an earlier continuation can be had back with Undo. */
  start() {
    return this.write(this.box.value, []);
  }

  goOn() {
    return this.write(this.box.value, this.spoken());
  }

  /** Goes on from another token than the one that was drawn. */
  pick(index, text) {
    const entries = this.strip.entries.slice(0, index);
    const old = this.strip.entries[index];
    // The chosen row is gone with its card: the focus goes to where the writing can be stopped.
    byId("run-complete").focus();
    const logprob = old.top.find(([other]) => other === text)?.[1] ?? null;
    return this.write(this.box.value, [...entries, { ...old, token: text, piece: pieceOf(text, old), logprob }]);
  }

  // An end token ends a text; what comes after it was not said by the model to follow.
  spoken() {
    return this.strip.entries.filter(({ piece }, at, all) => piece !== "" || at < all.length - 1);
  }

  async obstacle(content) {
    const wrong = this.settings.check();
    if (wrong) {
      this.told.openSettings(wrong.input);
      return wrong.said;
    }
    return this.meter.obstacle({ content });
  }

  async write(prompt, entries) {
    if (this.run) return;
    mayAskAgain();
    const content = prompt + entries.map(({ piece }) => piece).join("");
    const run = { controller: new AbortController(), fields: this.settings.fields(), alignment: new Alignment() };
    Object.assign(run, { fresh: [], began: null, first: null, last: null, usage: null });
    this.run = run;
    this.draw();
    try {
      const said = await this.obstacle(content);
      this.refuse(said && `Nothing was sent. ${said}`);
      if (said === null) await this.receive(run, content, entries);
    } catch (error) {
      this.failed(error);
    } finally {
      this.over(run);
    }
  }

  async receive(run, content, entries) {
    const { signal } = run.controller;
    this.remember();
    this.strip.set(entries);
    this.stats = null;
    this.draw();
    announce("The model is writing");
    run.began = performance.now();
    const body = { ...streamed(this.model, run.fields), prompt: content, logprobs: ALTERNATIVES };
    const waiting = (said) => this.stage({ kind: "waiting", said });
    const response = await patiently(() => open("v1/completions", body, signal), { signal, waiting });
    this.stage({ kind: "sent" });
    for await (const event of events(response)) this.take(run, event);
  }

  take(run, event) {
    const choice = event.choices?.[0];
    if (event.usage) run.usage = event.usage;
    if (event.prompt_progress && run.first === null) this.stage({ kind: "reading", ...event.prompt_progress });
    if (!choice || (!choice.text && !choice.logprobs)) return;
    run.last = performance.now();
    run.first ??= run.last;
    const named = choice.logprobs ? entriesOf(choice.logprobs) : [];
    if (!run.fresh.length) requestAnimationFrame(() => this.flush(run));
    run.fresh.push(...run.alignment.take(choice.text, named));
    this.stage(null);
  }

  flush(run) {
    const fresh = run.fresh.splice(0);
    this.strip.add(fresh);
    byId("strip-hint").hidden = this.strip.entries.length > 0;
  }

  failed(error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ServerError || error instanceof ConnectionLost)) throw error;
    this.refuse(error.message);
  }

  over(run) {
    this.run = null;
    run.fresh.push(...run.alignment.rest());
    this.flush(run);
    if (run.first !== null) this.stats = stats(run);
    this.stage(null);
    this.draw();
    this.changed();
    if (run.began !== null) announce("The continuation is complete");
  }

  stop() {
    this.run?.controller.abort();
  }

  stage(phase) {
    const place = byId("complete-stage");
    const shown = phase && stageOf(phase);
    place.hidden = !shown;
    place.replaceChildren(shown ?? "");
  }

  draw() {
    const running = Boolean(this.run);
    const hadFocus = [byId("run-complete"), byId("stop-complete")].includes(document.activeElement);
    byId("run-complete").hidden = running;
    byId("stop-complete").hidden = !running;
    if (hadFocus) byId(running ? "stop-complete" : "run-complete").focus();
    const empty = this.strip.entries.length === 0;
    for (const id of ["go-on", "take-in"]) byId(id).disabled = running || empty;
    byId("undo").disabled = running || this.past.length === 0;
    byId("strip-hint").hidden = !empty;
    byId("complete-stats").textContent = this.stats ? `${statsText(this.stats)}${this.surprise()}` : "";
  }

  surprise() {
    const known = this.strip.entries.filter(({ logprob }) => logprob !== null);
    if (!known.length) return "";
    const mean = known.reduce((sum, { logprob }) => sum + logprob, 0) / known.length;
    return ` · perplexity ${Math.exp(-mean).toFixed(2)}`;
  }

  remember() {
    this.past.push({ prompt: this.box.value, entries: this.strip.entries, stats: this.stats });
    if (this.past.length > MOST_UNDONE) this.past.shift();
  }

  undo() {
    const { prompt, entries, stats: before } = this.past.pop();
    this.box.value = prompt;
    this.stats = before;
    this.strip.set(entries);
    this.edited();
    this.draw();
    (byId("undo").disabled ? this.box : byId("undo")).focus();
  }

  takeIn() {
    this.remember();
    this.box.value = this.whole;
    this.strip.set([]);
    this.stats = null;
    this.edited();
    this.draw();
    this.box.focus();
  }

  async copy() {
    announce((await copyText(this.whole)) ? "Copied" : "The browser refused to copy");
  }

  export() {
    const tokens = this.strip.entries.map(({ token, piece, logprob, top }) => ({ token, text: piece, logprob, top }));
    const head = { format: "xgen-completion", version: 1, model: this.model, exported: new Date().toISOString() };
    const file = { ...head, prompt: this.box.value, text: this.strip.text, stats: this.stats, tokens };
    download("completion.json", JSON.stringify(file, null, 2));
  }

  store() {
    clearTimeout(this.timer);
    const whole = { prompt: this.box.value, entries: this.strip.entries, stats: this.stats };
    const trouble = keep(PLACE, JSON.stringify(whole));
    // The alternatives of a long text may find no room; the text itself then still does.
    if (trouble) this.told.trouble(keep(PLACE, JSON.stringify({ prompt: this.whole, entries: [], stats: null })));
  }

  restore() {
    try {
      const { prompt, entries, stats: before } = JSON.parse(kept(PLACE));
      this.box.value = prompt;
      this.strip.set(entries);
      this.stats = before;
      grow(this.box);
    } catch {
      // Nothing was kept, or nothing that can be read.
    }
  }
}

// The first word of a text may have lost the space that its token's name begins with; so then does another word there.
function pieceOf(text, old) {
  const trimmed = old.token.startsWith(" ") && old.piece === old.token.slice(1);
  return trimmed && text.startsWith(" ") ? text.slice(1) : text;
}
