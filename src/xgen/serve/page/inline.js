/** Markdown inside a line, as nodes: emphasis, code, links. What is not understood stays as it was written. */

import { make } from "./dom.js";

const SAFE = new Set(["http:", "https:", "mailto:"]);
// Emphasis within emphasis: deeper nesting is nobody's meaning, and very deep trees exhaust the browser's layout.
const DEEPEST = 24;
const PLAIN = /[^\\`*_~[\]!<h\n]+/y;
// Addresses have an end, so that a text made of their beginnings does not take a time that grows with its square.
const BARE = /https?:\/\/[^\s<>"`]{1,2000}/iy;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const PART = String.raw`[^\s()<>]{0,2000}`;
const TITLE = String.raw`(?:\s{1,9}(?:"[^"\n]{0,2000}"|'[^'\n]{0,2000}'))?`;
const PLACE = String.raw`(?:<([^<>\n]{0,2000})>|(${PART}(?:\(${PART}\)${PART}){0,9}))`;
const TARGET = new RegExp(String.raw`\(\s{0,9}${PLACE}${TITLE}\s{0,9}\)`, "y");
// What follows an address in a sentence, or marks emphasis around it, is no part of it.
const TRAILING = new Set(".,;:!?'*_~]");
const BREAK = /<br\s*\/?>/iy;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;

