/** Makes elements. Text only ever goes in as text: nothing on this page parses markup. */

const SVG = "http://www.w3.org/2000/svg";

// Outlines on a 24 by 24 grid.
const ICONS = {
  attach: "M21 11.5 12.4 20a5.5 5.5 0 0 1-7.8-7.8L13 3.9a3.7 3.7 0 0 1 5.2 5.2l-8.4 8.3a1.8 1.8 0 0 1-2.6-2.6l7.7-7.6",
  branch: "M6 4v16M6 13c0-5 12-2 12-8",
  check: "m5 12.5 4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6 6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  exported: "M12 4v11M7 10.5l5 5 5-5M4 20h16",
  file: "M6 3h8l4 4v14H6zM14 3v4h4M9 12h6M9 16h6",
  imported: "M12 15V4M7 8.5l5-5 5 5M4 20h16",
  keyboard: "M3 6h18v12H3zM7 10h.01M11 10h.01M15 10h.01M8 14h8",
  left: "m14.5 6-6 6 6 6",
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  remove: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13M10.5 11v5.5M13.5 11v5.5",
  right: "m9.5 6 6 6-6 6",
  again: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5v5M8 13.5v5",
  stop: "M7 7h10v10H7z",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
};

/** An element with attributes; `on` holds handlers, `text` is its text, children that are null are left out. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") listen(element, value);
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function listen(element, handlers) {
  for (const [event, handler] of Object.entries(handlers)) element.addEventListener(event, handler);
}

export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  for (const [key, value] of [["viewBox", "0 0 24 24"], ["class", "icon"], ["aria-hidden", "true"]]) {
    drawing.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  drawing.append(path);
  return drawing;
}

/** A button that shows only a drawing; `label` is its name to those who hear the page, its tip to those who see it. */
export function iconButton(name, label, click, properties = {}) {
  const given = { type: "button", class: "plain", "aria-label": label, title: label, on: { click }, ...properties };
  return make("button", given, icon(name));
}

export function textButton(label, click, properties = {}) {
  return make("button", { type: "button", class: "small", text: label, on: { click }, ...properties });
}

export function byId(id) {
  return document.getElementById(id);
}

/** Puts the drawings into the buttons that the document itself holds. */
export function drawIcons() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
}

const announcer = () => byId("status");

/** Says something to those who hear the page, without taking them from where they are. */
export function announce(text) {
  announcer().textContent = text;
}

/** Copies text. Pages that came over plain HTTP from another machine have no clipboard: hence the second way. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Refused by a permission; the older way below may still be allowed.
    }
  }
  const carrier = make("textarea", { class: "unseen", readonly: true, "aria-hidden": "true" });
  carrier.value = text;
  const before = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(carrier);
  carrier.select();
  const copied = document.execCommand("copy");
  carrier.remove();
  before?.focus?.();
  return copied;
}

/** A copy button that says for a moment whether it worked. `read` gives the text when it is pressed. */
export function copyButton(label, read, properties = {}) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(read());
    announce(copied ? "Copied" : "The browser refused to copy");
    button.replaceChildren(icon(copied ? "check" : "close"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1200);
  }, properties);
  return button;
}

/** Hands a file to the user. The address is dropped a little later: some browsers read it only after the click. */
export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = make("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export const count = (value) => value.toLocaleString("en-US");

export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

export function seconds(value) {
  if (value < 1) return `${Math.max(1, Math.round(value * 1000))} ms`;
  return value < 60 ? `${value.toFixed(1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function percent(probability) {
  const share = probability * 100;
  if (share >= 99.95) return "100 %";
  return share < 0.1 ? "< 0.1 %" : `${share.toFixed(1)} %`;
}
