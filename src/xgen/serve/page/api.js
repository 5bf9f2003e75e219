/** Talks to the server that this page came from: errors, the key, streams, and patience. */

const KEY = "xgen.key";
// The server sends a comment every few seconds of silence; so long without a byte means that nobody is there any more.
const SILENCE_SECONDS = 60;

/** The server answered with an error. `retryAfter` is in seconds, null when it did not say. */
export class ServerError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error.message || `The server answered with status ${status}.`);
    Object.assign(this, { status, code: error.code ?? null, param: error.param ?? null, retryAfter });
  }
}

/** The server could not be reached, or went away in the middle of an answer. */
export class ConnectionLost extends Error {}

let askForKey = async () => null;
let asking = null;
let dismissed = false;

/** `ask(wrong)` shows the prompt for the key and resolves to it, or to null when it is dismissed. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Lets the prompt for the key come again after it was dismissed: counting as one types must not bring it back. */
export function mayAskAgain() {
  dismissed = false;
}

// Several requests may be refused at once; they wait for one prompt.
function newKey() {
  const before = savedKey();
  asking ??= askForKey(before !== null).finally(() => { asking = null; });
  return asking;
}

// In the session's storage: the key is gone with the tab, and other tabs do not see it.
function savedKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return heldKey;
  }
}

let heldKey = null;

function keepKey(key) {
  heldKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Storage is forbidden: the key then lasts until the page is left.
  }
}

async function ask(path, body, signal) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const key = savedKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  const given = { headers, signal, method: body === undefined ? "GET" : "POST", cache: "no-store" };
  if (body !== undefined) given.body = JSON.stringify(body);
  try {
    return [await fetch(new URL(path, document.baseURI), given), key];
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost(`The server at ${location.host} cannot be reached.`);
  }
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  const retryAfter = Number.isFinite(after) ? after : null;
  try {
    const { error } = JSON.parse(text);
    return new ServerError(response.status, error ?? {}, retryAfter);
  } catch {
    return new ServerError(response.status, {}, retryAfter);
  }
}

/** The server's answer, if it is a good one. Throws ServerError, ConnectionLost, or AbortError once `signal` says. */
export async function open(path, body, signal) {
  for (;;) {
    const [response, used] = await ask(path, body, signal);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status !== 401) throw error;
    // Another request may have brought the key while this one was on its way.
    if (savedKey() !== used && savedKey() !== null) continue;
    const key = dismissed ? null : await newKey();
    dismissed = key === null;
    if (dismissed) throw error;
    keepKey(key);
  }
}

export async function json(path, body, signal) {
  const response = await open(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost("The connection was lost in the middle of an answer.");
  }
}

async function readWithin(reader) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new ConnectionLost("The server has fallen silent.")), SILENCE_SECONDS * 1000);
  });
  try {
    return await Promise.race([reader.read(), silence]);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ConnectionLost) throw error;
    throw new ConnectionLost("The connection was lost in the middle of the reply.");
  } finally {
    clearTimeout(timer);
  }
}

/** The `data` of each complete event in `text`, and what is left of it. */
export function cutEvents(text) {
  // A carriage return at the very end may be half of a line's end.
  const whole = text.endsWith("\r") ? text.slice(0, -1) : text;
  const pieces = whole.split(/(?:\r\n|\n|\r)(?:\r\n|\n|\r)/);
  const rest = pieces.pop() + text.slice(whole.length);
  const datas = pieces.map((piece) => piece.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:")));
  return [datas.filter((lines) => lines.length).map((lines) => lines.map(dataOf).join("\n")), rest];
}

const dataOf = (line) => line.slice(line[5] === " " ? 6 : 5);

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ConnectionLost("The reply arrived damaged.");
  }
}

/** The objects of a stream of server-sent events, until [DONE]. An end without it is a lost connection. */
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await readWithin(reader);
      if (done) throw new ConnectionLost("The reply broke off before its end.");
      const [datas, left] = cutEvents(rest + decoder.decode(value, { stream: true }));
      rest = left;
      for (const data of datas) {
        if (data === "[DONE]") return;
        const event = parsed(data);
        if (event.error) throw new ServerError(Number(event.error.code) || 500, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stopped = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stopped);
      resolve();
    }, milliseconds);
    if (signal?.aborted) stopped();
    signal?.addEventListener("abort", stopped, { once: true });
  });
}

async function countDown(wanted, signal, waiting, message) {
  for (let left = Math.max(1, Math.ceil(wanted)); left > 0; left -= 1) {
    waiting(`${message} Trying again in ${left} s.`);
    await pause(1000, signal);
  }
}

const HEALTH = {
  loading: "The model is loading. This page goes on by itself as soon as it is ready.",
  draining: "The server is shutting down. This page waits for it to come back.",
  broken: "The server's engine has failed and must be started again; its log says why. This page waits for it.",
};

async function health(signal) {
  try {
    const [response] = await ask("health", undefined, signal);
    const { status } = await response.json();
    return response.ok ? null : HEALTH[status] ?? HEALTH.loading;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const why = error instanceof ConnectionLost ? error.message : "The server gives no answer.";
    return `${why} Waiting for it to come back.`;
  }
}

/** Resolves when the server says that it is ready. */
async function untilReady(signal, waiting) {
  for (;;) {
    const message = await health(signal);
    if (message === null) return;
    waiting(message);
    await pause(1000, signal);
  }
}

/** Tries until the server is neither busy nor loading, telling `waiting` each second why nothing happens. */
export async function patiently(attempt, { signal, waiting }) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (error.status === 503) await untilReady(signal, waiting);
      else if (error.status === 429) {
        await countDown(error.retryAfter ?? Math.min(30, 2 ** tries), signal, waiting, "The server is busy.");
      } else throw error;
    }
  }
}

/** As `patiently`, but also waits for a server that cannot be reached: at the start nothing else can be done. */
export async function stubbornly(attempt, { waiting }) {
  for (;;) {
    try {
      return await patiently(attempt, { waiting });
    } catch (error) {
      if (!(error instanceof ConnectionLost)) throw error;
      waiting(`${error.message} Waiting for it to come back.`);
      await pause(2000);
    }
  }
}

/** What every streamed request asks for, beside its prompt. */
export const streamed = (model, fields) =>
  ({ model, stream: true, stream_options: { include_usage: true }, return_progress: true, ...fields });

export const countText = async (content, special, signal) =>
  (await json("tokenize", { content, add_special: special }, signal)).count;

export const countMessages = async (messages, signal) => (await json("tokenize", { messages }, signal)).count;
