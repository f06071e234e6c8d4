// Step charts on uPlot: it has the scales, the axes, the lines, the cursor and the zoom. What it has not is drawn in its
// hooks: single steps as dots of their domain, or as a fan of quantiles where they are many, and the marks.

const view = { from: 0, to: 1, log: false }; // in steps
const shown = { hidden: new Set(), window: 50 };

const across = (step) => (view.log ? Math.log10(Math.max(step, 0) + 1) : step);
const back = (u) => (view.log ? 10 ** u - 1 : u);

// Places of the ticks of the step axis; `incr` is what uPlot found room for.
function stepTicks(width, incr) {
  const ticks = [];
  if (!view.log) for (let k = Math.ceil(view.from / incr); k * incr <= view.to; k++) ticks.push(k * incr);
  else {
    ticks.push(0);
    for (let power = 1; power <= view.to * 1.001; power *= 10) for (const f of width > 500 ? [1, 2, 5] : [1]) ticks.push(f * power);
  }
  return ticks.filter((t) => t >= view.from && t <= view.to);
}

const decimals = (value) => (String(value).split(".")[1] || "").length;
// Texts of ticks: all with as many digits after the point as the one that needs most.
function tickTexts(ticks) {
  const digits = Math.max(...ticks.map(decimals));
  return ticks.map((tick) => (Math.abs(tick) >= 10000 ? short(tick) : fixed(tick, digits)));
}

// A canvas of the size that its box has, in device pixels; drawing units are CSS pixels.
// `box`: the size if it is known already; asking makes the browser lay out the page.
function fit(canvas, box = canvas.parentElement.getBoundingClientRect()) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  const width = Math.max(Math.round(box.width * ratio), 1), height = Math.max(Math.round(box.height * ratio), 1);
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, box.width, box.height);
  return { context, width: box.width, height: box.height };
}

const FONT = '12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';
const PADDING = [8, 9, 0, 0]; // CSS pixels over, right of, under and left of a plot and its axes
const WHOLE = [1, 2, 2.5, 5].flatMap((f) => [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8].map((power) => f * power)).filter(Number.isInteger).sort((a, b) => a - b);

// The axes of every chart. `x`, `y`: what differs, in uPlot's terms.
function axesOf(x, y) {
  const common = { font: FONT, stroke: () => ink.muted, ticks: { show: false } };
  return [
    { ...common, size: 24, gap: 5, space: 72, grid: { show: false }, ...x },
    { ...common, size: 46, gap: 7, space: 46, grid: { stroke: () => ink.line, width: 1 }, values: (_, ticks) => tickTexts(ticks), ...y },
  ];
}

// Sums up to each carried step of some steps: means over any window are one subtraction.
class Sums {
  constructor(run, panel, chosen) {
    const values = run[panel.values], weights = panel.weights ? run[panel.weights] : null;
    this.index = chosen;
    this.total = new Float64Array(chosen.length + 1);
    this.weight = new Float64Array(chosen.length + 1);
    for (let k = 0; k < chosen.length; k++) {
      const i = chosen[k], weight = weights ? weights[i] : 1, good = Number.isFinite(values[i]);
      this.total[k + 1] = this.total[k] + (good ? (panel.sums ? run[panel.sums][i] : values[i] * weight) : 0);
      this.weight[k + 1] = this.weight[k] + (good ? weight : 0);
    }
  }
  mean(low, high) {
    const weight = this.weight[high] - this.weight[low];
    return weight > 0 ? (this.total[high] - this.total[low]) / weight : NaN;
  }
  // First place among the chosen whose carried index is at or after `i`.
  place(i) {
    let low = 0, high = this.index.length;
    while (low < high) { const m = (low + high) >> 1; if (this.index[m] < i) low = m + 1; else high = m; }
    return low;
  }
}

// Draw in CSS pixels on the canvas of a chart, inside its plot or, `beyond` it, as far as its padding.
function paint(u, beyond, draw) {
  const { ctx: c } = u, ratio = uPlot.pxRatio, { left, top, width, height } = u.bbox;
  c.save();
  c.beginPath(); c.rect(left - beyond * ratio, top - beyond * ratio, width + 2 * beyond * ratio, height + 2 * beyond * ratio); c.clip();
  c.scale(ratio, ratio);
  c.font = FONT;
  draw(c);
  c.restore();
}

