// The panels around the charts: held-out scores, passport, generated texts, lists, tables, the record.

// The newest held-out scores, above everything else; page.py writes the same for pages without a script.
function showHeldOut() {
  const newest = run.meta.evaluations.at(-1);
  $("held-out").hidden = !newest;
  $("no-held-out").hidden = Boolean(newest);
  if (!newest) return;
  $("held-out-note").textContent = `${newest.documents ? count(newest.documents) : "The"} documents that no step learns, scored after ${plural(newest.step, "update")}.`;
  for (const [row, scores] of [["raw", newest], ["averaged", newest.averaged]]) {
    $(`held-out-${row}`).hidden = !scores;
    if (scores) for (const [name, text] of [["loss", fixed(scores.loss, 3)], ["accuracy", percent(scores.accuracy ?? NaN)], ["bits_per_byte", fixed(scores.bits_per_byte, 3)]]) $(`held-out-${row}-${name}`).textContent = text;
  }
}

// Over how many steps the headline's loss and accuracy are averaged; page.py writes the same.
function showLast() {
  const { steps, headline } = run.meta, last = steps > 1 ? `last ${Math.min(headline.recent_steps, steps)} steps` : "one step";
  $("figure-loss").nextSibling.textContent = `nats per token, ${last}`;
  $("figure-accuracy").nextSibling.textContent = `of next tokens, ${last}`;
}

function showPassport() {
  const i = cursor.index, step = run.steps[i], { meta } = run;
  const domain = meta.domains[run.domain[i]];
  const cut = run.tokens_cut[i], throughput = run.throughput[i];
  const digest = hex(run.sha1, i * run.digits, run.digits);
  const rows = [
    ["loss", element("span", {}, element("b", { id: "passport-loss" }, fixed(run.loss[i], 4)), element("small", {}, " nats per token"))],
    ["accuracy", element("span", {}, element("span", { id: "passport-accuracy" }, percent(run.accuracy[i])), element("small", {}, ` ${count(run.correct[i])} of ${count(Math.max(run.tokens[i] - 1, 0))}`))],
    ["bits per byte", fixed(run.bits_per_byte[i], 3)],
    ["gradient norm", fixed(run.grad_norm[i], 4)],
    ["learning rate", rate(run.learning_rate[i])],
    ...meta.added.map(({ name, meaning }) => [name.replaceAll("_", " "), element("span", { title: meaning }, fixed(run[`added:${name}`][i], 4))]),
    ["domain", element("span", { title: domain.full }, element("i.dot", { style: { "--colour": css(onPaper(domain.colour)) } }), domain.name)],
    ["tokens kept", element("span", { id: "passport-tokens" }, count(run.tokens[i]))],
    ["tokens cut", cut ? `${run.cut_exact[i] ? "" : "about "}${count(cut)}` : "none"],
    ["text covered", `${count(run.text_bytes[i])} bytes`],
    ["time", `${seconds(run.tokens[i] / throughput)} · ${fixed(throughput, throughput < 100 ? 1 : 0)} tokens/s`],
    ["mirror", meta.mirrors[run.mirror ? run.mirror[i] : 0] ?? "–"],
    ["shard", element("span", { id: "passport-shard" }, signs(meta.shards[run.shard[i]] ?? "–"))],
    ["row", element("span", { id: "passport-row" }, count(run.rows[i]) + (run.part[i] ? `, part ${count(run.part[i])}` : ""))],
  ];
  const list = rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  list.push(element("dt", {}, "sha1"), element("dd.mono", { id: "passport-sha1", title: "SHA-1 of the whole document" }, digest + (run.digits < 20 ? "…" : "")));
  const events = [];
  if (run.spikes.has(step)) events.push(`Loss spike: ${fixed(run.spikes.get(step), 1)} robust standard deviations above the 200 steps before it.`);
  if (run.skipped_updates.has(step)) events.push(`The update was skipped (${run.skipped_updates.get(step)}): the weights stayed as they were.`);
  if (run.passed_over.has(step)) events.push(`Passed over before it: ${Object.entries(run.passed_over.get(step)).map(([why, n]) => `${count(n)} ${why}`).join(", ")}.`);
  for (const gap of run.gaps.get(step) || []) events.push(`Gap before it: ${gap}.`);
  if (meta.events.checkpoints.includes(step)) events.push(`checkpoint-${step} holds the weights of this step.`);
  if (meta.events.resumes.includes(step)) events.push("The run was resumed here.");
  const packed = meta.packed[step];
  if (Array.isArray(packed) && packed.length > 1) events.push(`Packed from ${packed.length} documents: ${packed.slice(0, 8).map((d) => `row ${d.row}`).join(", ")}${packed.length > 8 ? ", …" : ""}.`);
  for (const text of events) list.push(element("dd.whole", {}, element(text.startsWith("Loss") || text.startsWith("The update") ? "span.alarm-text" : "span", {}, signs(text))));
  $("passport").replaceChildren(...list);
  $("step-title").textContent = count(step);
  $("step-note").textContent = step ? `computed with the weights after ${plural(step, "update")}` : "computed with the initial weights";
}

