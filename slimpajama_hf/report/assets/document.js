// The document of a step: a colour for each token, the model's guesses under the pointer, before and after the update.

const reading = { mode: "before", index: null, lit: null };
const MODES = [["before", "as it was read"], ["after", "after its update"], ["taught", "what it taught"]];

const nats = (value) => (value === UNKNOWN ? NaN : value / PARTS);
// The scale of colours ends at the surprisal of a blind guess among all tokens.
const blind = () => run.meta.uniform_nats || 10;

function showDocument() {
  const box = $("reading"), step = run.steps[cursor.index], passport = run.passports.get(step);
  hidePopover();
  if (!passport) return box.replaceChildren(withoutDocument(step));
  const { tokens, tokens_at, nats_at } = passport;
  const pieces = Array.from(run.piece.subarray(tokens_at, tokens_at + tokens), (k) => run.meta.vocabulary[k]);
  const before = Array.from(run.before.subarray(nats_at, nats_at + tokens - 1), nats);
  const after = Array.from(run.after.subarray(nats_at, nats_at + tokens - 1), nats);
  const known = before.some(Number.isFinite);
  const mode = passport.after ? reading.mode : "before";
  const number = (k) => (mode === "before" ? before[k] : mode === "after" ? after[k] : after[k] - before[k]);
  const colour = (k) => {
    const value = number(k);
    if (!Number.isFinite(value)) return null;
    return mode === "taught" ? change(value) : ramp(value / blind());
  };

  const text = element("div.document", { dir: direction(pieces.join("")), tabindex: "0", role: "group", "aria-label": "The document; arrow keys go from token to token" });
  const spans = pieces.map((piece, k) => {
    const background = k ? colour(k - 1) : null;
    const span = element("span", { style: background ? { "background-color": css(background), color: over(background) } : {} });
    span.dataset.token = k;
    if (piece === "") span.append(element("i.sign", {}, "·"));
    else
      for (const part of piece.split(/(\n|\t)/)) {
        if (part === "\n") span.append(element("i.sign", {}, "⏎"), "\n");
        else if (part === "\t") span.append(element("i.sign", {}, "⇥"), "\t");
        else if (part) span.append(signs(part));
      }
    return span;
  });
  text.append(...spans);
  const cut = run.tokens_cut[cursor.index];
  if (cut) text.append(element("span.rest", {}, `  … ${run.cut_exact[cursor.index] ? "" : "about "}${plural(cut, "more token")} not read`));

  const bars = element("div.bars", {}, element("canvas", { "aria-hidden": "true" }));
  const highest = Math.max(...before.filter(Number.isFinite), ...after.filter(Number.isFinite), blind());
  const widest = Math.max(...before.map((_, k) => Math.abs(after[k] - before[k])).filter(Number.isFinite), 0.3);
  const drawBars = () => {
    const { context: c, width, height } = fit(bars.firstChild);
    const wide = width / (tokens - 1), middle = mode === "taught" ? height / 2 : height - 1;
    c.fillStyle = ink.line;
    c.fillRect(0, middle, width, 1);
    const least = ink.dark ? [90, 96, 104] : [203, 199, 188];
    for (let k = 0; k < tokens - 1; k++) {
      const value = number(k);
      if (!Number.isFinite(value)) continue;
      const shade = colour(k);
      // Colours close to the paper become grey, so that the bar can be seen.
      c.fillStyle = css(contrast(shade, rgb(ink.paper)) < 1.35 ? least : shade);
      const tall = mode === "taught" ? (value / widest) * (height / 2 - 1) : (value / highest) * (height - 4);
      c.fillRect(k * wide, Math.min(middle, middle - tall), Math.max(wide - (wide > 3 ? 1 : 0), 0.8), Math.max(Math.abs(tall), 1));
      if (reading.lit === k + 1) { c.fillStyle = css(rgb(ink.accent), 0.25); c.fillRect(k * wide, 0, wide, height); }
    }
  };
  const light = (k) => {
    if (reading.lit !== null) spans[reading.lit]?.classList.remove("lit");
    reading.lit = k;
    if (k !== null) spans[k].classList.add("lit");
    drawBars();
  };
  const open = (k, anchor) => { light(k); showPopover(passport, k, { pieces, before, after }, anchor ?? spans[k].getClientRects()[0]); };
  const over_ = (event) => {
    const token = event.target.closest?.("[data-token]");
    if (token) open(+token.dataset.token, nearestRect(token, event));
  };
  text.addEventListener("pointerover", over_);
  text.addEventListener("pointerdown", over_);
  text.addEventListener("pointerleave", () => { hidePopover(); light(null); });
  text.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!way) return;
    event.preventDefault(); event.stopPropagation();
    open(Math.min(Math.max((reading.lit ?? -1) + way, 0), tokens - 1));
    $("said").textContent = Array.from($("popover").children).slice(0, 2).map((each) => each.textContent).join(": ");
  });
  text.addEventListener("blur", () => { hidePopover(); light(null); });
  const onBars = (event) => {
    const box = bars.getBoundingClientRect(), k = Math.floor(((event.clientX - box.left) / box.width) * (tokens - 1)) + 1;
    if (k >= 1 && k < tokens) open(k, new DOMRect(event.clientX, box.top, 1, box.height));
  };
  bars.addEventListener("pointermove", onBars);
  bars.addEventListener("pointerdown", onBars);
  bars.addEventListener("pointerleave", () => { hidePopover(); light(null); });

  const modes = passport.after
    ? element("div.segments", { role: "group", "aria-label": "Which surprisal" }, MODES.map(([name, label]) =>
      element("button", { type: "button", "aria-pressed": String(name === mode), "data-mode": name, onclick: () => { reading.mode = name; reading.lit = null; showDocument(); } }, label)))
    : null;
  box.replaceChildren(
    element("div.reading-head", {}, element("h3", {}, "The document, a colour for every token"), modes),
    ...(passport.after ? [taught(pieces, before, after)] : []),
    ...(known ? [bars] : [element("p.lead", {}, "The surprisals of this step were not kept: its tokens have no colour.")]),
    text,
    ...(known ? [legend(mode)] : []),
  );
  reading.draw = drawBars;
  drawBars();
}

