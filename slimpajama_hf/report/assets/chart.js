// Charts by uPlot: steps as dots, or many steps as a fan of quantiles; running means; all charts zoom together.

const view = { from: 0, to: 1, log: false }; // in steps
const shown = { hidden: new Set(), window: 50, chosen: false }; // chosen: by the user

// The two scales of steps: uPlot's linear one and its asinh, which is like a logarithm but begins at 0.
const across = (step) => (view.log ? Math.asinh(step) : step);
const back = (u) => (view.log ? Math.sinh(u) : u);

const POWERS = [0, 1, 2, 3, 4, 5, 6, 7, 8].flatMap((power) => [1, 2, 5].map((f) => f * 10 ** power));
const decimals = (value) => (String(+value.toPrecision(10)).split(".")[1] || "").length;
const FONT = '12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';

const AXIS = { font: FONT, stroke: () => ink.muted, ticks: { show: false } };
// As wide as the longest label but at least `least` pixels, so that most charts are aligned.
const labelWidth = (least) => (u, labels) => Math.max(least, 11 + 6.6 * Math.max(0, ...(labels ?? []).map((label) => `${label ?? ""}`.length)));
// `values(ticks, distance between two)`: the texts of the ticks.
const yAxis = (least, values = (ticks, step) => ticks.map((v) => (Math.abs(v) >= 10000 ? short(v) : fixed(v, decimals(step))))) =>
  ({ ...AXIS, size: labelWidth(least), gap: 7, space: 46, grid: { stroke: () => ink.line, width: 1 }, values: (u, ticks, axis, space, step) => values(ticks, step) });
// Texts that would overlap or cross the edge are left out.
const xAxis = (more, text) => ({ ...AXIS, size: 22, gap: 7, grid: { show: false }, ...more, values: (u, ticks) => {
  let free = -Infinity;
  return ticks.map((tick) => {
    const words = text(tick), x = u.valToPos(tick, "x"), half = words.length * 3.4;
    if (x - half < free || x + half > u.bbox.width / uPlot.pxRatio + 18) return null;
    free = x + half + 12;
    return words;
  });
} });
const QUIET = { auto: false, pxAlign: 0, points: { show: false } };

function pathOf(points, u) {
  const path = new Path2D();
  points.forEach(([x, y], k) => path[k ? "lineTo" : "moveTo"](u.valToPos(x, "x", true), u.valToPos(y, "y", true)));
  return path;
}

// For uPlot: [colour, path] pairs as a map from each colour to one path.
function byColour(pairs) {
  const paths = new Map();
  for (const [colour, path] of pairs) { if (!paths.has(colour)) paths.set(colour, new Path2D()); paths.get(colour).addPath(path); }
  return paths;
}

// Cumulative sums over the chosen steps, so that the mean of any window is one subtraction.
class Sums {
  constructor(run, panel, chosen) {
    const values = run[panel.values], weights = panel.weights ? run[panel.weights] : null;
    this.index = chosen;
    this.total = new Float64Array(chosen.length + 1);
    this.squares = panel.beside ? new Float64Array(chosen.length + 1) : null; // for standard errors
    this.weight = new Float64Array(chosen.length + 1);
    for (let k = 0; k < chosen.length; k++) {
      const i = chosen[k], weight = weights ? weights[i] : 1, good = Number.isFinite(values[i]);
      this.total[k + 1] = this.total[k] + (good ? (panel.sums ? run[panel.sums][i] : values[i] * weight) : 0);
      if (this.squares) this.squares[k + 1] = this.squares[k] + (good ? values[i] * values[i] * weight : 0);
      this.weight[k + 1] = this.weight[k] + (good ? weight : 0);
    }
  }
  mean(low, high) {
    const weight = this.weight[high] - this.weight[low];
    return weight > 0 ? (this.total[high] - this.total[low]) / weight : NaN;
  }
  // Standard error of the mean; all weights must be one.
  error(low, high) {
    const n = this.weight[high] - this.weight[low], mean = this.mean(low, high);
    return n > 1 ? Math.sqrt(Math.max((this.squares[high] - this.squares[low]) / n - mean * mean, 0) / (n - 1)) : NaN;
  }
  // The `window` places around a place, [from, to). At the beginning it reaches as far ahead as back, at the end it has
  // only earlier places (as in drawing.centred_mean).
  around(place, window) {
    const back = window >> 1, ahead = Math.min(window - 1 - back, place);
    return [Math.max(place - back, 0), Math.min(place + ahead + 1, this.index.length)];
  }
  // The first place among the chosen steps whose index is `i` or more.
  place(i) { return lowerBound(this.index, i); }
  // The places in view, and one more at the end.
  seen(steps) { return [this.place(lowerBound(steps, view.from)), this.place(lowerBound(steps, view.to + 1e-9) + 1)]; }
}