class StepChart {
  // panel: {id, title, unit, values, weights?, sums?, wide?, floor?, domains?, dashed?, held_out?, exact?, sparse?, read, ticks?}
  constructor(panel, actions) {
    this.panel = panel;
    this.actions = actions;
    this.output = element("output");
    this.plot = element("div.plot", { role: "img", "aria-label": `${panel.title} (${panel.unit}) by step` });
    this.node = element(panel.wide ? "div.chart.wide" : "div.chart", { id: `chart-${panel.id}` },
      element("div.chart-head", {}, element("h3", {}, panel.title, element("small", {}, panel.unit)), this.output), this.plot);
    // The line of the slider and its dot; the line under the pointer is uPlot's.
    this.line = element("div.now");
    this.dot = element("div.dot-now");
  }

  use(run, chosen, byDomain) {
    this.run = run;
    // Of what only some steps have, only those count.
    this.chosen = this.panel.sparse ? chosen.filter((i) => Number.isFinite(run[this.panel.values][i])) : chosen;
    this.all = new Sums(run, this.panel, this.chosen);
    this.lines = this.panel.domains && byDomain.length > 1
      ? byDomain.map(({ domain, index }) => ({ domain, sums: new Sums(run, this.panel, index) })) : [];
    // Its series may be others now.
    this.u?.destroy();
    this.u = null;
  }

