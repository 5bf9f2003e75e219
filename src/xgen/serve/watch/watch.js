// Keeps the page up to date: the server says that something changed, and the parts that did are fetched and morphed in.
// All markup comes from the server, which escapes what others wrote; this script makes none of its own.
"use strict";

const TRY_AGAIN_MS = 3000;
const link = document.getElementById("link");
let stream = null;
let busy = false;
let again = false;
let clockAhead = 0; // of this computer against the server, in milliseconds
let heard = new Date();

// Make `old` equal to `fresh` by changing as little as possible: what is open, focused, selected or scrolled stays so.
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(document.importNode(fresh, true));
  } else if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
  } else {
    morphAttributes(old, fresh);
    morphChildren(old, fresh);
  }
}

function morphAttributes(old, fresh) {
  for (const { name } of [...old.attributes]) {
    const readersOwn = name === "open" && old.nodeName === "DETAILS";
    if (!readersOwn && !fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}

function morphChildren(old, fresh) {
  const before = [...old.childNodes];
  const after = [...fresh.childNodes];
  before.slice(after.length).forEach((node) => node.remove());
  after.forEach((node, i) => {
    if (i < before.length) morph(before[i], node);
    else old.append(document.importNode(node, true));
  });
}

async function get(address) {
  const answer = await fetch(address, { cache: "no-cache" });
  if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
  const date = Date.parse(answer.headers.get("date") ?? "");
  if (!Number.isNaN(date)) clockAhead = Date.now() - date;
  return answer;
}

async function updatePart(name) {
  const answer = await get(`/part/${name}`);
  const digest = (answer.headers.get("etag") ?? "").replaceAll('"', "");
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").body;
  const part = document.getElementById(`part-${name}`);
  morphChildren(part, fresh);
  part.dataset.digest = digest;
}

async function update() {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  try {
    do {
      again = false;
      const state = await (await get("/state.json")).json();
      for (const [name, digest] of Object.entries(state.parts)) {
        if (document.getElementById(`part-${name}`).dataset.digest !== digest) await updatePart(name);
      }
      document.title = state.title;
      document.body.dataset.state = state.state;
      heard = new Date();
      link.hidden = true;
      tick();
    } while (again);
  } catch (error) {
    lost();
  } finally {
    busy = false;
  }
}

function age(seconds) {
  if (seconds < 2) return "just now";
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)}\u202f${unit} ago`;
  }
  return `${Math.floor(seconds)}\u202fs ago`;
}

function clock(at) {
  return at.toDateString() === new Date().toDateString() ? at.toLocaleTimeString() : at.toLocaleString();
}

function tick() {
  for (const time of document.querySelectorAll("time[data-at]")) {
    const at = new Date(Number(time.dataset.at) * 1000);
    const text = `${clock(at)} (${age((Date.now() - clockAhead - at) / 1000)})`;
    if (time.textContent !== text) time.textContent = text;
  }
}

function lost() {
  link.textContent =
    `The connection to xgen watch is lost; what is shown is of ${heard.toLocaleTimeString()}. Trying again …`;
  link.hidden = false;
}

function listen() {
  if (stream !== null) return;
  stream = new EventSource("/events");
  stream.addEventListener("changed", update);
  stream.addEventListener("error", () => {
    lost();
    // The browser tries again by itself after a broken connection, but not after a refusal.
    if (stream !== null && stream.readyState === EventSource.CLOSED) {
      stream = null;
      setTimeout(listenIfSeen, TRY_AGAIN_MS);
    }
  });
}

function listenIfSeen() {
  if (document.visibilityState === "visible") listen();
}

// A page nobody looks at asks for nothing: a browser allows only a few open connections to one server.
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") {
    listen();
  } else if (stream !== null) {
    stream.close();
    stream = null;
  }
});

setInterval(tick, 1000);
tick();
listenIfSeen();
