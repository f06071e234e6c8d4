// A run in progress: the server sends new rows and the run's state as events; sometimes everything is fetched again.

let news = null; // the open event stream
let content = null; // {meta, arrays} as last fetched, with the rows since
let generation = "0";
let told = null; // the last state

async function follow() {
  $("live").hidden = false;
  if (page.dataset.watch === "several") $("live").before(element("a.all-runs", { href: "../../" }, "‹ all runs"));
  $("live").closest(".top").querySelector(".figures").after(element("section", { id: "now", "aria-label": "How the run does just now" }));
  await fetchAll();
}

// Fetch the whole content, then listen to the events after it.
async function fetchAll() {
  news?.close();
  try {
    const answer = await fetch("data", { cache: "no-store" });
    if (answer.status === 200) {
      // A page that was opened before the run began is loaded again, to get its title.
      if (told && content === null && run === null) return location.reload();
      generation = answer.headers.get("ETag").slice(1).split("-")[0];
      const reading = document.querySelector(".document")?.scrollTop ?? 0;
      content = unpack(await gunzip(new Uint8Array(await answer.arrayBuffer())));
      take(content, run === null || !run.n);
      showFigures();
      if (reading) document.querySelector(".document")?.scrollTo(0, reading);
      page.dataset.ready = "yes";
    } else if (answer.status !== 204) throw new Error(`the server says ${answer.status}`);
  } catch (error) {
    if (told?.over) return;
    lost();
    if (run === null) fail(`The run cannot be shown: ${error.message}`);
    return void setTimeout(fetchAll, 2000);
  }
  listen();
}

function listen() {
  news = new EventSource(content ? `events?from=${generation}-${run.meta.steps}` : "events");
  news.addEventListener("state", (event) => showState(JSON.parse(event.data)));
  news.addEventListener("rows", (event) => takeRows(JSON.parse(event.data)));
  news.addEventListener("content", fetchAll);
  news.addEventListener("over", ended);
  news.onerror = lost;
}

// The program that serves this page has ended; the page keeps its content.
function ended() {
  news.close();
  told = { ...told, over: true, training: false };
  showState(told);
  $("live").textContent = `ended · step ${count(told.steps)}`;
}

function lost() {
  $("live").className = "lost";
  $("live").textContent = "not connected";
  $("now")?.classList.add("old");
}

// Append new rows; the shown step stays the same.
async function takeRows({ from, packed }) {
  const fresh = unpack(await gunzip(fromBase64(packed)));
  const names = Object.keys(fresh.arrays), { meta, arrays } = content ?? {};
  const fits = content && run.n && run.meta.steps === from && names.every((name) => name in arrays)
    && "mirror" in arrays === "mirror" in fresh.arrays && fresh.arrays.sha1.length === run.digits * fresh.arrays.loss.length;
  // Rows of another kind: the server sends an event when everything can be fetched again.
  if (!fits) return;
  const places = fresh.meta.domains.map((domain) => {
    const known = meta.domains.findIndex(({ full }) => full === domain.full);
    return known >= 0 ? known : meta.domains.push(domain) - 1;
  });
  fresh.meta.domains.forEach((domain, k) => { meta.domains[places[k]].steps = domain.steps; });
  fresh.arrays.domain = fresh.arrays.domain.map((k) => places[k]);
  // The first row is an absolute number, the others are differences to the row before.
  fresh.arrays.row[0] -= run.rows[run.n - 1];
  for (const name of names) {
    const both = new arrays[name].constructor(arrays[name].length + fresh.arrays[name].length);
    both.set(arrays[name]);
    both.set(fresh.arrays[name], arrays[name].length);
    arrays[name] = both;
  }
  arrays.taught.fill(NaN);
  arrays.taught_next.fill(NaN);
  const placeOf = "step" in arrays && new Map(Array.from(arrays.step, (step, place) => [step, place]));
  for (const [step, own, next] of fresh.meta.taught) {
    const place = placeOf ? placeOf.get(step) : step;
    if (place !== undefined) [arrays.taught[place], arrays.taught_next[place]] = [own, next ?? NaN];
  }
  const { seldom, steps, headline, shards, mirrors } = fresh.meta;
  Object.assign(meta, { steps, headline, shards, mirrors });
  meta.events.spikes.push(...seldom.spike);
  meta.events.skipped_updates.push(...seldom.update_skipped);
  meta.events.passed_over.push(...seldom.skipped);
  const atEnd = cursor.index === run.n - 1, whole_ = $("unzoom").disabled;
  run = derive(content);
  showFigures();
  $("slider").max = run.n - 1;
  if (whole_) [view.from, view.to] = [0, Math.max(steps - 1, 1)];
  chooseDomains();
  if (!document.hidden) later(drawNew);
  // If the newest step is shown, it stays the newest.
  if (atEnd) moveTo(run.n - 1);
}

