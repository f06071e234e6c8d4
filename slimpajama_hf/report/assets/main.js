// State, the step slider, the zoom, and loading the content.

let run = null;
// Until somebody moves the step, the newest texts are shown, whatever step the page opens at.
const cursor = { index: 0, hover: null, moved: false };
const page = document.documentElement;
const watching = page.dataset.watch !== "no";

// Mean and standard error of the finite `values`.
function meanAndError(values) {
  const all = Array.from(values).filter(Number.isFinite), n = all.length, mean = all.reduce((sum, v) => sum + v, 0) / n;
  return { count: n, mean, error: n > 1 ? Math.sqrt(all.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (n - 1) / n) : NaN };
}
const plusMinus = ({ mean, error }) => `${fixed(mean, 4)} ± ${fixed(error ?? NaN, 4)}`;
function taughtInWords({ meta, taught_next }) {
  const { own } = meta.teaching.all, next = meanAndError(taught_next);
  return `Dots and line: an update lowers the loss of the document that it learned by ${plusMinus(own)} (band: one standard error). `
    + `Dashed: it lowers that of the next document, not learned yet, by ${plusMinus(next)}. ${plural(own.count, "update")} measured, those of the warm-up left out.`;
}

const PANELS = [
  { id: "loss", title: "Loss", unit: "nats per token", values: "loss", wide: true, domains: true, held_out: "loss", read: (v) => fixed(v, 4), caption: "How surprising each document was to the model before it learned it, on average over its tokens. Lower is better." },
  { id: "accuracy", title: "Accuracy", unit: "of next tokens", caption: "How many tokens of each document were the model’s first guess. Higher is better.", values: "accuracy", floor: 0, domains: true, held_out: "accuracy", read: (v) => percent(v), ticks: (ticks, step) => ticks.map((t) => `${fixed(100 * t, decimals(100 * step))} %`) },
  { id: "bits", title: "Bits per byte", unit: "of text", caption: "Bits that the model needs for a byte of text, whatever its tokenizer. Dashed: all documents so far. Lower is better.", values: "bits_per_byte", sums: "bits", weights: "text_bytes", domains: true, dashed: "running_bits", held_out: "bits_per_byte", read: (v) => fixed(v, 3) },
  { id: "gradient", title: "Gradient norm", unit: "before clipping", caption: "How large the gradient of each step was. A peak is a document unlike those before it, or a broken one.", values: "grad_norm", read: (v) => fixed(v, 3) },
  { id: "rate", title: "Learning rate", unit: "of each update", caption: "The rate that each update was made with, warm-up included.", values: "learning_rate", floor: 0, exact: true, read: rate, ticks: (ticks) => ticks.map((t) => (t === 0 ? "0" : t < 1e-3 ? t.toExponential(+t.toExponential().split("e")[0] % 1 ? 1 : 0).replace("e-", "e−") : String(t))) },
  { id: "throughput", title: "Throughput", unit: "tokens per second", caption: "How fast it trained: tokens of a step by its time.", values: "throughput", floor: 0, read: (v) => fixed(v, v < 100 ? 1 : 0) },
  { id: "taught", title: "What a step taught", unit: "nats per token", values: "taught", beside: "taught_next", sparse: true, needs: "was_taught", read: (v) => fixed(v, 4), told: (run) => plusMinus(run.meta.teaching.all.own), caption: taughtInWords },
];
const actions = { go: (i) => moveTo(i), hover: (i) => { if (i !== cursor.hover) { cursor.hover = i; later(drawTops); } }, zoom: zoomTo };
const charts = PANELS.map((panel) => new StepChart(panel, actions));
$("charts").append(...charts.map((chart) => chart.node));

// One panel for each number that was added to this run.
function addPanels() {
  for (const { name, meaning } of run.meta.added) {
    const id = `added-${name}`, title = name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
    if (charts.some((chart) => chart.panel.id === id)) continue;
    const chart = new StepChart({ id, title, unit: meaning, values: `added:${name}`, sparse: true, read: (v) => fixed(v, 4) }, actions);
    charts.push(chart);
    $("charts").append(chart.node);
  }
}

// Work that several events ask for is done once per frame.
const waiting = new Set();
function later(work) {
  if (!waiting.size) requestAnimationFrame(() => { const all = [...waiting]; waiting.clear(); for (const each of all) each(); });
  waiting.add(work);
}