const hex = (bytes, from, size) => Array.from(bytes.subarray(from, from + size), (byte) => byte.toString(16).padStart(2, "0")).join("");

// ---- what the model writes ----

// Index of the last entry at or before `step`, or -1.
function latest(entries, step) {
  let place = -1;
  for (let k = 0; k < entries.length && entries[k].step <= step; k++) place = k;
  return place;
}

// [[kept?, text], ...]: the words of `now`, compared with `former` by their longest common subsequence.
function difference(former, now) {
  const a = former.match(/\s*\S+/g) || [], b = now.match(/\s*\S+/g) || [];
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--) table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const parts = [];
  for (let i = 0, j = 0; j < b.length;) {
    if (i < a.length && a[i] === b[j]) { parts.push([true, b[j]]); i++; j++; }
    else if (i < a.length && table[i + 1][j] >= table[i][j + 1]) i++;
    else parts.push([false, b[j++]]);
  }
  return parts;
}

let shownWriting = "";
function showWriting() {
  const step = cursor.moved ? run.steps[cursor.index] : Infinity, { prompts, samples } = run.meta, note = [];
  const place = latest(prompts, step), box = $("prompts");
  const key = `${run.meta.steps} ${place} ${latest(samples, step)}`;
  if (key === shownWriting) return; // many steps show the same texts
  shownWriting = key;
  if (!prompts.length) box.replaceChildren(element("div.empty", {}, element("p", {}, "No fixed prompts were written in this run (prompts.jsonl is not there).")));
  else {
    const at = Math.max(place, 0), now = prompts[at], former = prompts[at - 1];
    note.push(`fixed prompts as of step ${count(now.step)}${former ? `; what differs from step ${count(former.step)} is marked` : ""}`);
    const moments = element("div.moments", { role: "group", "aria-label": "Steps at which the prompts were written" }, prompts.map((entry, k) =>
      element("button", { type: "button", "aria-pressed": String(k === at), onclick: () => goToStep(Math.min(entry.step, run.steps[run.n - 1])) }, count(entry.step))));
    box.replaceChildren(moments, element("div.prompts", {}, now.texts.map(([prompt, output], k) => {
      const before = former?.texts[k]?.[1];
      const parts = before === undefined ? [[true, output]] : difference(before, output);
      return element("div.card", {},
        element("p.written", { dir: direction(prompt + output) }, element("b", {}, signs(prompt)), /^\s+$/.test(output) ? element("span.gone", {}, ` ${written(output)}`) : parts.map(([kept, text]) => (kept ? lines(text) : element("mark", {}, lines(text))))),
        former ? element("p.former", { dir: direction(before ?? "") }, `step ${count(former.step)}: ${before === output ? "the same" : /^\s*$/.test(before ?? "") ? written(before ?? "") : `…${lines(before ?? "")}`}`) : null);
    })));
  }
  $("writing-note").textContent = note.join("");

  const which = $("sample");
  if (!samples.length) return which.replaceChildren(element("div.empty", { style: { "margin-top": "24px" } }, element("p", {}, "No document was continued in this run yet.")));
  const k = Math.max(latest(samples, step), 0), sample = samples[k];
  const same = sample.true && sample.output ? common(sample.output, sample.true) : 0;
  which.replaceChildren(
    element("div.sub", {},
      element("h3", {}, `A document continued, step ${count(sample.step)}`),
      element("span.near", {},
        element("button", { type: "button", disabled: k > 0 ? null : "", onclick: () => goToStep(samples[k - 1].step) }, "‹ the one before"),
        element("button", { type: "button", disabled: k + 1 < samples.length ? null : "", onclick: () => goToStep(samples[k + 1].step) }, "the next ›"))),
    element("div.sample", {},
      element("div.card.opening", {}, element("h3", {}, "The opening that it was given"), element("p.written", { dir: direction(sample.input || "") }, inWords(sample.input || ""))),
      element("div.card", {}, element("h3", {}, "What it wrote"), element("p.written", { id: "sample-output", dir: direction(sample.output || "") },
        sample.output === null || sample.output === undefined ? element("span.alarm-text", {}, `failed: ${sample.error || "unknown"}`)
          : sample.output === "" ? element("span.gone", {}, "nothing: it ended the text") : /^\s+$/.test(sample.output) ? element("span.gone", {}, written(sample.output))
            : [same ? element("mark", {}, signs(sample.output.slice(0, same))) : null, inWords(sample.output.slice(same))])),
      element("div.card", {}, element("h3", {}, "What came"), element("p.written", { id: "sample-true", dir: direction(sample.true || "") },
        sample.true === null || sample.true === undefined ? element("span.gone", {}, "The document is not in this page and its corpus is not on the disk where this report was made.")
          : sample.true === "" ? element("span.gone", {}, "nothing: the document ends here") : inWords(sample.true)))));
}