class StepChart {
  // panel: {id, title, unit, caption?, values, weights?, sums?, wide?, floor?, domains?, dashed?, beside?, held_out?, exact?, sparse?, told?, read, ticks?}
  constructor(panel, actions) {
    this.panel = panel;
    this.actions = actions;
    // Not a live region: all charts would speak at once. `say` in main.js announces the step once.
    this.readout = element("span.readout");
    this.plot = element("div.plot", { role: "img" });
    this.caption = element("p.caption");
    this.node = element(panel.wide ? "div.chart.wide" : "div.chart", { id: `chart-${panel.id}` },
      element("div.chart-head", {}, element("h3", {}, panel.title, element("small", {}, panel.unit)), this.readout), this.plot, this.caption);
    this.here = element("div.here", {}, element("i"));
    this.listen();
  }

  use(run, chosen, byDomain) {
    this.run = run;
    this.values = run[this.panel.values];
    // A sparse panel shows only the steps that have a value.
    this.chosen = this.panel.sparse ? chosen.filter((i) => Number.isFinite(this.values[i])) : chosen;
    this.all = new Sums(run, this.panel, this.chosen);
    this.lines = this.panel.domains && byDomain.length > 1
      ? byDomain.map(({ domain, index }) => ({ domain, sums: new Sums(run, this.panel, index) })) : [];
    this.beside = this.panel.beside ? new Sums(run, { values: this.panel.beside }, chosen.filter((i) => Number.isFinite(run[this.panel.beside][i]))) : null;
    const caption = this.panel.caption;
    this.caption.textContent = (typeof caption === "function" ? caption(run) : caption) ?? "";
    this.plot.setAttribute("aria-label", this.inWords());
    this.u?.setData(this.data(), false);
  }

  // The curve in words, for screen readers.
  inWords() {
    const { index } = this.all, head = `${this.panel.title}, ${this.panel.unit}, by step`;
    if (!index.length) return `${head}: no step yet.`;
    const at = (place) => `${this.panel.read(this.all.mean(...this.all.around(place, this.window)))} at step ${count(this.run.steps[index[place]])}`;
    return `${head}: ${at(0)}, ${at((index.length - 1) >> 1)}, ${at(index.length - 1)}.`;
  }

  data() { return [this.run.steps, ...this.series().slice(1).map(() => this.values)]; }
  colour(i) { return onPaper(this.run.meta.domains[this.run.domain[i]].colour); }

  series() {
    const stroke = (stroke, width, points, more = {}) => ({ ...QUIET, stroke, width, ...more, paths: (u) => ({ stroke: pathOf(points(), u) }) });
    return [{},
      // Nothing is stroked here; the width only keeps dots at the edge from being clipped.
      { ...QUIET, width: 12, fill: "black", paths: (u) => ({ fill: this.steps(u) }) },
      { ...QUIET, width: 1.25, stroke: "black", paths: (u) => ({ stroke: byColour(this.lines.map(({ domain, sums }) =>
        [css(onPaper(this.run.meta.domains[domain].colour), 0.9), pathOf(this.means(sums, this.windowOf(sums)), u)])) }) },
      { ...QUIET, fill: () => css(rgb(ink.point), 0.4), paths: (u) => ({ fill: this.errors(u) }) },
      stroke(() => ink.paper, 5, () => this.curve),
      stroke(() => (this.lines.length ? ink.ink : ink.accent), 2.2, () => this.curve),
      stroke(() => (this.beside ? ink.ink : ink.alarm), 1.5, () => this.dashed(), { dash: [6, 4] })];
  }