  make(width, height) {
    const { panel } = this, smooth = { points: { show: false }, spanGaps: true };
    const series = [{},
      ...this.lines.map(({ domain }) => ({ ...smooth, width: 1.25, stroke: () => css(onPaper(this.run.meta.domains[domain].colour), 0.9) })),
      { ...smooth, width: 5, stroke: () => ink.paper },
      { ...smooth, width: 2.2, stroke: () => (this.lines.length ? ink.ink : ink.accent) },
      ...(panel.dashed ? [{ ...smooth, width: 1.5, dash: [6, 4], stroke: () => ink.alarm }] : []),
    ];
    this.u = new uPlot({
      width, height, series, padding: PADDING, legend: { show: false },
      scales: { x: { time: false, distr: 100, fwd: across, bwd: back, range: () => [view.from, view.to] }, y: { range: () => [this.low, this.high] } },
      axes: axesOf(
        // (uPlot leaves labels out on scales that it takes for logarithmic.)
        { incrs: WHOLE, filter: (u, ticks) => ticks, splits: (u, axis, min, max, incr) => stepTicks(u.bbox.width / uPlot.pxRatio, incr), values: (u, ticks) => ticks.map(count) },
        panel.ticks ? { values: (u, ticks) => panel.ticks(ticks) } : {}),
      cursor: {
        y: false, points: { show: false }, sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => { this.actions.zoom(-Infinity, Infinity); } },
      },
      hooks: {
        drawAxes: [() => paint(this.u, 6, (c) => this.drawSteps(c))],
        draw: [() => { paint(this.u, 8, (c) => this.drawOver(c)); this.drawTop(); }],
        setCursor: [(u) => { if (u.over.matches(":hover")) this.actions.hover(u.cursor.left >= 0 ? this.pick(u.cursor.left, u.cursor.top) : null); }],
        setSelect: [(u) => {
          const { left, width: wide } = u.select;
          if (wide < 3) return;
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          this.actions.zoom(u.posToVal(left, "x"), u.posToVal(left + wide, "x"));
        }],
      },
    }, this.data, this.plot);
    this.u.over.append(this.line, this.dot);
    this.listen(this.u.over);
  }

  // Of the plot, in CSS pixels of the canvas.
  frame() {
    const { left, top, width, height } = this.u.bbox, ratio = uPlot.pxRatio;
    return { left: left / ratio, right: (left + width) / ratio, top: top / ratio, bottom: (top + height) / ratio };
  }
  x(step) { return this.u.valToPos(step, "x") + this.u.bbox.left / uPlot.pxRatio; }
  y(value) { return this.u.valToPos(value, "y") + this.u.bbox.top / uPlot.pxRatio; }
  step(x) { return this.u.posToVal(x - this.u.bbox.left / uPlot.pxRatio, "x"); }

  // Limits that show the course of what is in view, not its outliers.
  limits(first, last, values) {
    const picked = [];
    const stride = Math.max(1, Math.floor((last - first) / 1500));
    for (let k = first; k < last; k += stride) { const v = values[this.chosen[k]]; if (Number.isFinite(v)) picked.push(v); }
    if (!picked.length) return [0, 1];
    picked.sort((a, b) => a - b);
    const at = (q) => picked[Math.round(q * (picked.length - 1))];
    const fence = 3 * (at(0.75) - at(0.25)) || Math.abs(at(0.5)) || 1;
    const inside = picked.filter((v) => v >= at(0.25) - fence && v <= at(0.75) + fence);
    let low = Math.min(at(0.01), inside[0]), high = Math.max(at(0.99), inside[inside.length - 1]);
    // A long run still shows the height that it fell from.
    for (const mean of this.curve) if (mean !== null) { low = Math.min(low, mean); high = Math.max(high, mean); }
    const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
    low = this.panel.floor === 0 ? 0 : low < 0 ? low - pad : Math.max(0, low - pad);
    return [low, high + pad];
  }

  // The lines at the same steps, a few at most a pixel: [steps, of each domain, of all twice, what is dashed].
  sample(width, window) {
    const { steps } = this.run, first = lowerBound(steps, view.from), last = Math.min(lowerBound(steps, view.to + 1e-9) + 1, this.run.n);
    const ends = []; // carried steps up to which means are taken
    if (last - first <= width * 1.5) for (let i = first; i < last; i++) ends.push(i + 1);
    else for (let k = 1; k <= width; k++) {
      const end = Math.min(lowerBound(steps, back(across(view.from) + (k / width) * (across(view.to) - across(view.from)))) + 1, last);
      if (end > (ends[ends.length - 1] ?? first)) ends.push(end);
    }
    const means = (sums, over) => {
      let before = sums.place(ends.length ? ends[0] - 1 : 0);
      return ends.map((end) => {
        const k = sums.place(end);
        if (k === before && k > 0 && sums.index[k - 1] !== end - 1) return null; // none of its steps is here
        // A pixel that holds more steps than the window is their mean.
        const mean = sums.mean(Math.max(Math.min(k - over, before), 0), k);
        before = k;
        return Number.isFinite(mean) ? mean : null;
      });
    };
    this.curve = means(this.all, window);
    const dashed = this.panel.dashed ? [ends.map((end) => { const v = this.run[this.panel.dashed][end - 1]; return Number.isFinite(v) ? v : null; })] : [];
    return [
      ends.map((end) => steps[end - 1]),
      // As many of its documents as stand among that many steps.
      ...this.lines.map(({ sums }) => means(sums, Math.max(Math.round((window * sums.index.length) / this.all.index.length), 10))),
      this.curve, this.curve, ...dashed,
    ];
  }

  get window() {
    return this.panel.exact ? 1 : this.panel.sparse ? 10 : Math.max(Math.round(shown.window / this.run.meta.every), 1);
  }

  draw() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (!this.run || !this.run.n || width < 80) return;
    const { steps } = this.run;
    this.first = this.all.place(lowerBound(steps, view.from));
    this.last = this.all.place(lowerBound(steps, view.to + 1e-9) + 1);
    this.data = this.sample(Math.round(width) - 55, this.window);
    [this.low, this.high] = this.limits(this.first, this.last, this.run[this.panel.values]);
    if (this.u && this.log !== view.log) {
      // uPlot keeps what a scale's ends are until the ends change.
      this.u.destroy();
      this.u = null;
    }
    this.log = view.log;
    if (!this.u) this.make(width, height);
    else {
      if (this.u.width !== width || this.u.height !== height) this.u.setSize({ width, height });
      this.u.setData(this.data);
    }
  }

  // Under the lines: resumes run through; steps as dots, or as a fan.
  drawSteps(c) {
    const { left, right, top, bottom } = this.frame(), { first, last } = this, values = this.run[this.panel.values];
    c.strokeStyle = ink.muted; c.lineWidth = 1; c.setLineDash([3, 4]);
    for (const step of this.run.meta.events.resumes) if (step >= view.from && step <= view.to) { const x = Math.round(this.x(step)) + 0.5; c.beginPath(); c.moveTo(x, top); c.lineTo(x, bottom); c.stroke(); }
    c.setLineDash([]);
    if (!this.panel.exact && last - first <= Math.max((right - left) * 2.2, 700)) this.drawDots(c, first, last, values);
    else if (!this.panel.exact) this.drawFan(c, first, last, values);
    if (this.panel.floor === undefined && this.low < 0) { c.fillStyle = ink.muted; c.fillRect(left, Math.round(this.y(0)), right - left, 1); }
  }

  // Over them: held-out scores, and the marks.
  drawOver(c) {
    for (const entry of this.panel.held_out ? this.run.meta.evaluations : []) {
      const value = entry[this.panel.held_out];
      if (!Number.isFinite(value) || entry.step < view.from || entry.step > view.to) continue;
      c.fillStyle = ink.paper; c.strokeStyle = ink.ink; c.lineWidth = 1.6;
      c.beginPath(); c.arc(this.x(entry.step), this.y(value), 4, 0, 7); c.fill(); c.stroke();
    }
    if (this.panel.wide) this.drawMarks(c);
  }

  drawDots(c, first, last, values) {
    const many = last - first, size = many < 150 ? 3 : many < 500 ? 2.3 : 1.7;
    const { top } = this.frame();
    for (let d = 0; d < this.run.meta.domains.length; d++) {
      c.fillStyle = css(onPaper(this.run.meta.domains[d].colour), many < 500 ? 0.75 : 0.5);
      c.beginPath();
      for (let k = first; k < last; k++) {
        const i = this.chosen[k], value = values[i];
        if (this.run.domain[i] !== d || !Number.isFinite(value)) continue;
        const x = this.x(this.run.steps[i]), y = this.y(value);
        if (y < top - 2) { c.moveTo(x, top - 3); c.lineTo(x - 2.5, top + 2); c.lineTo(x + 2.5, top + 2); c.closePath(); continue; }
        c.moveTo(x + size, y); c.arc(x, y, size, 0, 6.2832);
      }
      c.fill();
    }
  }

  drawFan(c, first, last, values) {
    const { left, right } = this.frame(), steps = this.run.steps, columns = [];
    const lows = this.run[`${this.panel.values}_low`] || values, highs = this.run[`${this.panel.values}_high`] || values;
    // Extremes of blocks are those of all domains together.
    const blocks = lows !== values && !shown.hidden.size;
    const width = 3;
    let k = first;
    for (let x = left; x < right && k < last; x += width) {
      const end = Math.min(this.all.place(lowerBound(steps, this.step(x + width))), last);
      if (end <= k) continue;
      let low = Infinity, high = -Infinity;
      const some = [], stride = Math.max(1, Math.floor((end - k) / 64));
      for (let j = k; j < end; j++) {
        const i = this.chosen[j], value = values[i];
        if (!Number.isFinite(value)) continue;
        low = Math.min(low, blocks ? lows[i] : value); high = Math.max(high, blocks ? highs[i] : value);
        if ((j - k) % stride === 0) some.push(value);
      }
      k = end;
      if (!some.length) continue;
      some.sort((a, b) => a - b);
      const at = (q) => some[Math.round(q * (some.length - 1))];
      columns.push([x + width / 2, low, at(0.1), at(0.25), at(0.75), at(0.9), high]);
    }
    const area = (a, b, alpha) => {
      c.fillStyle = css(rgb(ink.point), alpha);
      c.beginPath();
      columns.forEach((column, i) => (i ? c.lineTo(column[0], this.y(column[b])) : c.moveTo(column[0], this.y(column[b]))));
      for (let i = columns.length - 1; i >= 0; i--) c.lineTo(columns[i][0], this.y(columns[i][a]));
      c.closePath(); c.fill();
    };
    area(1, 6, 0.12);
    area(2, 5, 0.24);
    area(3, 4, 0.34);
  }

  drawMarks(c) {
    const { left, right, top, bottom } = this.frame();
    const inView = (step) => step >= view.from && step <= view.to;
    let free = -Infinity;
    c.fillStyle = ink.alarm;
    for (const step of [...this.run.spikes.keys()].sort((a, b) => a - b)) {
      const x = this.x(step);
      if (!inView(step) || x - free < 4) continue;
      free = x;
      c.beginPath(); c.moveTo(x, top + 5); c.lineTo(x - 4, top - 3); c.lineTo(x + 4, top - 3); c.fill();
    }
    c.strokeStyle = ink.alarm; c.lineWidth = 1.8;
    for (const step of this.run.skipped_updates.keys()) {
      if (!inView(step)) continue;
      const x = this.x(step), y = bottom - 7;
      c.beginPath(); c.moveTo(x - 4, y - 4); c.lineTo(x + 4, y + 4); c.moveTo(x + 4, y - 4); c.lineTo(x - 4, y + 4); c.stroke();
    }
    c.fillStyle = ink.soft;
    free = -Infinity;
    for (const step of this.run.meta.events.checkpoints) {
      const x = Math.min(Math.max(this.x(step), left), right);
      if (!inView(step) || x - free < 7) continue;
      free = x;
      c.beginPath(); c.moveTo(x, bottom - 4.5); c.lineTo(x + 4.5, bottom); c.lineTo(x, bottom + 4.5); c.lineTo(x - 4.5, bottom); c.fill();
    }
  }

  // The line of the slider and the numbers: over the chart, so that it need not be drawn again.
  drawTop() {
    if (!this.run || !this.run.n || !this.u || this.node.hidden) return;
    const values = this.run[this.panel.values], now = this.run.steps[cursor.index], value = values[cursor.index];
    const inside = now >= view.from && now <= view.to;
    this.line.hidden = !inside;
    this.dot.hidden = !inside || !Number.isFinite(value);
    const height = this.u.bbox.height / uPlot.pxRatio, place = `translate(${this.u.valToPos(now, "x")}px, `;
    this.line.style.transform = `${place}0)`;
    this.dot.style.transform = `${place}${Math.min(Math.max(this.u.valToPos(value || 0, "y"), -3), height)}px)`;
    this.dot.style.background = css(onPaper(this.run.meta.domains[this.run.domain[cursor.index]].colour));
    const i = cursor.hover ?? cursor.index, k = this.all.place(i + 1);
    const parts = [element("b", {}, this.panel.read(values[i]))];
    if (this.panel.wide) parts.unshift(`step ${count(this.run.steps[i])}: `);
    if (!this.panel.exact && !this.panel.sparse)
      parts.push(` · mean ${this.panel.read(this.all.mean(Math.max(k - Math.max(Math.round(shown.window / this.run.meta.every), 1), 0), k))}`);
    this.output.replaceChildren(...parts);
  }

  // What uPlot leaves open: the click, the wheel, and fingers.
  listen(over) {
    const at = (event) => event.clientX - over.getBoundingClientRect().left;
    const left = () => this.u.bbox.left / uPlot.pxRatio;
    over.addEventListener("click", (event) => { this.actions.go(this.pick(at(event), event.clientY - over.getBoundingClientRect().top)); });
    over.addEventListener("mouseleave", () => this.actions.hover(null));
    over.addEventListener("wheel", (event) => {
      // A wheel alone scrolls the page; a pinch on a touchpad arrives as a wheel with Ctrl.
      if (!(event.ctrlKey || event.metaKey || event.altKey)) return;
      event.preventDefault();
      const u = across(this.step(at(event) + left())), scale = Math.exp(Math.min(Math.max(event.deltaY, -60), 60) * 0.006);
      this.actions.zoom(back(u + (across(view.from) - u) * scale), back(u + (across(view.to) - u) * scale));
    }, { passive: false });
    const fingers = new Map();
    let pinch = null;
    over.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse") return;
      fingers.set(event.pointerId, at(event));
      pinch = fingers.size === 2 ? [...fingers.values()].map((x) => across(this.step(x + left()))) : null;
    });
    over.addEventListener("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return;
      fingers.set(event.pointerId, at(event));
      if (!pinch) return this.actions.go(nearestShown(this.step(at(event) + left())));
      // The two steps stay under the two fingers.
      const [x0, x1] = fingers.values(), [u0, u1] = pinch, scale = (u1 - u0) / (x1 - x0);
      if (Math.abs(x1 - x0) > 12) this.actions.zoom(back(u0 - x0 * scale), back(u0 + (over.clientWidth - x0) * scale));
    });
    for (const kind of ["pointerup", "pointercancel"])
      over.addEventListener(kind, (event) => { fingers.delete(event.pointerId); if (!fingers.size) pinch = null; });
  }

  // The dot under the pointer if one is near, else the nearest step.
  pick(left, top) {
    const x = left + this.u.bbox.left / uPlot.pxRatio, y = top + this.u.bbox.top / uPlot.pxRatio;
    const steps = this.run.steps, values = this.run[this.panel.values];
    let best = null, least = 12 * 12;
    const from = this.all.place(lowerBound(steps, this.step(x - 12))), to = this.all.place(lowerBound(steps, this.step(x + 12)) + 1);
    if (to - from < 400)
      for (let k = from; k < to; k++) {
        const i = this.chosen[k], distance = (this.x(steps[i]) - x) ** 2 + (this.y(values[i]) - y) ** 2;
        if (distance < least) [best, least] = [i, distance];
      }
    return best ?? nearestShown(this.step(x));
  }
}

// A small chart that stands still, by uPlot: `make()` gives its data and what differs from a plain one.
function stillChart(title, unit, height, make) {
  const plot = element("div.plot.still", { role: "img", "aria-label": title, style: { height: `${height}px` } });
  const node = element("div.chart", {}, element("div.chart-head", {}, element("h3", {}, title, element("small", {}, unit))), plot);
  let u = null;
  redraws.push(() => {
    const { width } = plot.getBoundingClientRect();
    if (!node.isConnected || width < 80) return;
    u?.destroy();
    const { data, ...options } = make();
    u = new uPlot({ width, height, padding: PADDING, legend: { show: false }, cursor: { show: false }, ...options }, data, plot);
  });
  return node;
}