// White space in words (terminal.written is the same).
const written = (text) => (text === "" ? "(end of text)" : `(${plural(text.length, "character")} of white space)`);
const inWords = (text) => signs(text.replace(/\s{24,}/g, (space) => ` ${written(space)} `));
// Line ends as signs: texts with many line ends would fill the page.
const lines = (text) => inWords(text).replace(/\n/g, " ⏎ ");

function common(a, b) {
  let k = 0;
  while (k < a.length && a[k] === b[k]) k++;
  return a.slice(0, k).trim() ? k : 0;
}

// ---- what it learns from ----

// A line from `low` to `high` with a mark at `value`, in fractions of its box; at a `null` end it goes on to the edge.
function span(kind, low, value, high, colour) {
  const part = (x) => Math.min(Math.max(x, 0), 1), from = part(low ?? 0), to = part(high ?? 1), at = (x) => `${(100 * x).toFixed(2)}%`;
  const open = `${low === null ? ".opens-left" : ""}${high === null ? ".opens-right" : ""}`;
  return [
    element(`i.reach.${kind}${open}`, { style: { left: at(from), width: at(to - from), "--colour": colour } }),
    value === null ? null : element(`i.mark.${kind}`, { style: { left: at(part(value)), "--colour": colour } }),
  ];
}

const documents = (value) => (value >= 10 ? count(Math.round(value)) : fixed(value, 1));
function noiseWords({ scale, at_least }) {
  if (scale) return `${documents(scale.value)} (${documents(scale.low)} to ${scale.high === null ? "any number" : documents(scale.high)})`;
  return at_least === null ? "nothing stands out" : `nothing stands out; above ${documents(at_least)}`;
}

// The rows of the panel: one per block, with attention and MLP as its two parts.
function layerRows(layers) {
  const rows = [], tied = !layers.some(({ layer }) => layer === "lm_head");
  const names = { wte: tied ? "tokens, head" : "tokens", wpe: "positions", ln_f: "last norm", lm_head: "head" };
  for (const each of layers) {
    const [, block, part] = /^h\.(\d+)\.(\w+)$/.exec(each.layer) || [];
    const name = block === undefined ? names[each.layer] || each.layer : `block ${block}`;
    if (rows[rows.length - 1]?.name !== name) rows.push({ name, parts: [] });
    rows[rows.length - 1].parts.push([part || "whole", each]);
  }
  return rows;
}

