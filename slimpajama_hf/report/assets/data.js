// Unpacks the content of the page, gzip -> JSON and arrays (packed by packing.py), and derives further numbers.

async function gunzip(bytes) {
  if (typeof DecompressionStream === "undefined")
    throw new Error("this browser cannot unpack gzip; it needs Chrome 80, Firefox 113, Safari 16.4 or later");
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

const ARRAY_TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };

// {meta, arrays} from unzipped bytes. The bytes of an array are transposed: all first ones, then all second ones, ...
function unpack(bytes) {
  const size = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  const arrays = {};
  for (const [name, [kind, count, offset]] of Object.entries(head.arrays)) {
    const Type = ARRAY_TYPES[kind];
    const width = Type.BYTES_PER_ELEMENT;
    const array = new Type(count);
    const target = new Uint8Array(array.buffer);
    const start = 4 + size + offset;
    for (let byte = 0; byte < width; byte++)
      for (let i = 0, from = start + byte * count, to = byte; i < count; i++, from++, to += width) target[to] = bytes[from];
    arrays[name] = array;
  }
  return { meta: head.meta, arrays };
}

// The data of the panels: one array per number, with one entry per step in the page. Entry i is of step `steps[i]`.
function derive({ meta, arrays }) {
  const n = arrays.loss.length;
  const run = { meta, n, ...arrays };
  run.steps = arrays.step || Uint32Array.from({ length: n }, (_, i) => i);
  run.accuracy = Float32Array.from({ length: n }, (_, i) => arrays.correct[i] / Math.max(arrays.tokens[i] - 1, 1));
  run.rows = new Float64Array(n);
  for (let i = 0, at = 0; i < n; i++) run.rows[i] = at += arrays.row[i];
  run.bits = Float64Array.from({ length: n }, (_, i) =>
    (arrays.loss[i] * (arrays.tokens[i] - 1) + (meta.uniform_nats ?? 0)) / Math.LN2);
  run.bits_per_byte = Float64Array.from({ length: n }, (_, i) => run.bits[i] / Math.max(arrays.text_bytes[i], 1));
  run.digits = n ? arrays.sha1.length / n : 0;

  // Where the tokens of each passport begin in the joined arrays.
  run.passports = new Map();
  let tokens = 0, predicted = 0, guessed = 0;
  for (const passport of meta.passports) {
    run.passports.set(passport.step, { ...passport, tokens_at: tokens, nats_at: predicted, top_at: guessed });
    tokens += passport.tokens;
    predicted += passport.tokens - 1;
    if (passport.top) guessed += 5 * (passport.tokens - 1);
  }
  run.was_taught = run.taught.some(Number.isFinite);
  run.coloured = meta.passports.map((passport) => passport.step);
  const by = (pairs) => new Map(pairs);
  run.spikes = by(meta.events.spikes);
  run.skipped_updates = by(meta.events.skipped_updates);
  run.passed_over = by(meta.events.passed_over);
  run.gaps = by(meta.events.gaps);
  return run;
}

const PARTS = 10000; // surprisals are in ten-thousandths of a nat
const UNKNOWN = 2 ** 32 - 1; // marks an unknown surprisal

// First index whose step is at or after `step`.
function lowerBound(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low;
}

// Index of the entry nearest to `step`.
function nearest(steps, step) {
  const after = lowerBound(steps, step);
  if (after === 0) return 0;
  if (after === steps.length) return steps.length - 1;
  return steps[after] - step < step - steps[after - 1] ? after : after - 1;
}