const drawTops = () => { for (const chart of charts) chart.drawTop(); drawTrackTop(); };
const drawCharts = () => { for (const chart of charts) chart.draw(); drawTrack(); };
function drawAll() {
  readInk();
  for (const chart of charts) chart.resize();
  drawCharts();
  for (const still of stills) still.resize();
  reading.draw?.();
}

// ---- the step ----

function moveTo(i, scroll = false) {
  if (!run?.n) return;
  cursor.moved = true;
  later(say);
  cursor.index = Math.min(Math.max(i, 0), run.n - 1);
  later(showStep);
  if (scroll) $("one-step").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}
// The only live region: it announces a step once, after a pause. The slider announces its own steps.
let saying = 0;
function say() {
  clearTimeout(saying);
  if (document.activeElement === $("slider")) return;
  saying = setTimeout(() => {
    const i = cursor.index;
    $("said").textContent = `Step ${count(run.steps[i])}: loss ${fixed(run.loss[i], 4)}, accuracy ${percent(run.accuracy[i])}, domain ${run.meta.domains[run.domain[i]].name}.`;
  }, 400);
}
const goToStep = (step, scroll = false) => moveTo(nearest(run.steps, step), scroll);

function showStep() {
  const step = run.steps[cursor.index];
  $("slider").value = cursor.index;
  $("slider").setAttribute("aria-valuetext", `step ${count(step)}, loss ${fixed(run.loss[cursor.index], 4)}`);
  if (document.activeElement !== $("step")) $("step").value = count(step);
  reading.lit = null;
  showPassport();
  showDocument();
  showWriting();
  drawTops();
  // The address names only a step that somebody chose; otherwise the page opens again at its usual step.
  if (cursor.moved) try { history.replaceState(null, "", `#step=${step}`); } catch { /* some viewers forbid it */ }
}

const STRIDES = [
  ["step", () => null],
  ["document in colour", () => run.coloured],
  ["loss spike", () => [...run.spikes.keys()].sort((a, b) => a - b)],
  ["skipped update", () => [...run.skipped_updates.keys()]],
  ["checkpoint", () => run.meta.events.checkpoints],
  ["resume", () => run.meta.events.resumes],
  ["written prompts", () => run.meta.prompts.map((entry) => entry.step)],
  ["sample", () => run.meta.samples.map((entry) => entry.step)],
];

function stride(way, name = $("stride").value) {
  if (!run?.n) return;
  const steps = STRIDES.find(([each]) => each === name)[1]();
  if (!steps) return moveTo(cursor.index + way);
  const now = run.steps[cursor.index], last = run.steps[run.n - 1];
  const reachable = steps.filter((step) => step <= last);
  const next = way > 0 ? reachable.find((step) => step > now) : reachable.filter((step) => step < now).pop();
  if (next !== undefined) goToStep(next);
}

function fillStrides() {
  const select = $("stride"), chosen = select.value;
  select.replaceChildren(...STRIDES.filter(([, find]) => find() === null || find().length).map(([name]) => element("option", { value: name }, name)));
  if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
}

// ---- zoom and domains ----

function zoomTo(from, to) {
  const end = Math.max(run.meta.steps - 1, 1), least = Math.min(8, end);
  from = Math.max(from, 0); to = Math.min(to, end);
  if (to - from < least) { const middle = Math.min(Math.max((from + to) / 2, least / 2), end - least / 2); from = middle - least / 2; to = middle + least / 2; }
  [view.from, view.to] = [from, to];
  $("unzoom").disabled = from <= 0 && to >= end;
  later(drawCharts);
}

const nearestShown = (step) => {
  const { all } = charts[0];
  if (!all.index.length) return nearest(run.steps, step);
  const k = Math.min(all.place(lowerBound(run.steps, step)), all.index.length - 1);
  return k > 0 && step - run.steps[all.index[k - 1]] < run.steps[all.index[k]] - step ? all.index[k - 1] : all.index[k];
};

function chooseDomains() {
  const { domain, n, meta } = run, names = meta.domains.map((d) => d.full);
  const open = names.map((name) => !shown.hidden.has(name));
  const lists = names.map(() => []), chosen = [];
  for (let i = 0; i < n; i++) if (open[domain[i]]) { chosen.push(i); lists[domain[i]].push(i); }
  const byDomain = lists.map((index, d) => ({ domain: d, index })).filter(({ domain: d, index }) => open[d] && index.length >= 8).slice(0, 12);
  for (const chart of charts) {
    chart.node.hidden = chart.panel.needs !== undefined && !run[chart.panel.needs];
    chart.use(run, chosen, byDomain);
  }
}

