/** Markdown as nodes, made with createElement and text alone, and remade only where it changed while it streams in. */

import { copyButton, make } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const DIVIDER = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
const INDENTED = /^ {4}/;
// Quotes in lists in quotes: beyond this the rest is shown as it was written.
const DEEPEST = 10;

const blank = (line) => /^\s*$/.test(line);
const indentOf = (line) => line.length - line.trimStart().length;

function startsTable(lines, at) {
  const [head, divider] = [lines[at], lines[at + 1]?.trim() ?? ""];
  return head.includes("|") && DIVIDER.test(divider) && cells(head).length === cells(divider).length;
}

function startsBlock(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || startsTable(lines, at) ||
    interrupts(line);
}

// A number other than 1 at the start of a line is more often part of a sentence than of a list.
function interrupts(line) {
  const item = ITEM.exec(line);
  return item !== null && item[4] !== "" && (/[-*+]/.test(item[2]) || /^1[.)]/.test(item[2]));
}

// The signs that may close a heading as they open it.
function headingText(text) {
  const words = text.trim().split(/\s+/);
  return /^#+$/.test(words.at(-1)) ? text.trim().slice(0, -words.at(-1).length).trim() : text.trim();
}

function takeCode(lines, at) {
  const [, fence, told] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  const indent = indentOf(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const inside = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  // While it streams in, the line that has just ended is followed by one that has not begun.
  if (end === lines.length && inside.at(-1) === "") inside.pop();
  return { kind: "code", language: told.trim(), text: inside.join("\n"), end: Math.min(end + 1, lines.length) };
}

function takeIndented(lines, at) {
  let end = at;
  while (end < lines.length && (INDENTED.test(lines[end]) || blank(lines[end]))) end += 1;
  while (blank(lines[end - 1])) end -= 1;
  return { kind: "code", language: "", text: lines.slice(at, end).map((line) => line.slice(4)).join("\n"), end };
}

function takeQuote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return { kind: "quote", inside: lines.slice(at, end).map((line) => line.replace(QUOTE, "")), end };
}

function takeTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !blank(lines[end])) end += 1;
  return { kind: "table", rows: lines.slice(at, end), end };
}

function takeParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !startsBlock(lines, end)) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd(), end };
}

const kindOfMark = (mark) => (/\d/.test(mark) ? mark.at(-1) : mark);

function takeList(lines, at) {
  const [, lead, mark] = ITEM.exec(lines[at]);
  const list = { kind: "list", ordered: /\d/.test(mark), start: Number.parseInt(mark, 10) };
  Object.assign(list, { items: [], loose: false, end: at });
  while (list.end < lines.length) {
    const found = ITEM.exec(lines[list.end]);
    if (!found || kindOfMark(found[2]) !== kindOfMark(mark) || RULE.test(lines[list.end])) break;
    if (found[1].length > lead.length + 1) break;
    takeItem(lines, list, found, lead.length);
  }
  // Blank lines after the last item belong to nobody.
  while (blank(lines[list.end - 1])) list.end -= 1;
  return list;
}

function takeItem(lines, list, found, base) {
  const width = found[1].length + found[2].length + Math.min(found[3].length || 1, 4);
  const inside = [found[4]];
  let end = list.end + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const gap = blank(lines[end - 1]);
    if (blank(line)) inside.push("");
    else if (indentOf(line) >= base + 2) inside.push(line.slice(Math.min(width, indentOf(line))));
    else if (!gap && !ITEM.test(line) && !startsBlock(lines, end)) inside.push(line);
    else break;
  }
  while (inside.length > 1 && blank(inside.at(-1))) inside.pop();
  const followed = end < lines.length && blank(lines[end - 1]) && ITEM.test(lines[end]);
  list.loose ||= followed || inside.includes("");
  list.items.push(inside);
  list.end = end;
}