function showLayers() {
  const { measured, between, needed, layers } = run.meta.noise, box = $("layers");
  const head = [element("h3", {}, "Noise scale by layer", element("small", {}, " documents, log scale"))];
  if (!layers.length) {
    const why = measured ? `Measured ${plural(measured, "time")} so far; an estimate needs ${needed}.` : "Not measured yet.";
    box.replaceChildren(...head, element("div.empty", {}, element("p", {}, `${why} Every ${count(between)} steps the gradients of several documents are compared at the same weights. This needs one process, one document a step, and a step without autograd.`)));
    return;
  }
  const ends = layers.flatMap(({ scale, at_least }) => (scale ? [scale.low, scale.value, scale.high ?? scale.value] : [at_least ?? 1])).filter((x) => x > 0);
  const bottom = Math.floor(Math.log10(Math.max(Math.min(...ends), 0.1))), top = Math.max(Math.ceil(Math.log10(Math.max(...ends)) + 1e-9), bottom + 1);
  const along = (x) => (x === null ? null : (Math.log10(Math.max(x, 1e-9)) - bottom) / (top - bottom));
  const decades = Array.from({ length: top - bottom + 1 }, (_, k) => 10 ** (bottom + k));
  const row = ({ name, parts }) => element("div.layer", {},
    element("span.layer-name", {}, name),
    element("div.lanes", {}, parts.map(([kind, each]) => element("div.lane", { title: `${each.layer}: ${noiseWords(each)}; ${percent(each.share)} of the gradient's square` },
      each.scale ? span(kind, along(each.scale.low), along(each.scale.value), along(each.scale.high), "")
        : each.at_least === null ? null : span(`${kind}.none`, along(each.at_least), null, null, "")))),
    element("span.layer-value", {}, parts.map(([, each]) => element(each.scale ? "span" : "span.gone", {}, each.scale ? documents(each.scale.value) : each.at_least === null ? "?" : `> ${documents(each.at_least)}`))),
    element("span.layer-share", {}, small(parts.reduce((sum, [, each]) => sum + each.share, 0))));
  const small = (part) => (part > 0 && part < 0.005 ? "< 1 %" : percent(part, 0));
  const quiet = layers.filter(({ scale }) => !scale).length;
  box.replaceChildren(...head,
    element("p.lead", {}, "The number of documents at which noise and signal of a layer's gradient are equal. The fewer, the more documents agree on what the layer should become."),
    element("div.layers", {},
      element("div.layer.layer-head", {}, element("span", {}, ""), element("div.scale", {}, decades.map((x, k) => element("span", { style: { left: `${(100 * k) / (decades.length - 1)}%` } }, x < 1 ? fixed(x, 1) : count(x)))), element("span", {}, "documents"), element("span", {}, "of |g|²")),
      layerRows(layers).map(row)),
    element("p.hint.keys", {}, element("span", {}, element("i.mark.attn"), "attention"), element("span", {}, element("i.mark.mlp"), "MLP"), element("span", {}, element("i.mark.whole"), "other"),
      element("span", {}, "line: two standard errors of the signal"), quiet ? element("span", {}, element("i.reach.none.key"), "nothing stands out of the noise here: the scale is above this") : null),
    element("p.lead", {}, `From the latest ${plural(Math.min(measured, 20), "measurement")} of ${count(measured)}. About one in ${measured >= 12 ? 30 : measured >= 6 ? 20 : 11} layers without any signal would seem to have one by chance.`));
}