function drawNew() {
  showDomains();
  showMarks();
  drawCharts();
}
document.addEventListener("visibilitychange", () => { if (watching && run?.n && !document.hidden) later(drawNew); });

const gigabytes = (bytes) => (bytes >= 1e10 ? `${fixed(bytes / 1e9, 0)} GB` : bytes >= 1e9 ? `${fixed(bytes / 1e9, 1)} GB` : `${fixed(bytes / 1e6, 0)} MB`);
const perSecond = (rate) => (rate >= 1e12 ? `${fixed(rate / 1e12, rate < 1e13 ? 1 : 0)} TFLOP/s` : `${fixed(rate / 1e9, 0)} GFLOP/s`);

// [name, value, note] of the state of a run.
function stateRows({ steps, max_steps: goal, left_seconds: left, process_bytes: bytes, gpus, used, rate: measured }) {
  const rows = [["time left", goal && steps >= goal ? "none" : left === null ? "–" : seconds(left), goal ? `${count(Math.max(goal - steps, 0))} steps, at the pace of the last 50` : "how many steps is not known"]];
  if (bytes !== null) rows.push(["memory", gigabytes(bytes), "of the process that trains"]);
  gpus.forEach(({ used_bytes, total_bytes }, k) => rows.push([`GPU ${k}`, gigabytes(used_bytes), `of ${gigabytes(total_bytes)}, whoever uses it`]));
  rows.push(["MFU", used === null ? "–" : percent(used, 0), used !== null ? `model FLOPs, of ${perSecond(measured)} measured as the run began` : measured === null ? "the rate of this machine was not measured: train with --watch" : "no step yet, or several processes"]);
  return rows;
}
const stateWord = ({ training, steps, max_steps: goal }) =>
  training ? (steps ? "training" : "starting") : training === null ? "on another machine" : goal && steps >= goal ? "done" : steps ? "not training" : "waiting for the run";

function showState(state) {
  told = state;
  if (state.trouble) fail(`The run cannot be shown as it is now: ${state.trouble}`); else $("failure").hidden = true;
  const { steps, max_steps: goal, training } = state, live = $("live"), word = stateWord(state);
  live.className = training === false ? "still" : "";
  live.replaceChildren(training ? "live" : word, element("span", {}, ` · step ${count(steps)}`));
  const part = goal ? Math.min(steps / goal, 1) : 0;
  $("now").classList.remove("old");
  $("now").replaceChildren(
    element("div.now-progress", {}, element("div.now-words", {}, element("b", { class: training ? "on" : "" }, word), element("span", {}, goal ? `${count(steps)} of ${count(goal)} steps` : plural(steps, "step")), goal ? element("span", {}, percent(part, part < 0.1 ? 1 : 0)) : null),
      element("div.progress", { role: "progressbar", "aria-label": "Steps done", "aria-valuemin": 0, "aria-valuemax": goal ?? steps, "aria-valuenow": steps }, element("i", { style: { width: `${100 * part}%` } }))),
    element("dl", {}, stateRows(state).map(([name, value, note]) => element("div", {}, element("dt", {}, name), element("dd", {}, element("b", {}, value), element("span", {}, note))))));
}
