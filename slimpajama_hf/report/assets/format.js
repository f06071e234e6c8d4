// Numbers and elements. Text from a document is only inserted as text nodes, never as HTML.

const whole = new Intl.NumberFormat("en-US");
const count = (value) => whole.format(value);
const fixed = (value, digits) =>
  value === null || value === undefined || !Number.isFinite(value) ? "–"
    : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value, digits = 1) => (Number.isFinite(value) ? `${fixed(100 * value, digits)} %` : "–");
const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

function rate(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  return value < 1e-3 ? value.toExponential(2).replace("e-", " × 10⁻").replace(/\d+$/, superscript) : String(+value.toPrecision(4));
}
const superscript = (digits) => [...digits].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return count(Math.round(value));
}

function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1) return `${fixed(1000 * value, 1)} ms`;
  if (value < 100) return `${fixed(value, 1)} s`;
  return value < 6000 ? `${fixed(value / 60, 1)} min` : `${fixed(value / 3600, 1)} h`;
}

// A surprisal as a probability: "62 %", "1.3 %", "1 in 4,200".
function chance(nats) {
  const p = Math.exp(-nats);
  return p >= 0.01 ? percent(p, p >= 0.1 ? 0 : 1) : `1 in ${count(+(1 / p).toPrecision(2))}`;
}

const $ = (id) => document.getElementById(id);

// element("p.lead", {title: "..."}, "text", node, ...). Attributes that start with "on" are listeners.
function element(kind, attributes = {}, ...children) {
  const [name, ...classes] = kind.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [property, setting] of Object.entries(value)) node.style.setProperty(property, setting);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

// Shows invisible characters and those that change the direction of text. Joiners stay: emoji and scripts need them.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;
const signs = (text) => text.replace(UNSEEN, (mark) => `⟨U+${mark.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const oneLine = (text) => signs(text.replace(/\s+/g, " ").trim());
// A token for a list, with its white space made visible.
const visible = (text) => {
  if (text === "") return "·";
  if (/^ +$/.test(text)) return text.length > 4 ? `␣ × ${text.length}` : "␣".repeat(text.length);
  return signs(text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/^ /, "␣"));
};

const RTL = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/g;
const LTR = /[A-Za-z\u00c0-\u024f\u0370-\u052f\u3040-\u9fff\uac00-\ud7af]/g;
const direction = (text) => ((text.match(RTL) || []).length > (text.match(LTR) || []).length ? "rtl" : "ltr");

// ---- colours ----

const ink = {};
function readInk() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "sheet", "ink", "soft", "muted", "line", "faint", "accent", "point", "alarm", "good", "new"])
    ink[name] = style.getPropertyValue(`--${name}`).trim();
  ink.dark = luminance(rgb(ink.paper)) < 0.2;
}
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const css = (channels, alpha = 1) => `rgb(${channels.map(Math.round).join(" ")} / ${alpha})`;
const mix = (a, b, t) => a.map((value, i) => value + (b[i] - value) * t);
function luminance(channels) {
  const [r, g, b] = channels.map((value) => value / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}
// A colour, made lighter or darker until its contrast to the paper of this theme is `least`.
function onPaper(hex, least = 3) {
  let channels = rgb(hex);
  const paper = rgb(ink.paper), far = ink.dark ? [255, 255, 255] : [0, 0, 0];
  for (let i = 0; i < 20 && contrast(channels, paper) < least; i++) channels = mix(channels, far, 0.1);
  return channels;
}

const RAMPS = {
  light: [[0, "#ffffff"], [0.22, "#fdf0cf"], [0.45, "#fbcf86"], [0.65, "#f0a15c"], [0.83, "#c9472f"], [1, "#86143a"]],
  dark: [[0, "#1b1f24"], [0.22, "#37301c"], [0.45, "#66471a"], [0.65, "#95491f"], [0.83, "#b73a3a"], [1, "#d0407a"]],
};
const CHANGES = {
  light: [[-1, "#12776b"], [-0.35, "#9ed3c8"], [0, "#ffffff"], [0.35, "#fbcf86"], [1, "#c9472f"]],
  dark: [[-1, "#1f9a8a"], [-0.35, "#1d4f4a"], [0, "#1b1f24"], [0.35, "#66471a"], [1, "#b73a3a"]],
};
function along(stops, t) {
  const x = Math.min(Math.max(t, stops[0][0]), stops[stops.length - 1][0]);
  let i = 1;
  while (i < stops.length - 1 && stops[i][0] < x) i++;
  const [x0, a] = stops[i - 1], [x1, b] = stops[i];
  return mix(rgb(a), rgb(b), (x - x0) / (x1 - x0));
}
const ramp = (t) => along(RAMPS[ink.dark ? "dark" : "light"], t);
const change = (t) => along(CHANGES[ink.dark ? "dark" : "light"], t);
const gradient = (colour, from, to) =>
  `linear-gradient(90deg, ${Array.from({ length: 11 }, (_, i) => css(colour(from + ((to - from) * i) / 10))).join(", ")})`;
// A colour for text on a background, with a contrast of 4.5:1; black or white always has it.
function over(background) {
  const inks = [[31, 35, 40], [255, 255, 255], [0, 0, 0]];
  const seen = background.map(Math.round);
  return css(inks.find((each) => contrast(each, seen) >= 4.5));
}

// Gives a canvas the size of its box in device pixels; drawing units are CSS pixels.
// `box`: the size, if known; measuring it makes the browser lay out the page.
function fit(canvas, box = canvas.parentElement.getBoundingClientRect()) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  const width = Math.max(Math.round(box.width * ratio), 1), height = Math.max(Math.round(box.height * ratio), 1);
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, box.width, box.height);
  return { context, width: box.width, height: box.height };
}
