/** A message on the page, and the list of them. */

import { preview } from "./dialogs.js";
import { chip } from "./documents.js";
import { byId, copyButton, count, iconButton, make, plural, seconds, textButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { contentOf, siblings } from "./store.js";

const ENDS = {
  length: "It ended at the limit of “Max tokens”.",
  stopped: "You stopped it here.",
  left: "The page was left before it was complete.",
};
// Nearer to the end than this, the reader is taken along with what is written.
const NEAR = 60;

/** What is known of a run's speed; null for what is not. */
export function stats({ began, first, last, usage, fields }) {
  return {
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
    tokens: usage?.completion_tokens ?? null,
    first: first === null ? null : (first - began) / 1000,
    seconds: first === null ? null : (last - first) / 1000,
    seed: fields.seed,
  };
}

const speed = (value) => (value < 100 ? value.toFixed(1) : count(Math.round(value)));

/** What is known of a reply's speed, in words. */
export function statsText({ prompt, cached, tokens, first, seconds: span }) {
  const parts = [];
  if (tokens !== null) parts.push(plural(tokens, "token"));
  if (first !== null) parts.push(`first after ${seconds(first)}`);
  if (tokens > 1 && span > 0) parts.push(`${speed((tokens - 1) / span)} tokens/s`);
  if (prompt !== null) parts.push(`prompt ${count(prompt)}${cached ? `, ${count(cached)} from cache` : ""}`);
  return parts.join(" · ");
}

/** What is going on before the first word. */
export function stageOf(phase) {
  if (!phase || phase.kind === "writing") return null;
  if (phase.kind === "waiting") return make("span", { text: phase.said });
  if (phase.kind === "sent") return make("span", { class: "breathing", text: "Waiting for the first word" });
  const { done, total, cached } = phase;
  const bar = make("progress", { max: total, value: done, "aria-label": "Prompt read" });
  const known = cached ? `, ${count(cached)} known from before` : "";
  const said = `Reading the prompt: ${count(done)} of ${count(total)} tokens${known}`;
  return make("span", { class: "reading" }, bar, said);
}

class MessageView {
  constructor(conversation, message, actions) {
    Object.assign(this, { conversation, message, actions });
    this.body = make("div", { class: "body" });
    this.stage = make("div", { class: "stage", hidden: true });
    this.notice = make("div", { class: "notice", hidden: true });
    this.tools = make("div", { class: "tools" });
    const mine = message.role === "user";
    const given = { class: `message ${message.role}`, "data-id": message.id, "aria-label": mine ? "You" : "Model" };
    const before = mine && message.documents.length ? [this.documents()] : [];
    const after = mine ? [this.tools] : [this.stage, this.notice, this.tools];
    this.element = make("article", given, ...before, this.body, ...after);
    if (mine) this.body.append(make("p", { text: message.content, dir: "auto" }));
    else this.markdown = new MarkdownView(this.body);
    this.body.hidden = mine && message.content === "";
  }

  documents() {
    const chips = this.message.documents.map((document) => chip(document, { open: () => preview(document, false) }));
    return make("ul", { class: "chips", "aria-label": "Documents" }, ...chips);
  }

  refresh(run) {
    this.markdown?.update(this.message.content);
    const stage = this.message.role === "assistant" ? stageOf(run?.phase) : null;
    this.stage.hidden = !stage;
    if (stage) this.drawStage(stage);
    this.element.setAttribute("aria-busy", run ? "true" : "false");
    if (Boolean(run) !== this.busy) this.drawEnd(run);
    this.busy = Boolean(run);
  }

  // The bar keeps its element, or it would jump instead of gliding.
  drawStage(stage) {
    const [old, fresh] = [this.stage.querySelector("progress"), stage.querySelector("progress")];
    if (old && fresh) {
      old.value = fresh.value;
      fresh.replaceWith(old);
    }
    this.stage.replaceChildren(stage);
  }

  drawEnd(run) {
    const { message } = this;
    const early = message.ended === "stopped" && !message.content;
    const ended = early ? "You stopped it before its first word." : ENDS[message.ended];
    const said = run || message.role === "user" ? null : message.error ?? ended ?? null;
    this.notice.hidden = !said;
    this.notice.classList.toggle("wrong", Boolean(message.error));
    this.notice.replaceChildren(said ?? "");
    if (message.error && !run) this.notice.append(" ", textButton("Try again", () => this.actions.again(message)));
    this.tools.replaceChildren(...(run ? [] : this.buttons()));
  }

  buttons() {
    const { message, actions } = this;
    const copy = copyButton("Copy this message", () => contentOf(message));
    const edit = iconButton("edit", "Change and send again", () => actions.edit(message));
    if (message.role === "user") return [...this.branches(), copy, edit];
    const again = iconButton("again", "Another reply (Alt+R)", () => actions.again(message));
    const stats = message.stats && make("span", { class: "stats", text: statsText(message.stats),
      title: message.stats.seed === null ? null : `Seed ${message.stats.seed}` });
    return [...this.branches(), ...(message.content ? [copy] : []), again, stats || ""];
  }

  branches() {
    const all = siblings(this.conversation, this.message);
    if (all.length < 2) return [];
    const at = all.indexOf(this.message);
    const step = (name, label, by) => iconButton(name, label, () => this.actions.choose(all[at + by], by),
      { disabled: !all[at + by], "data-step": by });
    const told = { text: `${at + 1}/${all.length}`, title: `Version ${at + 1} of ${all.length}` };
    const place = make("span", { class: "branch", ...told });
    return [step("left", "Version before", -1), place, step("right", "Version after", 1)];
  }
}

/** The list of messages. It follows what is written for as long as the reader stays at the end. */
export class Thread {
  constructor(actions) {
    this.scroller = byId("thread");
    this.list = byId("messages");
    this.newest = byId("newest");
    this.actions = actions;
    this.views = new Map();
    this.waiting = new Map();
    this.following = true;
    this.scroller.addEventListener("scroll", () => this.scrolled());
    this.newest.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.settle()).observe(this.scroller);
  }

  show(conversation, messages, run, greeting) {
    this.waiting.clear();
    this.views.clear();
    for (const message of messages) this.views.set(message.id, new MessageView(conversation, message, this.actions));
    for (const [id, view] of this.views) view.refresh(run?.reply.id === id ? run : null);
    this.list.replaceChildren(...(messages.length ? [...this.views.values()].map((view) => view.element) : [greeting]));
    this.toEnd();
  }

  /** Draws a message again with the next frame, once, however many pieces come before it. */
  refresh(message, run) {
    if (!this.views.has(message.id)) return;
    if (!this.waiting.size) requestAnimationFrame(() => this.draw());
    this.waiting.set(message.id, run);
  }

  draw() {
    const waiting = [...this.waiting];
    this.waiting.clear();
    for (const [id, run] of waiting) this.views.get(id)?.refresh(run);
    this.settle();
  }

  /** At once: frames do not come to a page in the background, and the end must be drawn there too. */
  finish(message) {
    this.waiting.delete(message.id);
    this.views.get(message.id)?.refresh(null);
    this.settle();
  }

  /** Dims what a changed message would leave behind on its old branch. */
  dimFrom(message) {
    const ids = [...this.views.keys()];
    const at = message ? ids.indexOf(message.id) : ids.length;
    ids.forEach((id, index) => this.views.get(id).element.classList.toggle("dim", index >= at));
  }

  focusBranch(message, step) {
    const buttons = this.views.get(message.id)?.element.querySelectorAll("[data-step]") ?? [];
    const same = [...buttons].find((button) => Number(button.dataset.step) === step && !button.disabled);
    (same ?? [...buttons].find((button) => !button.disabled))?.focus({ preventScroll: true });
    this.views.get(message.id)?.element.scrollIntoView({ block: "nearest" });
  }

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.following = scrollHeight - scrollTop - clientHeight < NEAR;
    this.newest.hidden = this.following;
  }

  settle() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.scrolled();
  }

  toEnd() {
    this.following = true;
    this.newest.hidden = true;
    this.settle();
  }
}