function showDomains() {
  const { domains } = run.meta, all = domains.map((d) => d.full);
  const chips = domains.map((d) => element("button.chip", {
    type: "button", title: `${d.full}: click to switch, double-click for it alone`, "aria-pressed": String(!shown.hidden.has(d.full)), style: { "--colour": css(onPaper(d.colour)) },
    onclick: () => { shown.hidden.has(d.full) ? shown.hidden.delete(d.full) : shown.hidden.add(d.full); if (shown.hidden.size >= all.length) shown.hidden.clear(); changed(); },
    ondblclick: () => { shown.hidden = new Set(all.filter((name) => name !== d.full)); changed(); },
  }, element("i"), d.name, element("span", {}, short(d.steps))));
  if (shown.hidden.size) chips.push(element("button.link", { type: "button", onclick: () => { shown.hidden.clear(); changed(); } }, "all"));
  const focused = [...$("domains").children].indexOf(document.activeElement);
  $("domains").replaceChildren(...chips);
  if (focused >= 0) $("domains").children[focused]?.focus();
  function changed() { chooseDomains(); showDomains(); later(drawCharts); }
}

function showMarks() {
  const { events, evaluations } = run.meta, marks = [];
  const add = (sign, number, noun, alarm) => number && marks.push(element("span", {}, element(alarm ? "b.alarm-text" : "b", {}, sign), plural(number, noun)));
  add("▼", events.spikes.length, "loss spike", true);
  add("✕", events.skipped_updates.length, "skipped update", true);
  add("◆", events.checkpoints.length, "checkpoint");
  add("┆", events.resumes.length, "resume");
  add("○", evaluations.length, "held-out score");
  if (evaluations.some((entry) => entry.averaged)) marks.push(element("span", {}, element("b", {}, "●"), "the same of averaged weights"));
  const many = run.n > 1200;
  marks.push(element("span", {}, many ? "bands: all, 80 % and half of the steps; zoom in for single documents" : "dots: single documents in the colour of their domain"));
  marks.push(element("span", {}, "thick line: mean of the steps around, thin: of each domain"));
  $("marks").replaceChildren(...marks);
}

// ---- the track of the slider: the loss of the whole run, the marks, the part in view ----

const trackTop = element("canvas", { "aria-hidden": "true" });
$("track").after(trackTop);
const THUMB = 8;
let trackBox = { width: 1, height: 1 };
const trackX = (i, width) => THUMB + (i / Math.max(run.n - 1, 1)) * (width - 2 * THUMB);

function drawTrack() {
  if (!run?.n) return;
  trackBox = $("track").parentElement.getBoundingClientRect();
  const { context: c, width, height } = fit($("track"), trackBox);
  const chart = charts[0], columns = Math.max(Math.floor(width - 2 * THUMB), 1), means = [];
  for (let x = 0; x < columns; x++) {
    const a = chart.all.place(Math.floor((x / columns) * run.n)), b = Math.max(chart.all.place(Math.ceil(((x + 1) / columns) * run.n)), a + 1);
    means.push(chart.all.mean(Math.max(Math.min(a, b - 8), 0), Math.min(b, chart.all.index.length)));
  }
  const good = means.filter(Number.isFinite), low = Math.min(...good), high = Math.max(...good), top = 9, bottom = height - 9;
  const y = (value) => bottom - ((value - low) / (high - low || 1)) * (bottom - top);
  c.fillStyle = ink.faint;
  c.fillRect(THUMB, 0, columns, height);
  const a = trackX(lowerBound(run.steps, view.from), width), b = trackX(Math.min(lowerBound(run.steps, view.to), run.n - 1), width);
  if (!$("unzoom").disabled) { c.fillStyle = css(rgb(ink.accent), 0.13); c.fillRect(a, 0, Math.max(b - a, 2), height); }
  c.strokeStyle = ink.point; c.lineWidth = 1.4; c.lineJoin = "round"; c.beginPath();
  let begun = false;
  means.forEach((value, x) => { if (!Number.isFinite(value)) return; begun ? c.lineTo(THUMB + x, y(value)) : c.moveTo(THUMB + x, y(value)); begun = true; });
  c.stroke();
  const ticks = (steps, colour, from, to) => {
    c.strokeStyle = colour; c.lineWidth = 1; c.beginPath();
    let free = -9;
    for (const step of steps) { const x = Math.round(trackX(nearest(run.steps, step), width)) + 0.5; if (x - free < 1.5) continue; free = x; c.moveTo(x, from); c.lineTo(x, to); }
    c.stroke();
  };
  ticks(run.coloured, css(rgb(ink.accent), 0.55), height - 5, height);
  ticks([...run.spikes.keys()].sort((x1, x2) => x1 - x2), ink.alarm, 0, 6);
  ticks(run.skipped_updates.keys(), ink.alarm, 0, height);
  ticks(run.meta.events.checkpoints, ink.muted, height - 9, height);
  ticks(run.meta.events.resumes, ink.muted, 0, height);
  drawTrackTop();
}