  build() {
    const { width, height } = this.plot.getBoundingClientRect();
    this.u?.destroy();
    this.scale = view.log;
    this.u = new uPlot({
      width, height, padding: [8, 9, 0, 0], legend: { show: false }, series: this.series(),
      scales: {
        x: { time: false, distr: view.log ? 4 : 1, range: (u, low, high) => [low, high] },
        y: { range: () => this.limits() },
      },
      axes: [
        xAxis({ space: 72, incrs: POWERS, filter: (u, ticks) => ticks, ...(view.log ? { splits: () => [0, ...POWERS].filter((t) => t >= view.from && t <= view.to) } : {}) }, count),
        yAxis(46, this.panel.ticks),
      ],
      cursor: {
        y: false,
        points: { show: (u, s) => s === 1 && element("div"), size: 12, fill: (u) => css(this.colour(u.cursor.idx ?? 0)), stroke: () => ink.paper },
        dataIdx: (u, s, i) => (s === 0 || Number.isFinite(this.values[i]) ? i : null),
        // The line snaps to a step: the dot under the pointer, or the nearest step. The other charts follow.
        move: (u, x, y) => (x < 0 || u.cursor.event?.buttons || u.cursor.event?.type === "mousedown" ? [x, y] : [u.valToPos(this.run.steps[this.pick(x, u.cursor.event ? y : null)], "x"), y]),
        drag: { x: true, y: false, dist: 5, setScale: false, click: () => {} },
        sync: { key: "steps", scales: ["x", null], filters: { pub: (kind) => kind === "mousemove" } },
        bind: { dblclick: () => () => this.actions.zoom(-Infinity, Infinity) },
      },
      hooks: {
        setCursor: [(u) => this.actions.hover(u.cursor.left < 0 ? null : u.cursor.idx ?? null)],
        setSelect: [(u) => {
          const { left, width } = u.select;
          if (!width) return;
          this.selected = true;
          u.setSelect({ left: 0, width: 0 }, false);
          this.actions.zoom(u.posToVal(left, "x"), u.posToVal(left + width, "x"));
        }],
        drawAxes: [(u) => this.inside(u, (c, ratio) => this.drawUnder(u, c, ratio))],
        draw: [(u) => { this.inside(u, (c, ratio) => this.drawMarks(u, c, ratio)); this.drawTop(); }],
      },
    }, this.data(), this.plot);
    this.u.over.append(this.here);
  }

