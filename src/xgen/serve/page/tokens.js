/** Tokens with their probabilities: each coloured by how likely the model took it to be, with what else could come. */

import { byId, listen, make, percent } from "./dom.js";

// Lower bounds of the colours, from the likeliest on; the stylesheet has a class p0, p1, ... for each.
const BOUNDS = [0.9, 0.6, 0.3, 0.1, 0.02, 0];
const NAMES = ["≥ 90 %", "60", "30", "10", "2", "less"];

const colourOf = (logprob) => (logprob === null ? "" : `p${BOUNDS.findIndex((bound) => Math.exp(logprob) >= bound)}`);

/** A token's text with what cannot be seen made visible. */
export function visible(text) {
  if (text === "") return "(empty)";
  const signs = { "\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣" };
  const shown = text.replace(/[\n\t\r]|^ +| +$/g, (found) => [...found].map((sign) => signs[sign]).join(""));
  const code = (sign) => sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return shown.replace(/[\p{Cc}\p{Cf}]/gu, (sign) => `U+${code(sign)}`);
}

/**
 * Puts the text that a stream brings under the tokens that it names.
 *
 * A token that is part of a character has no text of its own (it is named "bytes:\xe2\x80"): the character goes to
 * the first token of the group that makes it. An end token is named, and has no text at all.
 */
export class Alignment {
  constructor() {
    this.queue = [];
    this.loose = "";
  }

  /** The tokens that are settled by this chunk, each with its `piece` of the text. */
  take(text, tokens) {
    this.loose += text;
    this.queue.push(...tokens);
    const settled = [];
    while (this.queue.length) {
      const group = this.group();
      if (!group) break;
      settled.push(...group);
    }
    return settled;
  }

  group() {
    const [head] = this.queue;
    if (!broken(head.token)) return this.whole(head);
    const next = this.queue.findIndex((entry) => !broken(entry.token));
    const end = next < 0 ? this.loose.length : this.loose.indexOf(this.queue[next].token);
    // Until the character is complete, nothing of it has been sent.
    if (end <= 0) return null;
    const parts = this.queue.splice(0, next < 0 ? this.queue.length : next);
    parts.forEach((entry, index) => { entry.piece = index ? "" : this.loose.slice(0, end); });
    this.loose = this.loose.slice(end);
    return parts;
  }

  whole(head) {
    const fits = this.loose.startsWith(head.token);
    // Some tokenizers write no space before the first word of a text, though the token's name has one.
    const trimmed = !fits && /^ ./s.test(head.token) && this.loose.startsWith(head.token.slice(1));
    if (!fits && !trimmed) return this.silent(head);
    head.piece = trimmed ? head.token.slice(1) : head.token;
    this.loose = this.loose.slice(head.piece.length);
    return [this.queue.shift()];
  }

  /** A token that the text has nothing of, or something else, is passed over once a later one is found in the text. */
  silent(head) {
    const { loose } = this;
    if (loose === "" || head.token.startsWith(loose) || head.token.startsWith(` ${loose}`)) return null;
    const next = this.queue.findIndex((entry, at) => at > 0 && !broken(entry.token) && loose.includes(entry.token));
    if (next < 0) return null;
    const end = loose.indexOf(this.queue[next].token);
    const parts = this.queue.splice(0, next);
    parts.forEach((entry, index) => { entry.piece = index ? "" : loose.slice(0, end); });
    this.loose = loose.slice(end);
    return parts;
  }

  /** At the end: what is left of the text goes to the first token left, and the others have none. */
  rest() {
    const left = this.queue.splice(0);
    left.forEach((entry, index) => { entry.piece = index ? "" : this.loose; });
    if (!left.length && this.loose) left.push({ token: this.loose, piece: this.loose, logprob: null, top: [] });
    this.loose = "";
    return left;
  }
}

const broken = (token) => token.startsWith("bytes:") || token.includes("\ufffd");

/** Entries of a completion's logprobs; alternatives sorted, since objects do not keep the order of names like "12". */
export function entriesOf({ tokens, token_logprobs: logprobs, top_logprobs: tops }) {
  return tokens.map((token, index) => ({
    token,
    logprob: logprobs[index],
    top: Object.entries(tops?.[index] ?? {}).sort((one, other) => other[1] - one[1]),
  }));
}

export function drawLegend(list) {
  const colour = (name, index) => make("li", {}, make("span", { class: `token p${index}`, text: name }));
  list.replaceChildren(...NAMES.map(colour));
}

/** The strip of tokens, and the card that belongs to the one pointed at or focused. */
export class Strip {
  /** `pick(index, text)` is called when the user would rather go on with another token. */
  constructor(element, pick) {
    Object.assign(this, { element, pick, entries: [], spans: [], pinned: false, at: -1 });
    this.card = byId("pop");
    listen(element, {
      pointerover: (event) => this.over(event),
      pointerleave: () => this.hideUnlessPinned(),
      focusin: (event) => this.show(this.indexOf(event.target)),
      focusout: () => this.hideUnlessPinned(),
      click: (event) => this.pin(this.indexOf(event.target)),
      keydown: (event) => this.key(event),
    });
    listen(this.card, {
      keydown: (event) => this.cardKey(event),
      focusout: (event) => { if (!this.card.contains(event.relatedTarget)) this.hide(); },
    });
    const inside = (target) => this.card.contains(target) || element.contains(target);
    listen(document, { pointerdown: ({ target }) => { if (!inside(target)) this.hide(); } });
    window.addEventListener("scroll", () => { if (this.open) this.place(this.spans[this.at]); }, true);
  }