function drawTrackTop() {
  if (!run?.n) return;
  const { context: c, width, height } = fit(trackTop, trackBox);
  const x = trackX(cursor.index, width);
  if (cursor.hover !== null) { c.fillStyle = ink.muted; c.fillRect(trackX(cursor.hover, width) - 0.5, 0, 1, height); }
  c.fillStyle = ink.accent;
  c.fillRect(x - 1, 0, 2, height);
  c.beginPath(); c.arc(x, height / 2, 7, 0, 7); c.fill();
  c.strokeStyle = ink.paper; c.lineWidth = 2; c.stroke();
}

// ---- content ----

function take(content, first) {
  const before = run, follow = !before || cursor.index === before.n - 1 && before.n > 0;
  const whole_ = !before || $("unzoom").disabled, step = before?.n ? before.steps[cursor.index] : null;
  run = derive(content);
  readInk();
  shownWriting = "";
  cursor.hover = null;
  fillStrides();
  if (!first) showFigures();
  for (const old of document.querySelectorAll(".top > .note.told")) old.remove();
  for (const text of run.meta.notes) $("failure").before(element("p.note.told", {}, signs(text)));
  showRecord();
  showHeldOut();
  showLast();
  chooseWindow();
  $("slider").max = Math.max(run.n - 1, 0);
  if (!run.n) { nothingYet(); return; }
  for (const id of ["curves", "one-step", "writing", "learning", "corpus"]) $(id).hidden = false;
  $("scrubber").hidden = false;
  addPanels();
  if (whole_) { view.from = 0; view.to = Math.max(run.meta.steps - 1, 1); }
  chooseDomains();
  showDomains();
  showMarks();
  showLayers();
  showTeaching();
  showCorpus();
  const wanted = first ? /^#step=(\d+)$/.exec(location.hash) : null;
  if (wanted) { cursor.index = nearest(run.steps, +wanted[1]); cursor.moved = true; }
  else if (step !== null && !follow) cursor.index = nearest(run.steps, step);
  else if (!first) cursor.index = run.n - 1;
  else cursor.index = startingPlace();
  showStep();
  drawAll();
}

// The page opens at a late, readable document (documents.late_and_readable), else at the last step.
const startingPlace = () => (run.meta.opens_at === null ? run.n - 1 : nearest(run.steps, run.meta.opens_at));

function showFigures() {
  const { headline: head, steps } = run.meta;
  for (const [id, value] of [["steps", count(steps)], ["loss", fixed(head.loss, 3)], ["accuracy", percent(head.accuracy ?? NaN)], ["bits-per-byte", fixed(head.bits_per_byte, 3)], ["tokens", thousands(head.tokens)], ["training-time", seconds(head.seconds)]]) $(`figure-${id}`).textContent = value;
  showLast();
  $("figure-tokens").nextSibling.textContent = `${thousands(head.text_bytes)}B of text`;
  $("figure-training-time").nextSibling.textContent = `${fixed(head.throughput, 0)} tokens per second`;
}
const thousands = (value) => { const [size, letter] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => value >= size) ?? [1, ""]; return `${size > 1 ? +(value / size).toPrecision(3) : count(value)} ${letter}`; };

function nothingYet() {
  for (const id of ["curves", "one-step", "writing", "learning", "corpus"]) $(id).hidden = true;
  $("scrubber").hidden = true;
}

