/** Conversations: trees of messages, since an edit or a second reply branches; and their place in the browser. */

const BODY = "xgen.conversation.";
const TITLE = "xgen.title.";
const FORMAT = "xgen-conversation";
const LONGEST_TITLE = 60;
const ENDS = ["stop", "length", "stopped", "left", "lost", "error"];

// What newId makes. Any other id is a stranger's, and may mean something here.
const OWN_ID = /^[0-9a-f]{20}$/;

// What this page has open. Also the only place of what the storage has no room for.
const held = new Map();

/** A new name. Not randomUUID: browsers offer that only to pages that came over HTTPS or from this machine. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(10)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system, messages: [], chosen: {} };
}

/** Adds a message under `parent` (null: at the beginning) and makes its branch the one that is shown. */
export function add(conversation, parent, fields) {
  const message = { id: newId(), parent: parent?.id ?? null, made: Date.now(), documents: [], ...fields };
  conversation.messages.push(message);
  choose(conversation, message);
  conversation.updated = message.made;
  if (!conversation.title && message.role === "user") conversation.title = titleOf(message);
  return message;
}

function titleOf(message) {
  const line = message.content.trim().split("\n")[0] || message.documents[0]?.name || "";
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1)}…` : line;
}

// Where `chosen` has the choice among the first messages; no OWN_ID.
const BEGINNING = "first";

export function choose(conversation, message) {
  conversation.chosen[message.parent ?? BEGINNING] = message.id;
}

/** The messages that stand beside this one, itself among them, oldest first. */
export function siblings(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent);
}

export function parentOf(conversation, message) {
  return conversation.messages.find((other) => other.id === message.parent) ?? null;
}

/** The branch that is shown, from the first message on. */
export function path(conversation) {
  const children = new Map();
  for (const message of conversation.messages) {
    if (!children.has(message.parent)) children.set(message.parent, []);
    children.get(message.parent).push(message);
  }
  const shown = [];
  for (let parent = null; children.has(parent); parent = shown.at(-1).id) {
    const here = children.get(parent);
    shown.push(here.find((message) => message.id === conversation.chosen[parent ?? BEGINNING]) ?? here.at(-1));
  }
  return shown;
}

/** The branch up to and with `message`. */
export function pathTo(conversation, message) {
  const found = [];
  for (let at = message; at; at = parentOf(conversation, at)) found.unshift(at);
  return found;
}

/** What the model is given of a message: its documents first, so that the question stands next to the answer. */
export function contentOf({ content, documents }) {
  const texts = documents.map(({ name, text }) => `Document: ${name}\n\n${text.trimEnd()}\n\n---\n\n`);
  return texts.join("") + content;
}

/** Messages as the server takes them. A reply that failed before its first word says nothing and is left out. */
export function forServer(system, messages) {
  const told = messages.filter((message) => message.role === "user" || message.content !== "");
  const rest = told.map((message) => ({ role: message.role, content: contentOf(message) }));
  return system.trim() ? [{ role: "system", content: system }, ...rest] : rest;
}

function explain(error) {
  if (error.name === "QuotaExceededError" || error.name === "NS_ERROR_DOM_QUOTA_REACHED") {
    return "This browser's storage for the page is full. What you see is kept only until you close the page: " +
      "export it, or delete older conversations to make room.";
  }
  return "This browser does not let the page store anything: conversations are kept only until you close it. " +
    "Export what you need.";
}

/** Stores a text under a name; the reason in words when it could not, null when it could. */
export function keep(name, text) {
  try {
    localStorage.setItem(name, text);
    return null;
  } catch (error) {
    return explain(error);
  }
}

export function kept(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

export function forget(name) {
  try {
    localStorage.removeItem(name);
  } catch {
    // Nothing can have been stored either.
  }
}

/** Keeps a conversation; the reason in words when it could not be stored, null when it could. */
export function save(conversation) {
  held.set(conversation.id, conversation);
  const { id, title, updated } = conversation;
  return keep(BODY + id, JSON.stringify(conversation)) ?? keep(TITLE + id, JSON.stringify({ title, updated }));
}

export function remove(id) {
  held.delete(id);
  forget(BODY + id);
  forget(TITLE + id);
}

/** Drops this page's copy, so that the next `load` reads what another tab has stored. */
export function reread(id) {
  held.delete(id);
}

export const idOfKey = (key) => (key?.startsWith(BODY) ? key.slice(BODY.length) : null);

/** Names of the conversations, newest first. Titles lie apart from the texts: the list need not read every text. */
export function list() {
  const found = new Map();
  for (const [id, { title, updated }] of held) found.set(id, { id, title, updated });
  for (const name of storedNames()) {
    const id = name.slice(TITLE.length);
    if (!found.has(id)) found.set(id, { id, ...readTitle(name) });
  }
  return [...found.values()].sort((one, other) => other.updated - one.updated);
}

function storedNames() {
  try {
    return Object.keys(localStorage).filter((name) => name.startsWith(TITLE));
  } catch {
    return [];
  }
}

function readTitle(name) {
  try {
    const { title, updated } = JSON.parse(kept(name));
    return { title: String(title), updated: Number(updated) };
  } catch {
    return { title: "(unreadable)", updated: 0 };
  }
}

/** The conversation, or null when the storage has none of that name that can be read. */
export function load(id) {
  if (!held.has(id)) {
    try {
      const stored = JSON.parse(kept(BODY + id));
      held.set(id, { ...conversationFrom(stored), id });
    } catch {
      return null;
    }
  }
  return held.get(id);
}

function textOf(value, what) {
  if (typeof value !== "string") throw new Error(`${what} is not text`);
  return value;
}

function documentFrom(value) {
  const tokens = Number.isInteger(value.tokens) ? value.tokens : null;
  return { name: textOf(value.name, "a document's name"), text: textOf(value.text, "a document"), tokens };
}

// Field by field: a file from elsewhere must not bring anything that this page did not expect. `ids` has this page's id
// for each that the file has.
function messageFrom(value, ids) {
  const { id, parent, role, error = null, stats = null } = value;
  if (role !== "user" && role !== "assistant") throw new Error(`a message has the role ${JSON.stringify(role)}`);
  if (ids.has(textOf(id, "a message's id"))) throw new Error(`two messages have the id ${id}`);
  if (parent !== null && !ids.has(parent)) throw new Error(`message ${id} follows one that is not there`);
  ids.set(id, OWN_ID.test(id) ? id : newId());
  const documents = (value.documents ?? []).map(documentFrom);
  const content = textOf(value.content, "a message's content");
  const said = error === null ? null : textOf(error, "an error");
  const place = { id: ids.get(id), parent: ids.get(parent) ?? null };
  const message = { ...place, role, content, documents, made: Number(value.made) || 0 };
  // A reply without an end was still being written when its page was left.
  const ended = ENDS.includes(value.ended) ? value.ended : "left";
  return role === "user" ? message : { ...message, ended, error: said, stats: statsFrom(stats) };
}

function statsFrom(stats) {
  if (stats === null) return null;
  const names = ["prompt", "cached", "tokens", "first", "seconds", "seed"];
  return Object.fromEntries(names.map((name) => [name, Number.isFinite(stats[name]) ? stats[name] : null]));
}

function conversationFrom(value) {
  const ids = new Map();
  const messages = value.messages.map((message) => messageFrom(message, ids));
  const chosen = {};
  for (const [parent, id] of Object.entries(value.chosen ?? {})) {
    const place = parent === BEGINNING ? BEGINNING : ids.get(parent);
    if (place !== undefined && ids.has(id)) chosen[place] = ids.get(id);
  }
  const created = Number(value.created) || Date.now();
  const updated = Number(value.updated) || created;
  const title = textOf(value.title, "the title");
  return { id: newId(), title, created, updated, system: textOf(value.system, "the system prompt"), messages, chosen };
}

// A bare list of messages, as many programs write it.
function conversationFromList(values) {
  const conversation = newConversation();
  let last = null;
  for (const { role, content } of values) {
    if (role === "system" && last === null) conversation.system = textOf(content, "the system prompt");
    else if (role !== "user" && role !== "assistant") throw new Error(`a message has the role ${JSON.stringify(role)}`);
    else {
      const end = role === "user" ? {} : { ended: "stop", error: null, stats: null };
      last = add(conversation, last, { role, content: textOf(content, "a message's content"), ...end });
    }
  }
  return conversation;
}

/** A conversation as a file: whole, and beside it the shown branch as the server takes it. */
export function exported(conversation, model) {
  const messages = forServer(conversation.system, path(conversation));
  const file = { format: FORMAT, version: 1, model, exported: new Date().toISOString(), messages, conversation };
  return JSON.stringify(file, null, 2);
}

/** A conversation from such a file, or from {"messages": [...]}. Throws an Error that says what is wrong with it. */
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  const list = Array.isArray(file) ? file : file?.messages;
  try {
    if (file?.format === FORMAT) return conversationFrom(file.conversation);
    if (Array.isArray(list)) return conversationFromList(list);
  } catch (error) {
    throw new Error(error instanceof TypeError ? "a part of it is missing" : error.message);
  }
  throw new Error('it has neither a conversation of this page nor a list "messages"');
}
