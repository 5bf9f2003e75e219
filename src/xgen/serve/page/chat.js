/** The chat: what is sent and when, replies as they come in, their end however it comes, and branches. */

import { ConnectionLost, ServerError, countText, events, mayAskAgain, open, patiently, streamed } from "./api.js";
import { Composer } from "./composer.js";
import { announce, byId, count, make, textButton } from "./dom.js";
import { Thread, stats } from "./message.js";
import { Meter } from "./meter.js";
import { add, choose, forServer, keep, kept, load, newConversation } from "./store.js";
import { parentOf, path, pathTo, reread, save } from "./store.js";

const SYSTEM = "xgen.system";
const EXAMPLES = [
  "Explain how tides work, in five sentences.",
  "Write a limerick about a patient compiler.",
  "What should I ask about a long document?",
];
// Often enough to lose little when the browser dies, seldom enough not to be felt.
const SAVE_MILLISECONDS = 2000;
const LEAVING_MILLISECONDS = 5000;

export class Chat {
  /** `told` has what the page says elsewhere: {trouble(text or null), listed(), openSettings()}. */
  constructor(settings, told) {
    Object.assign(this, { settings, told, model: "", runs: new Map(), forgotten: new Set(), leaving: -Infinity });
    Object.assign(this, { editing: null, stash: null });
    this.thread = new Thread({
      again: (message) => this.again(message),
      edit: (message) => this.edit(message),
      choose: (message, step) => this.choose(message, step),
    });
    this.meter = new Meter(byId("chat-meter"), byId("chat-warning"), { prospect: () => this.prospect(), settings });
    this.composer = new Composer({
      send: () => this.send(),
      changed: () => this.meter.changed(),
      recall: () => this.recall(),
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("cancel-edit").addEventListener("click", () => this.cancelEdit());
    byId("system").addEventListener("input", () => this.systemChanged());
    // Browsers cut a stream when the page is left, before they say that it is left: not a fault of the connection.
    window.addEventListener("beforeunload", () => { this.leaving = performance.now(); });
    window.addEventListener("pagehide", () => { for (const run of this.runs.values()) save(run.conversation); });
    this.conversation = newConversation(kept(SYSTEM) ?? "");
    // Before the model is there: whoever goes on writing while it loads must not find the text replaced.
    this.composer.restore();
  }

  begin(props) {
    this.props = props;
    this.meter.begin(props.context_length);
    this.composer.documents.countMissing();
    this.show(this.conversation);
  }

  get run() {
    return this.runs.get(this.conversation.id) ?? null;
  }

  /** Shows a conversation; null begins a new one. What is in the box stays there. */
  show(conversation) {
    if (this.editing) this.cancelEdit();
    this.conversation = conversation ?? newConversation(kept(SYSTEM) ?? "");
    byId("system").value = this.conversation.system;
    this.draw();
    this.told.listed();
  }

  draw() {
    this.thread.show(this.conversation, path(this.conversation), this.run, this.greeting());
    this.drawButtons();
    this.meter.changed();
  }

  drawButtons() {
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = Boolean(this.run);
    byId("stop").hidden = !this.run;
    if (hadFocus) (this.run ? byId("stop") : byId("draft")).focus();
  }

  greeting() {
    const { model = "", parameters, context_length: window = 0 } = this.props ?? {};
    const size = parameters ? `${compact(parameters)} parameters, ` : "";
    const about = `${size}a window of ${count(window)} tokens. Conversations stay in this browser.`;
    const use = (text) => () => {
      this.composer.draft = { content: text, documents: this.composer.draft.documents };
      this.composer.focus();
    };
    return make("div", { class: "greeting" }, make("p", { class: "over", text: model }),
      make("p", { class: "lead", text: "Ask something, or drop a document here." }),
      make("p", { class: "hint", text: about }),
      make("div", { class: "examples" }, ...EXAMPLES.map((text) => textButton(text, use(text)))));
  }

  /** What sending now would give the model. */
  prospect() {
    const { conversation, editing, composer: { draft } } = this;
    const before = editing ? pathTo(conversation, parentOf(conversation, editing)) : path(conversation);
    const messages = this.composer.empty ? before : [...before, { role: "user", ...draft }];
    return this.asked(messages);
  }

  asked(messages) {
    const least = messages.flatMap((message) => message.documents).reduce((sum, { tokens }) => sum + (tokens ?? 0), 0);
    return { messages: forServer(this.conversation.system, messages), least };
  }

  systemChanged() {
    this.conversation.system = byId("system").value;
    keep(SYSTEM, this.conversation.system);
    if (this.conversation.messages.length) this.save(this.conversation);
    this.meter.changed();
  }

  save(conversation) {
    if (this.forgotten.has(conversation.id)) return;
    this.told.trouble(save(conversation));
    this.told.listed();
  }

  /** Why nothing may be sent now, or null; counts the prompt, which is the only thing that takes time here. */
  async obstacle(messages) {
    const wrong = this.settings.check();
    if (wrong) {
      this.told.openSettings(wrong.input);
      return wrong.said;
    }
    return this.meter.obstacle(this.asked(messages));
  }

  async send() {
    if (this.run) {
      announce("A reply is being written. Escape stops it.");
      return;
    }
    if (!this.props) {
      this.composer.refuse("The model is not there yet. Your message stays here.");
      return;
    }
    const { draft } = this.composer;
    if (this.checking || (draft.content.trim() === "" && draft.documents.length === 0)) return;
    const { conversation, editing } = this;
    const parent = editing ? parentOf(conversation, editing) : path(conversation).at(-1) ?? null;
    if (await this.refused([...pathTo(conversation, parent), { role: "user", ...draft }])) return;
    if (this.conversation !== conversation || this.run) return;
    const message = add(conversation, parent, { role: "user", ...draft });
    this.editing = null;
    this.leaveEdit();
    this.reply(conversation, message);
  }

  async refused(messages) {
    mayAskAgain();
    this.checking = true;
    byId("composer").classList.add("checking");
    // What was checked must be what is sent.
    byId("draft").readOnly = true;
    try {
      const said = await this.obstacle(messages);
      this.composer.refuse(said && `Nothing was sent. ${said}`);
      return said !== null;
    } catch (error) {
      if (error.name === "AbortError") return true;
      throw error;
    } finally {
      this.checking = false;
      byId("draft").readOnly = false;
      byId("composer").classList.remove("checking");
    }
  }

  /** Another reply to the same message. One that failed before its first word is not kept beside the new one. */
  async again(message = path(this.conversation).findLast(({ role }) => role === "assistant")) {
    if (!message || this.run || this.checking) return;
    const { conversation } = this;
    const parent = parentOf(conversation, message);
    if (await this.refused(pathTo(conversation, parent))) return;
    if (this.conversation !== conversation || this.run) return;
    if (message.content === "") conversation.messages.splice(conversation.messages.indexOf(message), 1);
    this.reply(conversation, parent);
    byId("draft").focus();
  }

  edit(message) {
    if (this.run) return;
    this.stash ??= this.composer.draft;
    this.editing = message;
    this.composer.draft = { content: message.content, documents: message.documents };
    this.drawEditing();
    this.composer.focus();
  }

  cancelEdit() {
    this.editing = null;
    this.leaveEdit();
    this.composer.focus();
  }

  /** Gives back what was being written before an earlier message was changed, or an empty box. */
  leaveEdit() {
    this.composer.draft = this.stash ?? { content: "", documents: [] };
    this.stash = null;
    this.drawEditing();
  }

  drawEditing() {
    byId("editing").hidden = !this.editing;
    this.thread.dimFrom(this.editing);
    this.meter.changed();
  }

  recall() {
    const last = path(this.conversation).findLast(({ role }) => role === "user");
    if (last) this.edit(last);
  }

  choose(message, step) {
    if (this.run) return;
    if (this.editing) this.cancelEdit();
    choose(this.conversation, message);
    this.save(this.conversation);
    this.draw();
    this.thread.focusBranch(message, step);
  }

  stop() {
    this.run?.controller.abort();
  }

  /** A deleted conversation must not come back when its reply ends. */
  forget(id) {
    this.runs.delete(id);
    this.forgotten.add(id);
  }

  /** Another tab has stored something newer. */
  changedElsewhere(id) {
    if (this.runs.has(id) || this.editing) return;
    reread(id);
    if (id === this.conversation.id) this.show(load(id));
  }

  async reply(conversation, parent) {
    const reply = add(conversation, parent, { role: "assistant", content: "", ended: null, error: null, stats: null });
    const [began, fields] = [performance.now(), this.settings.fields()];
    const run = { conversation, reply, fields, controller: new AbortController(), phase: { kind: "sent" } };
    Object.assign(run, { began, saved: began, first: null, last: null, usage: null });
    this.runs.set(conversation.id, run);
    this.save(conversation);
    this.draw();
    announce("The model is writing");
    try {
      await this.receive(run, forServer(conversation.system, pathTo(conversation, parent)));
    } catch (error) {
      failed(reply, error);
      const leaving = performance.now() - this.leaving < LEAVING_MILLISECONDS;
      if (leaving && reply.ended === "lost") Object.assign(reply, { ended: "left", error: null });
    } finally {
      this.runs.delete(conversation.id);
      reply.stats = stats(run);
      this.over(run);
    }
    await this.countStopped(run);
  }

  async receive(run, messages) {
    const { signal } = run.controller;
    const body = { ...streamed(this.model, run.fields), messages };
    const waiting = (said) => this.phase(run, { kind: "waiting", said });
    const response = await patiently(() => open("v1/chat/completions", body, signal), { signal, waiting });
    this.phase(run, { kind: "sent" });
    for await (const event of events(response)) this.take(run, event);
    run.reply.ended ??= "stop";
  }

  take(run, event) {
    const choice = event.choices?.[0];
    if (event.usage) run.usage = event.usage;
    if (event.prompt_progress && run.first === null) this.phase(run, { kind: "reading", ...event.prompt_progress });
    if (choice?.delta?.content) this.write(run, choice.delta.content);
    if (choice?.finish_reason) run.reply.ended = choice.finish_reason;
  }

  write(run, text) {
    run.last = performance.now();
    run.first ??= run.last;
    run.reply.content += text;
    if (run.last - run.saved > SAVE_MILLISECONDS) {
      run.saved = run.last;
      this.save(run.conversation);
    }
    this.phase(run, { kind: "writing" });
  }

  phase(run, phase) {
    run.phase = phase;
    this.thread.refresh(run.reply, run);
  }

  over(run) {
    run.conversation.updated = Date.now();
    this.save(run.conversation);
    this.thread.finish(run.reply);
    if (run.conversation === this.conversation) {
      this.drawButtons();
      this.meter.changed();
    }
    const { ended, error, stats: { tokens } } = run.reply;
    const complete = tokens === null ? "The reply is complete" : `The reply is complete: ${count(tokens)} tokens`;
    announce(error ?? (ended === "stopped" ? "Stopped" : complete));
  }

  // The counts come with the end of a stream, which a stopped one does not have.
  async countStopped(run) {
    const { reply } = run;
    if (reply.stats.tokens !== null || !reply.content) return;
    try {
      reply.stats.tokens = await countText(reply.content, false);
    } catch (error) {
      if (error instanceof ServerError || error instanceof ConnectionLost) return;
      throw error;
    }
    this.save(run.conversation);
    const view = this.thread.views.get(reply.id);
    if (view && !this.runs.has(run.conversation.id)) view.drawEnd(null);
  }
}

function failed(reply, error) {
  if (error.name === "AbortError") {
    reply.ended = "stopped";
    return;
  }
  if (!(error instanceof ServerError || error instanceof ConnectionLost)) throw error;
  reply.ended = error instanceof ConnectionLost ? "lost" : "error";
  reply.error = error.message;
}

function compact(value) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}