function takeBlock(lines, at) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (FENCE.test(line)) return takeCode(lines, at);
  if (heading) return { kind: "heading", level: heading[1].length, text: headingText(heading[2] ?? ""), end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (QUOTE.test(line)) return takeQuote(lines, at);
  if (INDENTED.test(line)) return takeIndented(lines, at);
  if (ITEM.test(line)) return takeList(lines, at);
  if (startsTable(lines, at)) return takeTable(lines, at);
  return takeParagraph(lines, at);
}

/** The blocks of some lines. `source` is a block's own text: equal sources make equal blocks. */
function split(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = takeBlock(lines, at);
    block.source = lines.slice(at, block.end).join("\n");
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function cells(row) {
  const inner = row.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function alignment(mark) {
  if (/^:.*:$/.test(mark)) return "centred";
  return mark.endsWith(":") ? "end" : null;
}

function drawTable({ rows }) {
  const sides = cells(rows[1]).map(alignment);
  const line = (row, tag) => {
    const texts = cells(row);
    const scope = tag === "th" ? "col" : null;
    return make("tr", {}, ...sides.map((side, index) =>
      make(tag, { class: side, scope }, inline(texts[index] ?? ""))));
  };
  const head = make("thead", {}, line(rows[0], "th"));
  const body = make("tbody", {}, ...rows.slice(2).map((row) => line(row, "td")));
  const given = { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" };
  return make("div", given, make("table", {}, head, body));
}

function drawCode(block) {
  const code = make("code", { text: block.text });
  const name = block.language || "text";
  const copy = copyButton("Copy this code", () => code.textContent);
  const head = make("div", { class: "code-head" }, make("span", { text: name }), copy);
  const body = make("pre", { tabindex: "0", "aria-label": `Code, ${name}` }, code);
  return make("div", { class: "code" }, head, body);
}

function drawList(block, depth) {
  const items = block.items.map((lines) => make("li", {}, ...drawAll(lines, depth + 1)));
  const start = block.ordered && block.start !== 1 ? block.start : null;
  return make(block.ordered ? "ol" : "ul", { start, class: block.loose ? "loose" : null }, ...items);
}

function draw(block, depth) {
  if (block.kind === "code") return drawCode(block);
  if (block.kind === "heading") return drawHeading(block);
  if (block.kind === "rule") return make("hr");
  if (block.kind === "quote") return make("blockquote", {}, ...drawAll(block.inside, depth + 1));
  if (block.kind === "list") return drawList(block, depth);
  if (block.kind === "table") return drawTable(block);
  return make("p", { dir: "auto" }, inline(block.text));
}

// The page's own headings are h1 and h2: a reply's begin below them.
function drawHeading({ level, text }) {
  return make(`h${Math.min(6, level + 2)}`, { class: `level${level}` }, inline(text));
}

function drawAll(lines, depth) {
  if (depth > DEEPEST) return [make("p", { text: lines.join("\n") })];
  return split(lines).map((block) => draw(block, depth));
}

function linesOf(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  return lines.map((line) => line.replace(/^\t+/, (tabs) => "    ".repeat(tabs.length)));
}

/** A place that shows Markdown. `update` may be called with ever longer text: what did not change is left as it is. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.shown = [];
  }

  update(text) {
    const blocks = split(linesOf(text));
    blocks.forEach((block, index) => this.place(block, index));
    for (const { node } of this.shown.splice(blocks.length)) node.remove();
  }

  place(block, index) {
    const old = this.shown[index];
    if (old?.source === block.source && old.kind === block.kind) return;
    const node = grown(old, block) ?? draw(block, 0);
    if (old && old.node !== node) old.node.replaceWith(node);
    else if (!old) this.element.append(node);
    this.shown[index] = { ...block, node };
  }
}

/** Code that only grew keeps its element, with the scroll position and the selection in it. */
function grown(old, block) {
  if (old?.kind !== "code" || block.kind !== "code" || old.language !== block.language) return null;
  if (!block.text.startsWith(old.text)) return null;
  old.node.querySelector("code").append(block.text.slice(old.text.length));
  old.node.querySelector("code").normalize();
  return old.node;
}
