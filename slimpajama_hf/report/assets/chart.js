// Charts on canvas: steps as dots, or as a fan of quantiles where they are many; running means; one zoom for all.

const view = { from: 0, to: 1, log: false }; // in steps
const shown = { hidden: new Set(), window: 50 };

const across = (step) => (view.log ? Math.log10(Math.max(step, 0) + 1) : step);
const back = (u) => (view.log ? 10 ** u - 1 : u);

function niceTicks(low, high, most) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(+(k * step).toPrecision(12));
  return ticks;
}

function stepTicks(width) {
  const most = Math.max(Math.floor(width / 72), 2);
  if (!view.log) return niceTicks(view.from, view.to, most).filter((t) => t >= 0 && (t % 1 === 0));
  const ticks = [0];
  for (let power = 1; power <= view.to * 1.001; power *= 10) for (const f of width > 500 ? [1, 2, 5] : [1]) ticks.push(f * power);
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

class StepChart {
  // panel: {id, title, unit, values, weights?, sums?, wide?, floor?, domains?, dashed?, held_out?, exact?, sparse?, read, ticks?}
  constructor(panel, actions) {
    this.panel = panel;
    this.actions = actions;
    this.base = element("canvas", { "aria-hidden": "true" });
    this.top = element("canvas", { "aria-hidden": "true" });
    this.output = element("output");
    this.plot = element("div.plot", { role: "img", "aria-label": `${panel.title} (${panel.unit}) by step` }, this.base, this.top);
    this.node = element(panel.wide ? "div.chart.wide" : "div.chart", { id: `chart-${panel.id}` },
      element("div.chart-head", {}, element("h3", {}, panel.title, element("small", {}, panel.unit)), this.output), this.plot);
    this.selection = null;
    this.listen();
  }

  use(run, chosen, byDomain) {
    this.run = run;
    // Of what only some steps have, only those count.
    this.chosen = this.panel.sparse ? chosen.filter((i) => Number.isFinite(run[this.panel.values][i])) : chosen;
    this.all = new Sums(run, this.panel, this.chosen);
    this.lines = this.panel.domains && byDomain.length > 1
      ? byDomain.map(({ domain, index }) => ({ domain, sums: new Sums(run, this.panel, index) })) : [];
  }

  frame() {
    const { width, height } = this.size;
    return { left: 46, right: width - 9, top: 8, bottom: height - 22 };
  }
  x(step) {
    const { left, right } = this.frame();
    return left + ((across(step) - across(view.from)) / (across(view.to) - across(view.from))) * (right - left);
  }
  step(x) {
    const { left, right } = this.frame();
    return back(across(view.from) + ((x - left) / (right - left)) * (across(view.to) - across(view.from)));
  }
  y(value) {
    const { top, bottom } = this.frame();
    return bottom - ((value - this.low) / (this.high - this.low)) * (bottom - top);
  }

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
    for (const [, mean] of this.curve) { low = Math.min(low, mean); high = Math.max(high, mean); }
    const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
    low = this.panel.floor === 0 ? 0 : low < 0 ? low - pad : Math.max(0, low - pad);
    return [low, high + pad];
  }

  // [[x, mean], ...] of the last `window` chosen steps up to each place; one point a pixel at most.
  means(sums, window) {
    const { left, right } = this.frame(), points = [];
    const first = sums.place(lowerBound(this.run.steps, view.from)), last = sums.place(lowerBound(this.run.steps, view.to + 1e-9) + 1);
    const steps = this.run.steps;
    if (last - first < (right - left) * 1.5) {
      for (let k = first; k < last; k++) { const m = sums.mean(Math.max(k + 1 - window, 0), k + 1); if (Number.isFinite(m)) points.push([this.x(steps[sums.index[k]]), m]); }
      return points;
    }
    let before = first;
    for (let x = left; x <= right; x += 1) {
      const k = Math.min(sums.place(lowerBound(steps, this.step(x + 0.5))), last);
      if (k <= before) continue;
      const m = sums.mean(Math.max(Math.min(k - window, before), 0), k);
      if (Number.isFinite(m)) points.push([x, m]);
      before = k;
    }
    return points;
  }

  draw() {
    const { context: c, width, height } = fit(this.base);
    this.size = { width, height };
    if (!this.run || !this.run.n || width < 40) return;
    const { left, right, top, bottom } = this.frame(), { steps } = this.run, values = this.run[this.panel.values];
    const every = this.run.meta.every;
    const window_ = this.panel.exact ? 1 : this.panel.sparse ? 10 : Math.max(Math.round(shown.window / every), 1);
    const first = this.all.place(lowerBound(steps, view.from)), last = this.all.place(lowerBound(steps, view.to + 1e-9) + 1);
    this.curve = this.means(this.all, window_);
    [this.low, this.high] = this.limits(first, last, values);
    c.font = FONT;
    c.textBaseline = "middle";

    // Axes.
    const ticks = niceTicks(this.low, this.high, Math.max(Math.floor((bottom - top) / 46), 2));
    c.lineWidth = 1;
    const texts = this.panel.ticks ? this.panel.ticks(ticks) : tickTexts(ticks);
    for (const [number, tick] of ticks.entries()) {
      const y = Math.round(this.y(tick)) + 0.5;
      c.strokeStyle = ink.line;
      c.beginPath(); c.moveTo(left, y); c.lineTo(right, y); c.stroke();
      c.fillStyle = ink.muted; c.textAlign = "right";
      c.fillText(texts[number], left - 7, y);
    }
    c.textBaseline = "alphabetic";
    let free = -Infinity;
    const marks = stepTicks(right - left);
    for (const tick of marks) {
      const x = this.x(tick), text = count(tick), half = c.measureText(text).width / 2;
      const at = Math.min(Math.max(x, left - 10 + half), right - half);
      if (at - half < free) continue;
      c.fillStyle = ink.muted; c.textAlign = "center";
      c.fillText(text, at, height - 5);
      free = at + half + 14;
    }

    c.save();
    c.beginPath(); c.rect(left - 6, top - 6, right - left + 12, bottom - top + 8); c.clip();
    // Resumes and gaps run through; the rest is marked below.
    c.strokeStyle = ink.muted; c.setLineDash([3, 4]);
    for (const step of this.run.meta.events.resumes) if (step >= view.from && step <= view.to) { const x = Math.round(this.x(step)) + 0.5; c.beginPath(); c.moveTo(x, top); c.lineTo(x, bottom); c.stroke(); }
    c.setLineDash([]);

    if (!this.panel.exact && last - first <= Math.max((right - left) * 2.2, 700)) this.drawDots(c, first, last, values);
    else if (!this.panel.exact) this.drawFan(c, first, last, values);

    for (const { domain, sums } of this.lines) {
      // As many of its documents as stand among that many steps.
      const points = this.means(sums, Math.max(Math.round((window_ * sums.index.length) / this.all.index.length), 10));
      this.trace(c, points, css(onPaper(this.run.meta.domains[domain].colour), 0.9), 1.25);
    }
    if (this.panel.floor === undefined && this.low < 0) { c.fillStyle = ink.muted; c.fillRect(left, Math.round(this.y(0)), right - left, 1); }
    this.trace(c, this.curve, ink.paper, 5);
    this.trace(c, this.curve, this.lines.length ? ink.ink : ink.accent, 2.2);
    if (this.panel.dashed) {
      c.setLineDash([6, 4]);
      const points = [], line = this.run[this.panel.dashed], from = lowerBound(steps, view.from), to = Math.min(lowerBound(steps, view.to) + 1, this.run.n);
      const stride = Math.max(1, Math.floor((to - from) / (right - left)));
      for (let i = from; i < to; i += stride) if (Number.isFinite(line[i])) points.push([this.x(steps[i]), line[i]]);
      this.trace(c, points, ink.alarm, 1.5);
      c.setLineDash([]);
    }
    if (this.panel.held_out) {
      for (const entry of this.run.meta.evaluations) {
        const value = entry[this.panel.held_out];
        if (!Number.isFinite(value) || entry.step < view.from || entry.step > view.to) continue;
        c.fillStyle = ink.paper; c.strokeStyle = ink.ink; c.lineWidth = 1.6;
        c.beginPath(); c.arc(this.x(entry.step), this.y(value), 4, 0, 7); c.fill(); c.stroke();
      }
    }
    c.restore();
    if (this.panel.wide) this.drawMarks(c);
    this.drawTop();
  }

  trace(c, points, colour, width) {
    c.strokeStyle = colour; c.lineWidth = width; c.lineJoin = "round";
    c.beginPath();
    points.forEach(([x, value], k) => (k ? c.lineTo(x, this.y(value)) : c.moveTo(x, this.y(value))));
    c.stroke();
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

  // The line of the slider, the one under the pointer, the selection: over the chart, so that it need not be drawn again.
  drawTop() {
    if (!this.run || !this.run.n || !this.size || this.low === undefined || this.node.hidden) return;
    const { context: c } = fit(this.top, this.size);
    const { left, right, top, bottom } = this.frame(), values = this.run[this.panel.values];
    const line = (i, colour, dash) => {
      const x = this.x(this.run.steps[i]);
      if (x < left - 1 || x > right + 1) return;
      c.strokeStyle = colour; c.lineWidth = 1.4; c.setLineDash(dash);
      c.beginPath(); c.moveTo(x, top - 4); c.lineTo(x, bottom); c.stroke();
      c.setLineDash([]);
      const value = values[i];
      if (!Number.isFinite(value)) return;
      c.fillStyle = css(onPaper(this.run.meta.domains[this.run.domain[i]].colour)); c.strokeStyle = ink.paper; c.lineWidth = 2;
      c.beginPath(); c.arc(x, Math.min(Math.max(this.y(value), top - 3), bottom), 5, 0, 7); c.fill(); c.stroke();
    };
    if (this.selection) {
      const [a, b] = this.selection;
      c.fillStyle = css(rgb(ink.accent), 0.14);
      c.fillRect(Math.min(a, b), top - 4, Math.abs(b - a), bottom - top + 4);
    }
    line(cursor.index, ink.accent, []);
    if (cursor.hover !== null) line(cursor.hover, ink.muted, [3, 3]);
    const i = cursor.hover ?? cursor.index;
    const k = this.all.place(i + 1);
    const mean = this.all.mean(Math.max(k - Math.max(Math.round(shown.window / this.run.meta.every), 1), 0), k);
    const parts = [element("b", {}, this.panel.read(values[i]))];
    if (this.panel.wide) parts.unshift(`step ${count(this.run.steps[i])}: `);
    if (!this.panel.exact && !this.panel.sparse) parts.push(` · mean ${this.panel.read(mean)}`);
    this.output.replaceChildren(...parts);
  }

  listen() {
    const pointers = new Map();
    let start = null, pinch = null, tapped = 0;
    const local = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    const at = (x) => nearestShown(this.step(x));
    this.plot.addEventListener("pointerdown", (event) => {
      if (!this.run?.n || (event.pointerType === "mouse" && event.button !== 0)) return;
      pointers.set(event.pointerId, local(event));
      this.plot.setPointerCapture(event.pointerId);
      if (pointers.size === 2) { pinch = [...pointers.values()].map((x) => this.step(x)); start = null; this.selection = null; }
      else start = { x: local(event), y: event.clientY - this.plot.getBoundingClientRect().top };
    });
    this.plot.addEventListener("pointermove", (event) => {
      if (!this.run?.n) return;
      const x = local(event);
      if (pointers.has(event.pointerId)) pointers.set(event.pointerId, x);
      if (pinch && pointers.size === 2) {
        // The two steps stay under the two fingers.
        const { left, right } = this.frame(), [x0, x1] = [...pointers.values()], [u0, u1] = pinch.map(across);
        if (Math.abs(x1 - x0) > 12) {
          const scale = (u1 - u0) / (x1 - x0);
          this.actions.zoom(back(u0 + (left - x0) * scale), back(u0 + (right - x0) * scale));
        }
      } else if (start && event.pointerType === "mouse") {
        if (this.selection || Math.abs(x - start.x) > 5) { this.selection = [start.x, x]; this.drawTop(); }
      } else if (start) this.actions.go(at(x));
      else if (event.pointerType === "mouse") this.actions.hover(this.pick(x, event.clientY - this.plot.getBoundingClientRect().top));
    });
    const end = (event) => {
      const x = pointers.get(event.pointerId);
      pointers.delete(event.pointerId);
      if (event.type !== "pointerup") { this.selection = null; start = null; pinch = null; return; }
      if (pinch) { if (!pointers.size) pinch = null; start = null; return; }
      if (this.selection) {
        const [a, b] = this.selection.map((place) => this.step(place));
        this.selection = null;
        this.actions.zoom(Math.min(a, b), Math.max(a, b));
      } else if (start && x !== undefined) {
        if (event.pointerType !== "mouse" && event.timeStamp - tapped < 320) this.actions.zoom(-Infinity, Infinity);
        else this.actions.go(event.pointerType === "mouse" ? this.pick(x, start.y) : at(x));
        tapped = event.timeStamp;
      }
      start = null;
    };
    for (const kind of ["pointerup", "pointercancel"]) this.plot.addEventListener(kind, end);
    this.plot.addEventListener("pointerleave", () => this.actions.hover(null));
    this.plot.addEventListener("dblclick", () => this.actions.zoom(-Infinity, Infinity));
    this.plot.addEventListener("wheel", (event) => {
      // A wheel alone scrolls the page; a pinch on a touchpad arrives as a wheel with Ctrl.
      if (!this.run?.n || !(event.ctrlKey || event.metaKey || event.altKey)) return;
      event.preventDefault();
      const { left, right } = this.frame(), u = across(this.step(Math.min(Math.max(local(event), left), right)));
      const scale = Math.exp(Math.min(Math.max(event.deltaY, -60), 60) * 0.006);
      this.actions.zoom(back(u + (across(view.from) - u) * scale), back(u + (across(view.to) - u) * scale));
    }, { passive: false });
  }

  // The dot under the pointer if one is near, else the nearest step.
  pick(x, y) {
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

// A small chart that stands still: lines or bars over a scale of its own. `draw(c, frame)` does it.
function stillChart(title, unit, height, draw) {
  const canvas = element("canvas", { role: "img", "aria-label": title });
  const plot = element("div.plot.still", { style: { height: `${height}px` } }, canvas);
  const node = element("div.chart", {}, element("div.chart-head", {}, element("h3", {}, title, element("small", {}, unit))), plot);
  redraws.push(() => { if (node.isConnected) { const size = fit(canvas); size.context.font = FONT; draw(size.context, size); } });
  return node;
}