  resize() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (this.u && width) this.u.setSize({ width, height });
  }

  draw() {
    if (!this.run?.n || this.node.hidden) return;
    if (!this.u || this.scale !== view.log) this.build();
    this.u.setScale("x", { min: view.from, max: view.to });
  }

  get width() { return this.u.bbox.width / uPlot.pxRatio; }
  stepAt(x) { return back(across(view.from) + (x / this.width) * (across(view.to) - across(view.from))); }
  get window() {
    return this.panel.exact ? 1 : this.panel.sparse ? Math.max(Math.min(10, this.all.index.length), 1) : Math.max(Math.round(shown.window / this.run.meta.every), 1);
  }
  // The window of one domain: how many of its documents are in a window of all steps, at least 10.
  windowOf(sums) { return Math.max(Math.round((this.window * sums.index.length) / this.all.index.length), 10); }

  // Limits that show the course of the values in view, not their outliers.
  limits() {
    const [first, last] = this.all.seen(this.run.steps), picked = [];
    this.curve = this.means(this.all);
    this.curveBeside = this.beside ? this.means(this.beside) : [];
    const stride = Math.max(1, Math.floor((last - first) / 1500));
    for (let k = first; k < last; k += stride) { const v = this.values[this.chosen[k]]; if (Number.isFinite(v)) picked.push(v); }
    if (!picked.length) return [0, 1];
    picked.sort((a, b) => a - b);
    const at = (q) => picked[Math.round(q * (picked.length - 1))];
    const fence = 3 * (at(0.75) - at(0.25)) || Math.abs(at(0.5)) || 1;
    const inside = picked.filter((v) => v >= at(0.25) - fence && v <= at(0.75) + fence);
    let low = Math.min(at(0.01), inside[0]), high = Math.max(at(0.99), inside[inside.length - 1]);
    // A long run still shows from where it fell.
    for (const [, mean] of [...this.curve, ...this.curveBeside]) { low = Math.min(low, mean); high = Math.max(high, mean); }
    const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
    low = this.panel.floor === 0 ? 0 : low < 0 ? low - pad : Math.max(0, low - pad);
    return [low, high + pad];
  }

  // For each column of `wide` pixels: its places [from, to), and the step of its middle.
  *columns(sums, wide) {
    const { steps } = this.run, [first, last] = sums.seen(steps);
    for (let x = 0, from = first; x < this.width && from < last; x += wide) {
      const to = Math.min(sums.place(lowerBound(steps, this.stepAt(x + wide))), last);
      if (to > from) yield [from, to, this.stepAt(x + wide / 2)];
      from = Math.max(from, to);
    }
  }

  // [[step, mean], ...] of the `window` chosen steps around each place; at most one point per pixel.
  means(sums, window = this.window) {
    const { steps } = this.run, [first, last] = sums.seen(steps), points = [];
    const add = (step, from, to) => { const mean = sums.mean(from, to); if (Number.isFinite(mean)) points.push([step, mean]); };
    if (last - first < this.width * 1.5) for (let k = first; k < last; k++) add(steps[sums.index[k]], ...sums.around(k, window));
    else for (const [from, to, step] of this.columns(sums, 1)) {
      const [low, high] = sums.around((from + to - 1) >> 1, window);
      add(step, Math.min(low, from), Math.max(high, to));
    }
    return points;
  }

  // The mean and one standard error above and below it.
  errors(u) {
    const { all, run } = this, points = [];
    if (!this.panel.beside) return null;
    const [first, last] = all.seen(run.steps);
    for (let k = first; k < last; k++) {
      const window = all.around(k, this.window), mean = all.mean(...window), error = all.error(...window);
      if (Number.isFinite(error)) points.push([run.steps[all.index[k]], mean - error, mean + error]);
    }
    return pathOf([...points.map(([x, low]) => [x, low]), ...points.map(([x, , high]) => [x, high]).reverse()], u);
  }

  dashed() {
    if (this.beside) return this.curveBeside;
    const line = this.run[this.panel.dashed], { steps } = this.run, points = [];
    if (!line) return points;
    const from = lowerBound(steps, view.from), to = Math.min(lowerBound(steps, view.to) + 1, this.run.n);
    const stride = Math.max(1, Math.floor((to - from) / this.width));
    for (let i = from; i < to; i += stride) if (Number.isFinite(line[i])) points.push([steps[i], line[i]]);
    return points;
  }

  // Colour -> path of single steps: dots if few are in view, else a fan.
  steps(u) {
    const [first, last] = this.all.seen(this.run.steps);
    if (this.panel.exact) return null;
    return last - first <= Math.max(this.width * 2.2, 700) ? this.dots(u, first, last) : this.fan(u);
  }

  dots(u, first, last) {
    const many = last - first, ratio = uPlot.pxRatio, size = ratio * (many < 150 ? 3 : many < 500 ? 2.3 : 1.7), { top } = u.bbox;
    const paths = this.run.meta.domains.map(() => new Path2D());
    for (let k = first; k < last; k++) {
      const i = this.chosen[k], path = paths[this.run.domain[i]];
      if (!Number.isFinite(this.values[i])) continue;
      const x = u.valToPos(this.run.steps[i], "x", true), y = u.valToPos(this.values[i], "y", true);
      // An arrow for values above the plot.
      if (y < top - 2 * ratio) { path.moveTo(x, top - 3 * ratio); path.lineTo(x - 2.5 * ratio, top + 2 * ratio); path.lineTo(x + 2.5 * ratio, top + 2 * ratio); path.closePath(); }
      else { path.moveTo(x + size, y); path.arc(x, y, size, 0, 7); }
    }
    return byColour(this.run.meta.domains.map((domain, d) => [css(onPaper(domain.colour), many < 500 ? 0.75 : 0.5), paths[d]]));
  }

  fan(u) {
    const lows = this.run[`${this.panel.values}_low`] || this.values, highs = this.run[`${this.panel.values}_high`] || this.values, columns = [];
    // Extremes of blocks include all domains.
    const blocks = lows !== this.values && !shown.hidden.size;
    for (const [from, to, step] of this.columns(this.all, 3)) {
      let low = Infinity, high = -Infinity;
      const some = [], stride = Math.max(1, Math.floor((to - from) / 64));
      for (let k = from; k < to; k++) {
        const i = this.chosen[k], value = this.values[i];
        if (!Number.isFinite(value)) continue;
        low = Math.min(low, blocks ? lows[i] : value); high = Math.max(high, blocks ? highs[i] : value);
        if ((k - from) % stride === 0) some.push(value);
      }
      if (!some.length) continue;
      some.sort((a, b) => a - b);
      const at = (q) => some[Math.round(q * (some.length - 1))];
      columns.push([step, low, at(0.1), at(0.25), at(0.75), at(0.9), high]);
    }
    const area = (a, b) => pathOf([...columns.map((c) => [c[0], c[b]]), ...columns.map((c) => [c[0], c[a]]).reverse()], u);
    return new Map([[1, 6, 0.12], [2, 5, 0.24], [3, 4, 0.34]].map(([a, b, alpha]) => [css(rgb(ink.point), alpha), area(a, b)]));
  }

  inside(u, draw) {
    const { left, top, width, height } = u.bbox, ratio = uPlot.pxRatio, edge = 6 * ratio;
    u.ctx.save();
    u.ctx.setLineDash([]);
    u.ctx.beginPath(); u.ctx.rect(left - edge, top - edge, width + 2 * edge, height + 2 * edge); u.ctx.clip();
    draw(u.ctx, ratio);
    u.ctx.restore();
  }

  // Lines behind the curves: zero, and resumes.
  drawUnder(u, c, ratio) {
    const { left, top, width, height } = u.bbox;
    c.strokeStyle = ink.muted; c.lineWidth = ratio;
    c.beginPath();
    if (this.panel.floor === undefined && u.scales.y.min < 0) { const y = Math.round(u.valToPos(0, "y", true)); c.moveTo(left, y); c.lineTo(left + width, y); }
    c.stroke();
    c.setLineDash([3 * ratio, 4 * ratio]);
    c.beginPath();
    for (const step of this.run.meta.events.resumes) if (step >= view.from && step <= view.to) { const x = Math.round(u.valToPos(step, "x", true)); c.moveTo(x, top); c.lineTo(x, top + height); }
    c.stroke();
  }

  drawMarks(u, c, ratio) {
    const { left, top, width, height } = u.bbox, bottom = top + height;
    // Draw the steps in view, at least `apart` pixels from each other.
    const each = (steps, apart, draw) => {
      let free = -Infinity;
      for (const step of steps) {
        const x = u.valToPos(step, "x", true);
        if (x < left - 1 || x > left + width + 1 || x - free < apart * ratio) continue;
        free = x;
        c.beginPath(); draw(x, step);
      }
    };
    const shape = (x, y, ...points) => points.forEach(([dx, dy], k) => c[k ? "lineTo" : "moveTo"](x + dx * ratio, y + dy * ratio));
    if (this.panel.held_out) {
      // Rings are the weights, filled circles their average.
      for (const [of, fill] of [[(entry) => entry, ink.paper], [(entry) => entry.averaged, ink.ink]]) {
        const scores = new Map(this.run.meta.evaluations.map((entry) => [entry.step, of(entry)?.[this.panel.held_out]]).filter(([, value]) => Number.isFinite(value)));
        c.fillStyle = fill; c.strokeStyle = ink.ink; c.lineWidth = 1.6 * ratio;
        each(scores.keys(), 0, (x, step) => { c.arc(x, u.valToPos(scores.get(step), "y", true), 4 * ratio, 0, 7); c.fill(); c.stroke(); });
      }
    }
    if (!this.panel.wide) return;
    c.fillStyle = c.strokeStyle = ink.alarm; c.lineWidth = 1.8 * ratio;
    each([...this.run.spikes.keys()].sort((a, b) => a - b), 4, (x) => { shape(x, top, [0, 5], [-4, -3], [4, -3]); c.fill(); });
    each(this.run.skipped_updates.keys(), 0, (x) => { shape(x, bottom, [-4, -11], [4, -3]); shape(x, bottom, [4, -11], [-4, -3]); c.stroke(); });
    c.fillStyle = ink.soft;
    each(this.run.meta.events.checkpoints, 7, (x) => { shape(x, bottom, [0, -4.5], [4.5, 0], [0, 4.5], [-4.5, 0]); c.fill(); });
  }

  // The line of the slider and the numbers are elements, so that no chart is redrawn when the slider moves.
  drawTop() {
    if (!this.u || this.node.hidden || this.u.scales.y.min == null) return;
    const at = cursor.index, x = this.u.valToPos(this.run.steps[at], "x"), y = this.u.valToPos(this.values[at], "y"), dot = this.here.firstChild;
    this.here.hidden = x < -1 || x > this.width + 1;
    this.here.style.transform = `translateX(${x}px)`;
    dot.hidden = !Number.isFinite(y);
    dot.style.transform = `translateY(${Math.min(Math.max(y, -3), this.u.bbox.height / uPlot.pxRatio)}px)`;
    dot.style.background = css(this.colour(at));
    const i = cursor.hover ?? at, measured = Number.isFinite(this.values[i]);
    const mean = this.all.mean(...this.all.around(Math.max(this.all.place(i + 1) - 1, 0), this.window));
    const parts = [element("b", {}, this.panel.told && !measured ? this.panel.told(this.run) : this.panel.read(this.values[i]))];
    if (this.panel.wide || (this.panel.told && measured)) parts.unshift(`step ${count(this.run.steps[i])}: `);
    if (!this.panel.exact && !this.panel.sparse) parts.push(` · mean ${this.panel.read(mean)}`);
    this.readout.replaceChildren(...parts);
  }

  // uPlot handles the mouse; touch, the wheel and clicks are handled here.
  listen() {
    const fingers = new Map();
    let pinch = null, tapped = -Infinity;
    const local = (event) => event.clientX - this.u.rect.left;
    const on = (kind, work, options) => this.plot.addEventListener(kind, (event) => { if (this.u && this.u.over.contains(event.target)) work(event); }, options);
    on("pointerdown", (event) => {
      this.selected = false;
      if (event.pointerType === "mouse") return;
      event.preventDefault(); // no mouse events from touch
      fingers.set(event.pointerId, local(event));
      if (fingers.size === 2) pinch = [...fingers.values()].map((x) => across(this.stepAt(x)));
    });
    on("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return;
      fingers.set(event.pointerId, local(event));
      const [x0, x1] = fingers.values();
      if (!pinch) return this.actions.go(this.pick(x0, null));
      // The two steps stay under the fingers.
      if (fingers.size < 2 || Math.abs(x1 - x0) < 12) return;
      const scale = (pinch[1] - pinch[0]) / (x1 - x0);
      this.actions.zoom(back(pinch[0] - x0 * scale), back(pinch[0] + (this.width - x0) * scale));
    });
    for (const kind of ["pointerup", "pointercancel"]) on(kind, (event) => { fingers.delete(event.pointerId); if (!fingers.size) pinch = null; });
    on("click", (event) => {
      if (this.selected) return;
      if (event.timeStamp - tapped < 320) this.actions.zoom(-Infinity, Infinity);
      else this.actions.go(this.pick(local(event), event.clientY - this.u.rect.top));
      tapped = event.timeStamp;
    });
    on("wheel", (event) => {
      // The wheel alone scrolls the page; a pinch on a touchpad arrives as the wheel with Ctrl.
      if (!(event.ctrlKey || event.metaKey || event.altKey)) return;
      event.preventDefault();
      const u = across(this.stepAt(local(event))), scale = Math.exp(Math.min(Math.max(event.deltaY, -60), 60) * 0.006);
      this.actions.zoom(back(u + (across(view.from) - u) * scale), back(u + (across(view.to) - u) * scale));
    }, { passive: false });
  }

  // The dot near (x, y) if there is one, else the step nearest to x.
  pick(x, y) {
    const { steps } = this.run;
    let best = null, least = 12 * 12;
    const from = this.all.place(lowerBound(steps, this.stepAt(x - 12))), to = this.all.place(lowerBound(steps, this.stepAt(x + 12)) + 1);
    if (y !== null && to - from < 400)
      for (let k = from; k < to; k++) {
        const i = this.chosen[k], distance = (this.u.valToPos(steps[i], "x") - x) ** 2 + (this.u.valToPos(this.values[i], "y") - y) ** 2;
        if (distance < least) [best, least] = [i, distance];
      }
    return best ?? nearestShown(this.stepAt(x));
  }
}

// A small static chart with scales of its own.
const stills = [];
function stillChart(title, unit, options, data, words) {
  const plot = element("div.plot.still", { role: "img", "aria-label": `${title}, ${unit}. ${words}` });
  const u = new uPlot({ width: 300, height: 230, padding: [10, 8, 0, 0], legend: { show: false }, cursor: { show: false }, ...options }, data, plot);
  stills.push({ u, resize: () => u.setSize({ width: plot.clientWidth, height: 230 }) });
  return element("div.chart", {}, element("div.chart-head", {}, element("h3", {}, title, element("small", {}, unit))), plot);
}