// A window is never longer than the run; until somebody chooses one, it grows with the run.
const WINDOWS = [1, 10, 50, 200, 1000, 5000];
function chooseWindow() {
  const n = run.meta.steps, some = WINDOWS.filter((w) => w <= Math.max(n, 1));
  if (!shown.chosen) shown.window = Math.min(n > 60000 ? 1000 : n > 8000 ? 200 : n > 300 ? 50 : 10, some.at(-1));
  $("window").replaceChildren(...some.map((w) => element("option", { value: w, ...(w === shown.window ? { selected: "" } : {}) }, count(w))));
}

function fail(text) {
  $("failure").textContent = text;
  $("failure").hidden = false;
}

// ---- controls ----

$("slider").addEventListener("input", (event) => moveTo(+event.target.value));
$("back").addEventListener("click", () => stride(-1));
$("forth").addEventListener("click", () => stride(1));
$("step").addEventListener("change", (event) => { const step = parseInt(event.target.value.replace(/[^\d]/g, ""), 10); if (Number.isFinite(step)) goToStep(step); else later(showStep); });
$("step").addEventListener("keydown", (event) => { if (event.key === "Enter") event.target.blur(); event.stopPropagation(); });
$("step").addEventListener("focus", (event) => event.target.select());
$("window").addEventListener("change", (event) => { shown.window = +event.target.value; shown.chosen = true; later(drawCharts); });
$("unzoom").addEventListener("click", () => zoomTo(-Infinity, Infinity));
for (const button of $("scale").children)
  button.addEventListener("click", () => {
    view.log = button.dataset.value === "log";
    for (const each of $("scale").children) each.setAttribute("aria-pressed", String(each === button));
    later(drawCharts);
  });
document.addEventListener("keydown", (event) => {
  if (event.target.closest?.("input:not(#slider), select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!way) return;
  event.preventDefault();
  stride(way, event.shiftKey ? "document in colour" : "step");
});
addEventListener("scroll", hidePopover, { passive: true });
addEventListener("hashchange", () => { const wanted = /^#step=(\d+)$/.exec(location.hash); if (wanted && run?.n) goToStep(+wanted[1]); });

const THEMES = [["", "◐", "as the system has them"], ["light", "☀", "light"], ["dark", "☾", "dark"]];
function useTheme(name) {
  const [key, sign, words] = THEMES.find(([each]) => each === name) || THEMES[0];
  if (key) page.dataset.theme = key; else delete page.dataset.theme;
  $("theme").textContent = sign;
  $("theme").setAttribute("aria-label", `Colours: ${words}`);
  $("theme").title = `Colours: ${words}`;
  repaint();
}
function repaint() {
  if (!run?.n) return;
  readInk();
  showDomains(); showPassport(); showDocument(); showTeaching(); showCorpus();
  later(drawAll);
}
const remembered = (() => { try { return localStorage.getItem("report-theme") || ""; } catch { return ""; } })();
$("theme").addEventListener("click", () => {
  const now = THEMES.findIndex(([key]) => key === (page.dataset.theme || "")), [next] = THEMES[(now + 1) % THEMES.length];
  try { localStorage.setItem("report-theme", next); } catch { /* a file opened from disk may have no storage */ }
  useTheme(next);
});
useTheme(remembered);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
new ResizeObserver(() => { if (run?.n && !("printing" in page.dataset)) later(drawAll); }).observe(document.body);

// For printing: light colours, and every chart drawn anew at its width on paper (page.css, [data-printing]).
addEventListener("beforeprint", () => {
  if (!run?.n) return;
  page.dataset.printing = page.dataset.theme ?? "";
  page.dataset.theme = "light";
  readInk();
  showDomains(); showPassport(); showDocument(); showTeaching(); showCorpus();
  drawAll();
});
addEventListener("afterprint", () => {
  if (!run?.n) return;
  const theme = page.dataset.printing;
  delete page.dataset.printing;
  useTheme(theme);
});

nothingYet();
if (watching) follow();
else {
  // Wait until the head of the page is painted; a page in the background gets no frame, so not for long.
  const painted = new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); setTimeout(done, 200); });
  Promise.all([gunzip(fromBase64($("data").textContent.trim())), painted])
    .then(([bytes]) => { $("data").remove(); take(unpack(bytes), true); page.dataset.ready = "yes"; })
    .catch((error) => fail(`This report cannot be shown: ${error.message}`));
}