/** The address as the browser would follow it, or null where it is not plainly a web or mail address. */
export function safeAddress(text) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(text) || /[\u0000-\u0020\u007f]/.test(text)) return null;
  try {
    const address = new URL(text);
    return SAFE.has(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function anchor(href, children) {
  return make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/** Reads one stretch of text. `out` holds the nodes so far; `openers` the marks that may still begin something. */
class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.out = [];
    this.openers = [];
    this.pending = "";
    this.missing = new Set(); // lengths of backtick runs that have no partner ahead: looked for once
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    return pattern.exec(this.text);
  }

  say(text) {
    this.pending += text;
    this.at += text.length;
  }

  flush() {
    if (this.pending) this.out.push(document.createTextNode(this.pending));
    this.pending = "";
  }

  push(node, length) {
    this.flush();
    this.out.push(node);
    this.at += length;
  }

  read() {
    while (this.at < this.text.length) this.step(this.text[this.at]);
    this.flush();
    const whole = document.createDocumentFragment();
    whole.append(...this.out);
    return whole;
  }

  step(sign) {
    if (sign === "\\") this.escape();
    else if (sign === "`") this.code();
    else if (sign === "*" || sign === "_" || sign === "~") this.mark(sign);
    else if (sign === "[") this.bracket(1);
    else if (sign === "!" && this.text[this.at + 1] === "[") this.bracket(2);
    else if (sign === "]") this.link();
    else if (sign === "<") this.angle();
    else if (sign === "h") this.bare();
    else if (sign === "\n") this.newline();
    else this.say(this.match(PLAIN)?.[0] ?? sign);
  }

  newline() {
    this.pending = this.pending.trimEnd();
    this.push(make("br"), 1);
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "\n") this.at += 1;
    else if (next && PUNCTUATION.test(next)) {
      this.pending += next;
      this.at += 2;
    } else this.say("\\");
  }

  code() {
    const [ticks] = this.match(/`+/y);
    const start = this.at + ticks.length;
    const end = this.missing.has(ticks.length) ? -1 : this.partner(ticks, start);
    if (end < 0) {
      this.missing.add(ticks.length);
      this.say(ticks);
      return;
    }
    const inside = this.text.slice(start, end).replaceAll("\n", " ");
    const trimmed = /^ .*[^ ].* $|^ [^ ] $/.test(inside) ? inside.slice(1, -1) : inside;
    this.push(make("code", { text: trimmed }), end + ticks.length - this.at);
  }

  partner(ticks, start) {
    const runs = /`+/g;
    runs.lastIndex = start;
    for (let run = runs.exec(this.text); run; run = runs.exec(this.text)) {
      if (run[0].length === ticks.length) return run.index;
    }
    return -1;
  }

  mark(sign) {
    let length = 1;
    while (this.text[this.at + length] === sign) length += 1;
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + length] ?? " ";
    // Underscores inside words are names (snake_case), not emphasis.
    const opens = /\S/.test(after) && (sign !== "_" || !WORD.test(before)) && (sign !== "~" || length === 2);
    const closes = /\S/.test(before) && (sign !== "_" || !WORD.test(after)) && (sign !== "~" || length === 2);
    this.flush();
    this.at += length;
    let left = length;
    while (closes && left) {
      const used = this.close(sign, left);
      if (!used) break;
      left -= used;
    }
    if (!left) return;
    const node = document.createTextNode(sign.repeat(left));
    this.out.push(node);
    if (opens) this.open({ sign, node, left, at: this.out.length - 1 });
  }

  open(opener) {
    this.openers.push(opener);
    if (this.openers.length > DEEPEST) this.openers.shift();
  }

  /** Closes the nearest opener of `sign`; the number of signs used up, 0 when there is none. */
  close(sign, left) {
    const index = this.openers.findLastIndex((opener) => opener.sign === sign || opener.sign === "[");
    const opener = this.openers[index];
    if (!opener || opener.sign !== sign || opener.at === this.out.length - 1) return 0;
    this.openers.length = index + 1;
    const used = Math.min(2, left, opener.left);
    if (sign === "~" && used < 2) return 0;
    const children = this.out.splice(opener.at + 1);
    opener.left -= used;
    opener.node.data = sign.repeat(opener.left);
    if (!opener.left) {
      this.openers.pop();
      this.out.pop();
    }
    const tag = sign === "~" ? "s" : used === 2 ? "strong" : "em";
    this.out.push(make(tag, {}, ...children));
    return used;
  }

  bracket(length) {
    this.flush();
    const node = document.createTextNode(this.text.slice(this.at, this.at + length));
    this.out.push(node);
    this.at += length;
    this.open({ sign: "[", node, left: length, at: this.out.length - 1 });
  }

  link() {
    const index = this.openers.findLastIndex((opener) => opener.sign === "[");
    this.flush();
    this.at += 1;
    const opener = this.openers[index];
    const target = opener && this.text[this.at] === "(" ? this.match(TARGET) : null;
    const href = target ? safeAddress(target[1] ?? target[2] ?? "") : null;
    if (opener) this.openers.length = index;
    if (href === null) {
      this.pending = "]";
      return;
    }
    const label = this.out.splice(opener.at).slice(1);
    // A picture is shown as a link to it: loading it would tell another server that this reply was read.
    this.out.push(anchor(href, label.length ? label : [document.createTextNode(href)]));
    this.openers = this.openers.filter((other) => other.sign !== "[");
    this.at += target[0].length;
  }

  angle() {
    const broken = this.match(BREAK);
    if (broken) {
      this.push(make("br"), broken[0].length);
      return;
    }
    const found = this.match(ANGLED);
    const href = found ? safeAddress(found[1]) : null;
    if (href === null) this.say("<");
    else this.push(anchor(href, [document.createTextNode(found[1])]), found[0].length);
  }

  bare() {
    const before = this.text[this.at - 1] ?? " ";
    const inLink = this.openers.some((opener) => opener.sign === "[");
    const found = WORD.test(before) || inLink ? null : this.match(BARE);
    if (!found) {
      this.say("h");
      return;
    }
    let end = found[0].length;
    while (TRAILING.has(found[0][end - 1])) end -= 1;
    let address = found[0].slice(0, end);
    if (address.endsWith(")") && !address.includes("(")) address = address.replace(/\).*$/, "");
    const href = safeAddress(address);
    if (href === null) this.say("h");
    else this.push(anchor(href, [document.createTextNode(address)]), address.length);
  }
}

/** The nodes of a stretch of Markdown without blocks. */
export function inline(text) {
  return new Reader(text).read();
}
