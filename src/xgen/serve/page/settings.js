/** How the next token is drawn: the controls, their limits, and what is sent. */

import { byId, make } from "./dom.js";
import { forget, keep, kept } from "./store.js";

const PLACE = "xgen.settings";
const MOST_STOPS = 16;
const LARGEST_SEED = 2 ** 31 - 1;

const CONTROLS = [
  { name: "temperature", label: "Temperature", standard: 1, low: 0, high: 2, step: 0.05, slider: true,
    hint: "0 always takes the likeliest token; more makes the text more varied." },
  { name: "top_p", label: "Top-p", standard: 1, low: 0.01, high: 1, step: 0.01, slider: true,
    hint: "Draw among the likeliest tokens that together reach this share." },
  { name: "min_p", label: "Min-p", standard: 0, low: 0, high: 1, step: 0.01, slider: true,
    hint: "Leave out tokens less likely than this share of the likeliest one." },
  { name: "top_k", label: "Top-k", standard: 0, low: 0, high: 1_000_000, whole: true,
    hint: "Draw among so many of the likeliest tokens; 0 for all." },
  { name: "max_tokens", label: "Max tokens", standard: 1024, low: 1, high: 10_000_000, whole: true,
    hint: "The reply ends here at the latest. Prompt and reply share the window." },
  { name: "seed", label: "Seed", standard: null, low: 0, high: LARGEST_SEED, whole: true, optional: true,
    hint: "The same seed gives the same reply. Empty: a new one each time." },
  { name: "repetition_penalty", label: "Repetition penalty", standard: 1, low: 0.05, high: 2, step: 0.05,
    hint: "Above 1 makes tokens of the prompt and the reply less likely to come again." },
  { name: "presence_penalty", label: "Presence penalty", standard: 0, low: -2, high: 2, step: 0.1,
    hint: "Above 0 makes tokens that the reply already has less likely." },
  { name: "frequency_penalty", label: "Frequency penalty", standard: 0, low: -2, high: 2, step: 0.1,
    hint: "As above, by how often they came." },
];

/** The drawer's controls. `changed` is called after every change. */
export class Settings {
  constructor(changed) {
    this.changed = changed;
    this.defaults = {};
    this.inputs = new Map();
    this.stop = byId("stop-strings");
    for (const control of CONTROLS) this.addRow(control);
    this.stop.addEventListener("input", () => this.edited());
    byId("reset").addEventListener("click", () => this.reset());
  }

  /** Takes the server's own defaults for what the user has not changed. */
  begin({ defaults, context_length: window }) {
    this.window = window;
    for (const { name, standard } of CONTROLS) {
      const given = defaults?.[name];
      this.defaults[name] = typeof given === "number" ? given : standard;
    }
    // A short window would otherwise have no room left for the prompt.
    if (typeof defaults?.max_tokens !== "number") {
      this.defaults.max_tokens = Math.max(1, Math.min(1024, Math.floor(window / 4)));
    }
    this.fill(stored());
  }

  addRow(control) {
    const id = `set-${control.name}`;
    const step = control.whole ? 1 : control.step;
    const limits = { min: control.low, max: control.high, step: control.whole ? 1 : "any" };
    const hint = make("p", { id: `${id}-hint`, class: "hint", text: control.hint });
    const number = make("input", { id, type: "number", inputmode: "decimal", "aria-describedby": hint.id, ...limits,
      placeholder: control.optional ? "random" : null });
    const row = make("div", { class: "control" }, make("label", { for: id, text: control.label }), number);
    if (control.slider) row.append(this.slider(control, number, step));
    row.append(hint);
    byId("controls").append(row);
    number.addEventListener("input", () => this.edited());
    this.inputs.set(control.name, { control, number, hint, slider: row.querySelector("[type=range]") });
  }

  slider(control, number, step) {
    const limits = { min: control.low, max: control.high, step };
    const slider = make("input", { type: "range", "aria-label": `${control.label}, slider`, ...limits });
    slider.addEventListener("input", () => {
      number.value = slider.value;
      this.edited();
    });
    return slider;
  }

  fill(values) {
    for (const [name, { number, slider }] of this.inputs) {
      const value = values[name] ?? this.defaults[name];
      number.value = value ?? "";
      if (slider) slider.value = value;
    }
    this.stop.value = values.stop ?? "";
    this.check();
  }

  edited() {
    this.check();
    const values = this.changes();
    if (Object.keys(values).length) keep(PLACE, JSON.stringify(values));
    else forget(PLACE);
    this.changed();
  }

  changes() {
    const values = {};
    for (const [name, { number }] of this.inputs) {
      if (number.value !== "" && Number(number.value) !== this.defaults[name]) values[name] = Number(number.value);
    }
    if (this.stop.value) values.stop = this.stop.value;
    return values;
  }

  reset() {
    forget(PLACE);
    this.fill({});
    this.changed();
  }

  /** Marks what is out of its limits; the first such control and why, or null. */
  check() {
    let first = null;
    for (const entry of this.inputs.values()) {
      const said = problem(entry, this.window);
      mark(entry.number, entry.hint, said, entry.control.hint);
      if (entry.slider && !said && entry.number.value) entry.slider.value = entry.number.value;
      if (said) first ??= { input: entry.number, said };
    }
    const many = this.stops().length > MOST_STOPS ? `At most ${MOST_STOPS} stop strings are taken.` : null;
    mark(this.stop, byId("stop-hint"), many, "One on each line; \\n stands for a line's end, \\t for a tab.");
    if (many) first ??= { input: this.stop, said: many };
    byId("open-settings").classList.toggle("changed", Object.keys(this.changes()).length > 0);
    return first;
  }

  stops() {
    const lines = this.stop.value.split("\n").filter((line) => line !== "");
    const signs = { n: "\n", t: "\t", "\\": "\\" };
    return lines.map((line) => line.replace(/\\([nt\\])/g, (_, sign) => signs[sign]));
  }

  get maxTokens() {
    return Number(this.inputs.get("max_tokens").number.value) || this.defaults.max_tokens;
  }

  setMaxTokens(value) {
    this.inputs.get("max_tokens").number.value = value;
    this.edited();
  }

  /** The sampling fields of a request. An empty seed becomes a random one, so that every reply can be had again. */
  fields() {
    const values = { ...this.defaults };
    for (const [name, { number }] of this.inputs) if (number.value !== "") values[name] = Number(number.value);
    values.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] & LARGEST_SEED;
    const stop = this.stops();
    return stop.length ? { ...values, stop } : values;
  }
}

function stored() {
  try {
    return JSON.parse(kept(PLACE) ?? "{}");
  } catch {
    return {};
  }
}

function problem({ control, number }, window) {
  const { label, low, whole } = control;
  const high = control.name === "max_tokens" ? window : control.high;
  if (number.validity.badInput) return `${label} must be a number.`;
  if (number.value === "") return null;
  const value = Number(number.value);
  if (whole && !Number.isInteger(value)) return `${label} must be a whole number.`;
  return value < low || value > high ? `${label} must be from ${low} to ${high}; it is ${value}.` : null;
}

function mark(input, hint, said, usual) {
  input.setAttribute("aria-invalid", said ? "true" : "false");
  hint.textContent = said ?? usual;
  hint.classList.toggle("wrong", Boolean(said));
}
