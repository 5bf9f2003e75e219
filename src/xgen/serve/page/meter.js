/** The context meter: how much of the window prompt and reply may take, counted by the server as one types. */

import { ConnectionLost, ServerError, countMessages, countText } from "./api.js";
import { count, make, textButton } from "./dom.js";

const DELAY = 250;
const NEARLY = 0.9;
// A server that does not count for these reasons would not reply for them either, and there the page waits or asks.
const PASSING = [401, 429, 503];

/** `prospect()` is what would be sent: {messages} or {content}, with `least`, tokens known to be in it at least. */
export class Meter {
  constructor(element, warning, { prospect, settings }) {
    Object.assign(this, { warning, prospect, settings, window: 0, prompt: 0, problem: null });
    this.text = make("span", { class: "meter-text" });
    this.used = make("span", { class: "meter-used" });
    this.room = make("span", { class: "meter-room" });
    this.bar = make("span", { class: "meter-bar", "aria-hidden": "true" }, this.used, this.room);
    element.append(make("div", { class: "meter" }, this.bar, this.text));
    this.key = null;
  }

  begin(window) {
    this.window = window;
    this.changed();
  }

  /** Counts again a moment after the last change; the limits are drawn at once. */
  changed() {
    clearTimeout(this.timer);
    if (!this.window) return;
    this.draw(true);
    this.timer = setTimeout(() => this.exact().catch(() => {}), DELAY);
  }

  /** Counts what would be sent now and shows it. A newer question ends an older one, which then throws AbortError. */
  async exact() {
    clearTimeout(this.timer);
    const asked = this.prospect();
    const key = JSON.stringify(asked);
    if (this.key !== key) this.begins(asked, key);
    try {
      this.prompt = await this.answer;
      this.problem = null;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      this.problem = error.message;
    }
    this.draw(false);
  }

  begins(asked, key) {
    this.asking?.abort();
    this.asking = new AbortController();
    const answer = this.ask(asked, this.asking.signal);
    Object.assign(this, { key, answer });
    answer.catch(() => { if (this.answer === answer) this.key = null; });
  }

  /** The count of exactly this, whatever is typed meanwhile. Throws what the server throws. */
  countOf(asked) {
    return this.key === JSON.stringify(asked) ? this.answer : this.ask(asked);
  }

  ask({ messages, content, least = 0 }, signal) {
    // Documents already counted that fill the window by themselves need not be sent again to know that it is too much.
    if (least > this.window) return Promise.resolve(least);
    if (content !== undefined) return content === "" ? Promise.resolve(0) : countText(content, true, signal);
    return messages.length ? countMessages(messages, signal) : Promise.resolve(0);
  }

  /** Why this must not be sent, in words, or null. Throws AbortError alone. */
  async obstacle(asked) {
    try {
      return this.refusal(await this.countOf(asked))?.brief ?? null;
    } catch (error) {
      if (error instanceof ConnectionLost || PASSING.includes(error.status)) return null;
      if (error instanceof ServerError) return `The server does not take this: ${error.message}`;
      throw error;
    }
  }

  /** What is wrong with a prompt of so many tokens, or null: {said, brief, room}; `room` is left for a reply. */
  refusal(prompt) {
    const reply = this.settings.maxTokens;
    const over = prompt + reply - this.window;
    if (over <= 0) return null;
    const room = this.window - prompt;
    const window = `the window of ${count(this.window)}`;
    const sum = `The prompt has ${count(prompt)} tokens and the reply may take ${count(reply)}: ` +
      `${count(prompt + reply)} in all, ${count(over)} more than ${window}.`;
    const lower = room > 0 ? `, or lower “Max tokens” to ${count(room)}` : "";
    const brief = `${count(prompt)} tokens of prompt and up to ${count(reply)} of reply do not fit ${window}.`;
    return { said: `${sum} Shorten the prompt${lower}.`, brief, room };
  }

  draw(counting) {
    const reply = this.settings.maxTokens;
    const share = (value) => `${Math.min(100, (100 * value) / this.window).toFixed(2)}%`;
    this.used.style.setProperty("inline-size", share(this.prompt));
    this.room.style.setProperty("inline-size", share(Math.min(reply, Math.max(0, this.window - this.prompt))));
    const total = this.prompt + reply;
    const fits = total > NEARLY * this.window ? "near" : "fine";
    this.bar.parentElement.dataset.state = total > this.window ? "over" : fits;
    this.bar.parentElement.classList.toggle("counting", counting);
    this.text.textContent = `${count(this.prompt)} / ${count(this.window)} tokens`;
    this.text.title = `${count(this.prompt)} tokens would be read and up to ${count(reply)} written.`;
    this.warn(total);
  }

  warn(total) {
    const refusal = this.refusal(this.prompt);
    const near = !refusal && total > NEARLY * this.window;
    const left = this.window - total;
    const full = left ? `${count(left)} more tokens fill the window.` : "Prompt and reply fill the window exactly.";
    const fault = this.problem && `The tokens could not be counted: ${this.problem}`;
    const text = fault ?? refusal?.said ?? (near ? full : "");
    // Set only when it changed: each change is read out by screen readers.
    if (this.warning.dataset.said === text) return;
    this.warning.dataset.said = text;
    this.warning.hidden = text === "";
    this.warning.classList.toggle("wrong", Boolean(refusal));
    this.warning.replaceChildren(text);
    if (refusal && refusal.room > 0) this.warning.append(" ", this.fitButton(refusal.room));
  }

  fitButton(room) {
    return textButton(`Set max tokens to ${count(room)}`, () => this.settings.setMaxTokens(room));
  }
}