function showTeaching() {
  const { between, needed, all, domains, verdict } = run.meta.teaching, box = $("teaching");
  const head = [element("h3", {}, "Which documents teach", element("small", {}, " by how much an update lowers a loss, 10⁻³ nats per token"))];
  if (!all.own.count) {
    box.replaceChildren(...head, element("div.empty", {}, element("p", {}, `Not measured yet at this learning rate. Every ${count(between)} steps two losses are computed: that of the document after its update, and that of the next document before this update. This needs one process, one document a step, and a step without autograd.`)));
    return;
  }
  const falls = [all, ...domains].flatMap(({ same, other }) => [same, other]).filter((fall) => fall.count >= needed);
  const most = Math.max(...falls.map((fall) => Math.abs(fall.mean) + 2 * fall.error), 1e-6), at = (x) => 0.5 + x / (2.1 * most);
  const number = (fall) => (fall.count ? [`${fall.mean <= -5e-5 ? "−" : ""}${fixed(1000 * Math.abs(fall.mean), 1)}`, element("small", {}, ` ± ${fall.error === null ? "?" : fixed(1000 * fall.error, 1)}`)] : "–");
  const cell = (fall) => element(fall.stands_out ? "td.stands-out" : fall.count < needed ? "td.few" : "td", { title: fall.count ? `${plural(fall.count, "update")}${fall.count < needed ? ": too few to say anything" : fall.stands_out ? "" : ": within noise"}` : "no such pair was measured" }, number(fall));
  const row = (taught, name, colour) => element(name === "all" ? "tr.whole" : "tr", {},
    element("td", {}, colour ? element("i.dot", { style: { "--colour": colour } }) : null, name),
    element("td", {}, count(taught.own.count)),
    cell(taught.own), cell(taught.same), cell(taught.other),
    element("td.teaches", {}, element("div.lanes", {}, ["same", "other"].map((kind) => {
      const fall = taught[kind];
      return element("div.lane", {}, fall.count >= needed ? span(kind, at(fall.mean - 2 * fall.error), at(fall.mean), at(fall.mean + 2 * fall.error), colour || ink.ink) : null);
    }))));
  const said = (fall) => (fall.count < needed ? "measured too few times to say" : fall.stands_out ? `${fall.mean > 0 ? "lower" : "higher"} by ${fixed(1000 * Math.abs(fall.mean), 1)}` : "the same within noise");
  box.replaceChildren(...head,
    element("p.lead", {}, `After an update the loss of its own document is ${said(all.own)}. The next document is not learned yet. Its loss, where it has the same domain: ${said(all.same)}; where it has another: ${said(all.other)}. ${verdict[0].toUpperCase()}${verdict.slice(1)}.`),
    element("div.scroll.taught-scroll", { tabindex: "0", role: "region", "aria-label": "Which documents teach, as a table" }, element("table.figures-table.taught-table", {},
      element("thead", {}, element("tr", {}, ["learned", "updates", "itself", "next, same", "next, other"].map((name) => element("th", { scope: "col" }, name)), element("td"))),
      element("tbody", {}, row(all, "all", null), domains.map((taught, k) => [taught, k]).filter(([taught]) => taught.own.count).map(([taught, k]) => row(taught, run.meta.domains[k].name, css(onPaper(run.meta.domains[k].colour))))))),
    element("p.hint.keys", {}, element("span", {}, element("i.mark.same"), "next document of the same domain"), element("span", {}, element("i.mark.other"), "of another domain"),
      element("span", {}, "right of the middle: its loss fell; line: two standard errors, ±: one; bold: beyond two; grey: too few")),
    element("p.lead", {}, `Measured at every ${count(between)}th step with the present learning rate. The next document of the stream is scored before it is learned. If the stream is ordered by domain, each domain is mostly tried on itself.`));
}

// ---- what it read ----