  get text() {
    return this.entries.map(({ piece }) => piece).join("");
  }

  set(entries) {
    this.hide();
    this.entries = [];
    this.spans = [];
    this.element.replaceChildren();
    this.add(entries);
  }

  add(entries) {
    if (!entries.length) return;
    const first = this.entries.length;
    const spans = entries.map((entry, index) => drawn(entry, first + index));
    if (!first) spans[0].tabIndex = 0;
    this.entries.push(...entries);
    this.spans.push(...spans);
    this.element.append(...spans);
  }

  indexOf(target) {
    const span = target.closest?.(".token");
    return span ? Number(span.dataset.index) : -1;
  }

  over(event) {
    if (!this.pinned) this.show(this.indexOf(event.target));
  }

  show(index) {
    if (index < 0 || index === this.at) return;
    this.spans[this.at]?.classList.remove("pointed");
    this.at = index;
    this.spans[index].classList.add("pointed");
    this.card.replaceChildren(...this.lines(this.entries[index], index));
    this.card.hidden = false;
    this.place(this.spans[index]);
  }

  place(span) {
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.card;
    const below = box.bottom + height + 12 < window.innerHeight;
    const left = Math.max(8, Math.min(box.left, window.innerWidth - width - 8));
    this.card.style.setProperty("left", `${left}px`);
    this.card.style.setProperty("top", `${below ? box.bottom + 6 : Math.max(8, box.top - height - 6)}px`);
  }

  lines(entry, index) {
    const head = make("p", { class: "pop-head" }, make("bdi", { text: visible(entry.token) }),
      make("span", { text: entry.logprob === null ? "no probability" : percent(Math.exp(entry.logprob)) }));
    const rows = entry.top.map(([text, logprob]) => this.alternative(entry, index, text, logprob));
    const hint = make("p", { class: "hint", text: "Click or Enter, then choose one to go on from it." });
    return [head, make("div", { class: "pop-rows" }, ...rows), hint];
  }

  alternative(entry, index, text, logprob) {
    const share = Math.exp(logprob);
    const bar = make("span", { class: "pop-bar", "aria-hidden": "true" });
    bar.style.setProperty("inline-size", `${(100 * share).toFixed(1)}%`);
    // A part of a character cannot be sent as text.
    const current = text === entry.token ? "true" : null;
    const click = () => {
      this.hide();
      this.pick(index, text);
    };
    const given = { type: "button", class: "pop-row", disabled: broken(text), "aria-current": current, on: { click } };
    const told = [make("bdi", { text: visible(text) }), make("span", { class: "pop-share", text: percent(share) })];
    return make("button", given, bar, ...told);
  }

  pin(index) {
    if (index < 0) return;
    this.spans[index].focus({ preventScroll: true });
    this.show(index);
    this.pinned = true;
    this.card.classList.add("pinned");
    const first = this.card.querySelector("[aria-current]:enabled") ?? this.card.querySelector("button:enabled");
    first?.focus({ preventScroll: true });
  }

  hideUnlessPinned() {
    if (!this.pinned && !this.element.contains(document.activeElement)) this.hide();
  }

  hide() {
    this.spans[this.at]?.classList.remove("pointed");
    Object.assign(this, { at: -1, pinned: false });
    this.card.hidden = true;
    this.card.classList.remove("pinned");
  }

  get open() {
    return !this.card.hidden;
  }

  key(event) {
    const index = this.indexOf(event.target);
    const last = this.spans.length - 1;
    const goal = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last }[event.key];
    if (goal !== undefined && index >= 0) {
      event.preventDefault();
      this.focus(Math.max(0, Math.min(last, goal)), index);
    } else if (event.key === "Enter" && index >= 0) {
      event.preventDefault();
      this.pin(index);
    }
  }

  // One stop of the Tab key for the whole strip: a thousand would be a wall.
  focus(goal, from) {
    this.spans[from].tabIndex = -1;
    this.spans[goal].tabIndex = 0;
    this.spans[goal].focus();
  }

  cardKey(event) {
    const buttons = [...this.card.querySelectorAll("button:enabled")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length]?.focus();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      this.spans[this.at]?.focus({ preventScroll: true });
      // Last: the focus alone would show the card again.
      this.hide();
    }
  }
}

// A token without text of its own is a mark drawn by the stylesheet: what is selected and copied stays the text itself.
function drawn({ token, piece, logprob }, index) {
  const known = logprob === null ? "" : `, ${percent(Math.exp(logprob))}`;
  const classes = ["token", colourOf(logprob), piece === "" ? "silent" : "", /^\n+$/.test(piece) ? "newline" : ""];
  const mark = piece === "" ? (broken(token) ? "·" : visible(token)) : null;
  const role = { tabindex: "-1", role: "button", "aria-haspopup": "dialog", "aria-label": visible(token) + known };
  const given = { class: classes.filter(Boolean).join(" "), "data-index": index, "data-mark": mark, ...role };
  return make("span", { ...given, text: piece });
}