function nearestRect(node, event) {
  // A token may be wrapped over two lines.
  return [...node.getClientRects()].find((r) => event.clientY >= r.top - 2 && event.clientY <= r.bottom + 2) || node.getBoundingClientRect();
}

// One sentence on how the update changed the loss of its own document.
function taught(pieces, before, after) {
  const both = before.map((_, k) => k).filter((k) => Number.isFinite(before[k]) && Number.isFinite(after[k]));
  const mean = (values) => both.reduce((sum, k) => sum + values[k], 0) / both.length;
  const from = mean(before), to = mean(after), better = both.filter((k) => after[k] < before[k]).length;
  const most = both.reduce((best, k) => (best === null || after[k] - before[k] < after[best] - before[best] ? k : best), null);
  const node = element("p.taught", { id: "taught" });
  if (!both.length) return node;
  node.append("The update moved this document from ", element("b", {}, fixed(from, 3)), " to ", element("b", {}, fixed(to, 3)),
    ` nats per token (${to <= from ? "−" : "+"}${fixed(Math.abs((100 * (to - from)) / from), 1)} %); ${count(better)} of ${plural(both.length, "token")} became less surprising`);
  if (most !== null && before[most] - after[most] > 0.005)
    node.append(", most of all ", element("b", {}, `“${visible(pieces[most + 1])}”`), `, ${fixed(before[most], 2)} → ${fixed(after[most], 2)}`);
  node.append(".");
  return node;
}

function legend(mode) {
  const bar = (colours) => element("i", { style: { background: colours } });
  return mode === "taught"
    ? element("p.ramp", {}, "less surprising, −1 nat", bar(gradient(change, -1, 1)), "+1 nat, more surprising")
    : element("p.ramp", {}, "0 nats, certain", bar(gradient(ramp, 0, 1)), `${fixed(blind(), 1)} nats, a blind guess among all tokens`);
}

function withoutDocument(step) {
  const box = element("div.empty");
  const { coloured } = run;
  if (!coloured.length) {
    box.append(element("p", {}, "This run kept no documents for its report. Every step is still named in the ledger; to read this one:"));
  } else {
    const after = lowerBound(coloured, step), near = [coloured[after - 1], coloured[after]].filter((s) => s !== undefined);
    box.append(
      element("p", {}, `The text of step ${count(step)} is not in this page: it carries ${plural(coloured.length, "document")}, spread over the run. The nearest:`),
      element("p.near", {}, near.map((s) => element("button", { type: "button", onclick: () => goToStep(s) }, `${s < step ? "‹ " : ""}step ${count(s)}${s > step ? " ›" : ""}`))),
      element("p", {}, "To read this one:"));
  }
  box.append(element("p", {}, element("code", {}, `python -m slimpajama_hf inspect ${run.meta.folder} --step ${step}`)));
  return box;
}

function showPopover(passport, k, { pieces, before, after }, anchor) {
  const box = $("popover");
  const children = [element("div.piece", {}, visible(pieces[k]))];
  if (k === 0) children.push(element("p", {}, "The first token: nothing comes before it to predict it from."));
  else {
    const was = before[k - 1], is = after[k - 1];
    if (Number.isFinite(was)) children.push(element("p", {}, element("b", {}, `${fixed(was, 4)} nats`), ` · chance ${chance(was)}`));
    if (Number.isFinite(is)) children.push(element("p", {}, `after the update ${fixed(is, 4)} nats · ${chance(is)}`));
    if (passport.top) {
      const at = passport.top_at + 5 * (k - 1), rows = [];
      let seen = false;
      for (let j = 0; j < 5; j++) {
        const guess = run.meta.vocabulary[run.top[at + j]], p = (run.chance[at + j] / 255) ** 2, came = guess === pieces[k] && !seen;
        seen ||= came;
        rows.push(element(came ? "tr.came" : "tr", {}, element("td", {}, visible(guess)), element("td", {}, element("i", { style: { width: `${Math.max(100 * p, 1)}%` } })), element("td", {}, p < 0.01 ? "< 1 %" : percent(p, 0))));
      }
      children.push(element("table", { "aria-label": "The five likeliest tokens" }, element("tbody", {}, rows)));
      if (!seen) children.push(element("p", {}, "What came is not among its five guesses."));
    }
  }
  box.replaceChildren(...children);
  box.hidden = false;
  const width = box.offsetWidth, height = box.offsetHeight, page = document.documentElement;
  const left = Math.min(Math.max(anchor.left - 20, 12), page.clientWidth - width - 12);
  const above = anchor.bottom + height + 14 > window.innerHeight && anchor.top - height - 8 > 0;
  box.style.left = `${left + window.scrollX}px`;
  box.style.top = `${(above ? anchor.top - height - 8 : anchor.bottom + 8) + window.scrollY}px`;
}

function hidePopover() { $("popover").hidden = true; }