function showCorpus() {
  const { meta } = run, { unusual } = meta;
  const item = (entry) => element("li", {}, element("button", { type: "button", onclick: () => goToStep(entry.step, true) },
    entry.text === null ? element("span.excerpt.none", {}, "text not in this page") : element("span.excerpt", {}, oneLine(entry.text) || written(entry.text)),
    element("span.value", {}, fixed(entry.loss, 2)),
    element("span.what", {}, `step ${count(entry.step)} · ${domainAt(entry.step)}`),
    element("span.against", {}, `usual then ${fixed(entry.usual, 2)}`)));
  const list = (title, lead, entries) => element("div", {}, element("h3", {}, title), element("p.lead", {}, lead),
    entries.length ? element("ul.list", {}, entries.map(item)) : element("p.lead", {}, "None yet."));
  const against = unusual.scored ? "measured against the steps around it" : "by loss alone: the run is short";
  $("unusual").replaceChildren(
    list("Hardest documents", `More surprising than was usual at their time, ${against}. Nats per token.`, unusual.hardest),
    list("Easiest documents", `Less surprising than was usual at their time, ${against}. Nats per token.`, unusual.easiest));

  for (const { u } of stills.splice(0)) u.destroy();
  const charts = [];
  if (meta.by_position?.curves.some((curve) => curve.means.some((mean) => mean !== null))) charts.push(element("div", {}, positionChart(), positionKey(), element("p.lead", {}, "How much it helps to have read more of a document: a line for each quarter of the run.")));
  if (meta.by_length.length) charts.push(element("div", {}, lengthChart(), element("p.lead", {}, "The later half of the run. Box: the middle half of the documents of a length, the stronger its colour the more there are; line: their mean.")));
  $("breakdowns").replaceChildren(...charts);

  const most = Math.max(...meta.by_domain.map((d) => d.steps), 1);
  $("by-domain").replaceChildren(
    element("div.sub", {}, element("h3", {}, "By domain"), element("p", {}, "last: the last tenth of its documents, at least 10")),
    element("div.scroll", { tabindex: "0", role: "region", "aria-label": "By domain, as a table" }, element("table.figures-table", {},
      element("thead", {}, element("tr", {}, ["domain", "documents", "tokens", "first loss", "last loss", "last accuracy", "last bits per byte"].map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, meta.by_domain.map((d, k) => element("tr", {},
        element("td", { title: meta.domains[k].full }, element("i.share", {}, element("i", { style: { width: `${(100 * d.steps) / most}%`, background: css(onPaper(meta.domains[k].colour)) } })), meta.domains[k].name),
        element("td", {}, count(d.steps)), element("td", {}, short(d.tokens)), element("td", {}, fixed(d.first_loss, 3)), element("td", {}, fixed(d.last_loss, 3)),
        element("td", {}, percent(d.last_accuracy ?? NaN)), element("td", {}, fixed(d.last_bits_per_byte, 3))))))));

  const gaps = meta.events.gaps.flatMap(([step, found]) => found.map((text) => [step, text]));
  const over = meta.passed_over, box = [element("div.sub", {}, element("h3", {}, "Passed over"))];
  if (over.length || gaps.length) {
    box.push(element("dl.pairs", {}, over.flatMap(([why, n]) => [element("dt", {}, signs(why)), element("dd", {}, plural(n, "record"))]),
      gaps.flatMap(([step, text]) => [element("dt", {}, `gap before step ${count(step)}`), element("dd", {}, signs(text))])));
  } else box.push(element("p.lead", {}, "Nothing: every record of the corpus up to here became a step, and no shard was set aside."));
  $("passed-over").replaceChildren(...box);
}

function domainAt(step) {
  const i = nearest(run.steps, step);
  return run.steps[i] === step ? run.meta.domains[run.domain[i]].name : "";
}

function positionChart() {
  const { edges, curves } = run.meta.by_position, all = curves.flatMap((curve) => curve.means.filter((m) => m !== null));
  return stillChart("Surprisal by position in the document", "nats, by tokens before it", {
    series: [{}, ...curves.map((_, q) => ({ ...QUIET, stroke: quarterColour(q), width: 2, spanGaps: true }))],
    scales: { x: { time: false, distr: 3, log: 2, range: [1, edges[edges.length - 1]] }, y: { range: [Math.max(Math.min(...all) - 0.3, 0), Math.max(...all) + 0.2] } },
    axes: [xAxis({}, count), yAxis(40)],
  }, [edges.slice(0, -1).map((edge, k) => (edge + edges[k + 1]) / 2), ...curves.map((curve) => curve.means)],
  curves.map((curve) => { const known = curve.means.filter((m) => m !== null); return `${quarterName(curve)}: ${fixed(known[0], 2)} at the beginning, ${fixed(known.at(-1), 2)} at the end`; }).join("; "));
}

// Later quarters have more contrast to the paper, in light and dark themes; all have at least 3:1.
function quarterColour(q) {
  const many = run.meta.by_position.curves.length, part = many === 1 ? 1 : 0.55 + (0.45 * q) / (many - 1);
  return css(onPaper(`#${mix(rgb(ink.paper), rgb(ink.accent), part).map((c) => Math.round(c).toString(16).padStart(2, "0")).join("")}`));
}
const quarterName = (curve) => `steps ${count(curve.first)} to ${count(curve.last)}`;
const positionKey = () => element("p.hint.keys", {}, run.meta.by_position.curves.map((curve, q) => element("span", {}, element("i.reach.key", { style: { "--colour": quarterColour(q), opacity: 1, height: "3px" } }), quarterName(curve))));

function lengthChart() {
  const bins = run.meta.by_length, high = Math.max(...bins.map((b) => b.high)) + 0.2, low = Math.max(Math.min(...bins.map((b) => b.low)) - 0.3, 0);
  const name = (b) => (b.from >= 1024 ? `${b.from / 1024}k` : b.from === 8 ? "<16" : `${b.from}`) + (b === bins[bins.length - 1] ? "+" : "");
  const most = Math.max(...bins.map((b) => b.count)), places = bins.map((_, k) => k);
  // One rectangle per bin from `bottom` to `top`, `extra` pixels taller.
  const boxes = (u, top, bottom, extra) => bins.map((bin, k) => {
    const wide = Math.min((u.bbox.width / bins.length) * 0.62, 46 * uPlot.pxRatio), path = new Path2D(), y = u.valToPos(bin[top], "y", true);
    path.rect(u.valToPos(k, "x", true) - wide / 2, y - (extra / 2) * uPlot.pxRatio, wide, u.valToPos(bin[bottom], "y", true) - y + extra * uPlot.pxRatio);
    return [css(rgb(ink.point), 0.35 + 0.5 * (bin.count / most)), path];
  });
  const means = (u) => boxes(u, "mean", "mean", 2.4).reduce((all, [, path]) => (all.addPath(path), all), new Path2D());
  return stillChart("Loss by length of the document", "nats per token, by tokens", {
    series: [{}, { ...QUIET, fill: "black", paths: (u) => ({ fill: byColour(boxes(u, "high", "low", 0)) }) },
      { ...QUIET, fill: ink.accent, paths: (u) => ({ fill: means(u) }) }],
    scales: { x: { time: false, range: [-0.5, bins.length - 0.5] }, y: { range: [low, high] } },
    axes: [xAxis({ splits: () => places }, (k) => name(bins[k])), yAxis(40)],
  }, [places, places, places], bins.map((bin) => `${name(bin)} tokens: ${fixed(bin.mean, 2)}`).join(", "));
}

// ---- the record ----

function showRecord() {
  const { meta } = run, head = meta.headline;
  const pairs = (rows, mono = false) => element("dl.pairs", {}, rows.flatMap(([name, value, thin]) => [element("dt", {}, name), element(thin ? "dd.mono.thin" : mono ? "dd.mono" : "dd", {}, signs(String(value)))]));
  const per = head.seconds / Math.max(meta.steps, 1), goal = meta.max_steps;
  const plan = [
    ["steps", goal ? `${count(meta.steps)} of ${count(goal)} planned (${percent(meta.steps / goal, 0)})` : count(meta.steps)],
    ["training time", `${seconds(head.seconds)}, ${seconds(per)} a step${goal && goal > meta.steps ? `; ${seconds(per * (goal - meta.steps))} to go at that pace` : ""}`],
    ["documents", `${count(head.documents)} begun, ${count(head.tokens)} tokens, ${count(head.text_bytes)} bytes of text`],
    ["checkpoints", meta.events.checkpoints.length ? meta.events.checkpoints.map(count).join(", ") : "none"],
    ["resumed", meta.events.resumes.length ? `at ${meta.events.resumes.map(count).join(", ")}` : "not noted"],
    ["loss spikes", meta.events.spikes.length ? count(meta.events.spikes.length) : "none"],
    ["skipped updates", meta.events.skipped_updates.length ? count(meta.events.skipped_updates.length) : "none"],
  ];
  const copy = element("button", { type: "button" }, "copy");
  copy.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(meta.resume); copy.textContent = "copied"; }
    catch { const range = document.createRange(); range.selectNodeContents(copy.previousSibling); getSelection().removeAllRanges(); getSelection().addRange(range); copy.textContent = "selected"; }
    setTimeout(() => { copy.textContent = "copy"; }, 1600);
  });
  $("record-body").replaceChildren(
    element("h3", {}, "To continue the run"),
    element("div.command", {}, element("code", {}, meta.resume), copy),
    element("div.halves", {},
      element("div", {}, element("h3", {}, "Plan and what happened"), pairs(plan), element("h3", { style: { "margin-top": "34px" } }, "What it ran on"),
        meta.about.length ? pairs(meta.about) : element("p.lead", {}, "run.json is not there.")),
      element("div", {}, element("h3", {}, "Configuration"), element("p.lead", {}, "run_config.yaml; entries in grey have their defaults"),
        meta.config.length ? pairs(meta.config.map(([key, value]) => [key.replace(/^# /, ""), value, key.startsWith("# ")]), true) : element("p.lead", {}, "run_config.yaml is not there."))));
  $("footer").textContent = `Made from the ledger on ${meta.written} by slimpajama_hf ${meta.version}. Row s was computed with the weights after s updates, those of checkpoint-s. `
    + (meta.every > 1 ? `This page has every ${count(meta.every)}th of ${count(meta.steps)} steps, all steps with marks, and the extremes in between. ` : "Every step of the ledger is in this page. ")
    + "It does not use the network.";
}
