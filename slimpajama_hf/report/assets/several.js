// Several runs side by side: their curves in one chart, a table, and the differences of their configurations.

const { names, differences } = JSON.parse(new TextDecoder().decode(Uint8Array.from(atob($("data").textContent.trim()), (letter) => letter.charCodeAt(0))));
// Okabe and Ito's colours, which colour-blind readers can tell apart; a run keeps its colour.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933"];
const AXES = { steps: ["step", count], tokens: ["tokens", short], seconds: ["training time", seconds] };
const FONT = '12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';
const page = document.documentElement;
let axis = "steps", runs = [], plot = null, zoomed = false;

const colour = (k) => css(onPaper(COLOURS[k % COLOURS.length]));
const dash = (k) => (k >= COLOURS.length ? [7, 4] : []);

// uPlot needs common x values for all curves: those of all runs, sorted. A run has no value at those of the others.
const table = () => uPlot.join(runs.map(({ curve }) => [curve[axis], curve.loss]));

function build() {
  plot?.destroy();
  readInk();
  const box = $("plot").getBoundingClientRect(), [, text] = AXES[axis];
  plot = new uPlot({
    width: box.width, height: box.height, padding: [10, 24, 0, 0], legend: { show: false },
    series: [{}, ...runs.map((run, k) => ({ label: run.name, stroke: colour(k), dash: dash(k), width: 2.2, spanGaps: true, points: { show: false } }))],
    scales: { x: { time: false }, y: { range: (u, low, high) => { const pad = 0.06 * (high - low) || 0.1; return [low - pad, high + pad]; } } },
    axes: [
      { font: FONT, stroke: () => ink.muted, size: 26, grid: { show: false }, ticks: { show: false }, space: 84, values: (u, ticks) => ticks.map((tick) => (tick < 0 ? "" : text(tick))) },
      { font: FONT, stroke: () => ink.muted, size: 46, ticks: { show: false }, grid: { stroke: () => ink.line, width: 1 } },
    ],
    cursor: { y: false, focus: { prox: 24 }, drag: { x: true, y: false, dist: 5 }, points: { size: 9 } },
    focus: { alpha: 0.35 },
    hooks: { setCursor: [(u) => showKeys(u.cursor.left < 0 ? null : u.posToVal(u.cursor.left, "x"))], setSelect: [(u) => { if (u.select.width) { zoomed = true; $("unzoom").disabled = false; } }] },
  }, table(), $("plot"));
}

// The loss of each run at a place on the axis, or its last loss.
function showKeys(at = null) {
  $("keys").replaceChildren(...runs.map((run, k) => {
    const { curve } = run, places = curve[axis];
    let place = places.length - 1;
    if (at !== null) { while (place > 0 && places[place] > at) place--; }
    const beyond = at !== null && places.length && at > places[places.length - 1];
    return element("span", {}, element("i.line-key", { style: { "--colour": colour(k) } }), run.name,
      element("output", {}, place < 0 || beyond ? "–" : `${fixed(curve.loss[place], 3)} at ${AXES[axis][1](places[place])}`));
  }));
}

const words = ({ training, steps, max_steps: goal }) => (training ? "training" : training === null ? "on another machine" : goal && steps >= goal ? "done" : steps ? "not training" : "not begun");
const gigabytes = (bytes) => (bytes >= 1e9 ? `${fixed(bytes / 1e9, 1)} GB` : `${fixed(bytes / 1e6, 0)} MB`);

function showTable({ equal_steps: equal, window }) {
  $("window").textContent = count(window);
  $("equal").textContent = equal ? `All have reached step ${count(equal)}: compare them there.` : "";
  const rows = runs.map((run, k) => {
    const { state } = run, { steps = 0, max_steps: goal = null } = state, small = (text) => element("small", {}, text);
    const done = goal ? Math.min(steps / goal, 1) : 0, known = (value) => value !== null && value !== undefined;
    return [
      ["run", element("i.line-key"), element("a", { href: `run/${k}/` }, run.name), small(words(state))],
      ["steps", goal ? `${count(steps)} of ${count(goal)}` : count(steps), goal ? element("div.progress", {}, element("i", { style: { width: `${100 * done}%` } })) : null],
      ["training time", seconds(run.seconds), state.training && known(state.left_seconds) ? small(`${seconds(state.left_seconds)} left`) : null],
      ...(equal ? [[`loss at step ${count(equal)}`, element("b", {}, fixed(run.equal_loss, 4))]] : []),
      [`loss, last ${count(window)}`, fixed(run.loss, 4)],
      ["held-out loss", fixed(run.held_out, 4)],
      ["accuracy", percent(run.accuracy ?? NaN)],
      ["bits per byte", fixed(run.bits_per_byte, 3)],
      ["tokens per second", fixed(run.throughput, 0), small(`${short(run.tokens)} in all`)],
      ["memory", known(state.process_bytes) ? gigabytes(state.process_bytes) : "–", ...(state.gpus ?? []).map((gpu, n) => small(`GPU ${n}: ${gigabytes(gpu.used_bytes)}`))],
      ["MFU", known(state.used) ? percent(state.used, 0) : "–"],
    ];
  });
  $("runs-head").replaceChildren(element("tr", {}, rows[0].map(([name]) => element("th", { scope: "col" }, name))));
  $("runs-body").replaceChildren(...rows.map((cells, k) => element("tr", { style: { "--colour": colour(k) } },
    cells.map(([name, ...parts], n) => element("td", n ? { "data-name": name } : {}, parts)))));
}

function showDifferences() {
  if (!differences.length) return $("differences").replaceChildren(element("p.lead", {}, "Only in the folders that they write to."));
  $("differences").replaceChildren(element("table.figures-table.differ", {},
    element("thead", {}, element("tr", {}, ["setting", ...names].map((name, k) => element("th", { scope: "col" }, k ? element("i.line-key", { style: { "--colour": colour(k - 1) } }) : null, name)))),
    element("tbody", {}, differences.map(([key, ...values]) => element("tr", {}, element("td", {}, key), values.map((value) => element(value === null ? "td.none" : "td", {}, value === null ? "default" : signs(value))))))));
}

function take(found) {
  const built = plot && runs.length === found.runs.length;
  runs = found.runs;
  const on = runs.filter(({ state }) => state.training).length;
  $("live").className = on ? "" : "still";
  $("live").textContent = on ? `live · ${count(on)} training` : "none is training";
  showTable(found);
  if (!built) build();
  else plot.setData(table(), !zoomed);
  if (zoomed) plot.redraw();
  if (plot.cursor.left < 0 || plot.cursor.left === undefined) showKeys();
  page.dataset.ready = "yes";
}

for (const button of $("axis").children) button.addEventListener("click", () => {
  axis = button.dataset.value;
  for (const each of $("axis").children) each.setAttribute("aria-pressed", String(each === button));
  unzoom();
  build();
  showKeys();
});
function unzoom() { zoomed = false; $("unzoom").disabled = true; }
$("unzoom").addEventListener("click", () => { unzoom(); plot.setData(table()); });
$("plot").addEventListener("dblclick", () => { unzoom(); plot.setData(table()); });
new ResizeObserver(() => { const box = $("plot").getBoundingClientRect(); if (plot && box.width) plot.setSize({ width: box.width, height: box.height }); }).observe($("plot"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readInk(); if (plot) { build(); showKeys(); showDifferences(); } });

readInk();
showDifferences();
const news = new EventSource("events");
news.addEventListener("runs", (event) => take(JSON.parse(event.data)));
news.onerror = () => { $("live").className = "lost"; $("live").textContent = "not connected"; };
