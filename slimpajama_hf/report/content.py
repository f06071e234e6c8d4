"""Everything that the page shows, gathered from the folder of a run: JSON values and arrays (see `gather`)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf import __version__, checkpoints, noise, palette, plan, surprisals, teaching, views
from slimpajama_hf.errors import UserError
from slimpajama_hf.report import documents
from slimpajama_hf.report.rows import Rows
from slimpajama_hf.run_folder import RunFolder

#: More steps than this are not all in the page: every k-th one is, with the least and the greatest loss around it.
MOST_STEPS = 110_000
#: Up to so many steps the whole SHA-1 of each is in the page, beyond them its first eight digits.
WHOLE_HASHES = 12_000
#: Domains with a colour of their own; the rest is one.
MOST_DOMAINS = 24
#: Spikes, skipped updates and passed-over records of one kind that the page lists.
MOST_EVENTS = 2_000
#: Rows that the loss by position is a mean of, at each quarter of the run.
POSITION_ROWS = 6_000
#: Bytes of the packed content that passports may fill up to: the page is a third larger (base64).
MOST_BYTES = 3_450_000

_UNUSUAL = 12
_BLOCK = 200
_LAST = 50


def gather(folder: RunFolder, rows: Rows, most_passports: int = documents.MOST_PASSPORTS) -> tuple[Any, Any]:
    """(JSON values, arrays by name) of the run as it stands; `rows` is brought up to date first.

    Whatever is missing in an old, torn or young run is said in `notes`; raises UserError only where there is no run.
    """
    rows.update()
    notes = [_capital(rows.trouble)] if rows.trouble else []
    try:
        record = folder.read_record()
    except UserError as error:
        if not folder.ledger.exists():
            raise UserError(
                f"{folder.path}: no run in it (neither run.json nor ledger.jsonl); expected the folder of a run, "
                "as in python -m slimpajama_hf report runs/embedded-tiny"
            ) from error
        record = {}
        notes.append("run.json is missing or torn: what the run was is not known, its numbers are.")
    carried, every = _carried(rows, folder)
    domains, domain_of = _domains(rows)
    arrays = _step_arrays(rows, carried, every, domain_of)
    passports = documents.read_passports(folder.path / documents.PASSPORTS, len(rows))
    passports = [passports[place] for place in documents.spread(len(passports), most_passports)]
    nats, nats_note = _surprisals(folder, rows)
    if nats_note:
        notes.append(nats_note)
    vocabulary = _pack_passports(passports, rows, nats, arrays)
    texts = _Texts(record, rows, passports)
    samples = _samples(folder, texts, notes)
    unusual = _unusual(rows, texts)
    texts.read(samples, unusual)
    meta = {
        **_caption(record, folder),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "steps": len(rows),
        "every": every,
        "max_steps": record.get("max_steps") if isinstance(record.get("max_steps"), int) else None,
        "headline": _headline(rows),
        "uniform_nats": _uniform_nats(rows),
        "domains": domains,
        "shards": [_without_home(name) for name in rows.names["shard"]],
        "mirrors": [_without_home(name) for name in rows.names["mirror"]],
        "events": _events(rows, folder, record),
        "passports": [
            {
                "step": passport["step"],
                "tokens": len(passport["input_ids"]),
                "before": "before" in passport,
                "after": "after" in passport,
                "top": "top_ids" in passport,
            }
            for passport in passports
        ],
        "vocabulary": vocabulary,
        "samples": samples,
        "prompts": _prompts(folder),
        "unusual": unusual,
        "noise": _noise(rows),
        "teaching": _teaching(rows, domain_of, domains),
        "by_domain": _by_domain(rows, domain_of, len(domains)),
        "by_length": _by_length(rows),
        "by_position": _by_position(rows, nats),
        "passed_over": _passed_over(rows),
        "packed": {str(step): found for step, found in list(rows.documents.items())[:MOST_EVENTS]},
        "evaluations": _evaluations(folder, len(rows)),
        "config": _config(folder),
        "about": _about(record),
        "resume": _without_home(plan.resume_command(folder.path, record)),
        "notes": notes,
    }
    return strict(meta), arrays


def strict(value: Any) -> Any:
    """JSON values without numbers that are none: those become None, numpy's become Python's."""
    if isinstance(value, dict):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _without_home(text: str) -> str:
    home = str(Path.home())
    # Of the root user's or of nobody's home, "/", nothing would be left.
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if len(home) > 1 else text


def _caption(record: dict[str, Any], folder: RunFolder) -> dict[str, str]:
    try:
        title, subtitle = views.caption_of(record)
    except (KeyError, TypeError, ValueError):
        title, subtitle = folder.path.resolve().name, "one document a step"
    return {
        "title": _without_home(title),
        "subtitle": _without_home(subtitle),
        "folder": _without_home(str(folder.path)),
    }


# ---- steps ---------------------------------------------------------------------------------------------------------


def _carried(rows: Rows, folder: RunFolder) -> tuple[np.ndarray, int]:
    """Indices of the rows that the page carries, ascending, and how many rows one stands for."""
    count = len(rows)
    every = -(-count // MOST_STEPS) if count > MOST_STEPS else 1
    if every == 1:
        return np.arange(count), 1
    named = [*rows.spikes, *rows.skipped_updates]
    named += [entry["step"] for entry in documents.json_lines(folder.samples) if isinstance(entry.get("step"), int)]
    named += [passport["step"] for passport in documents.read_passports(folder.path / documents.PASSPORTS, count)]
    extra = np.array([step for step in named[: MOST_STEPS // 10] if step < count], np.int64)
    return np.union1d(np.arange(0, count, every), extra), every


def _step_arrays(rows: Rows, carried: np.ndarray, every: int, domain_of: np.ndarray) -> dict[str, np.ndarray]:
    """What every carried step has; types are those of the packing."""
    predicted = np.maximum(rows.predicted, 1)
    counted = np.isfinite(rows.code_bits)
    with np.errstate(invalid="ignore", divide="ignore"):
        running = np.cumsum(np.where(counted, rows.code_bits, 0)) / np.cumsum(np.where(counted, rows.text_bytes, 0))
    arrays = {
        "loss": rows.loss.astype(np.float32),
        "correct": np.nan_to_num(rows.accuracy * predicted).round().clip(0, 2**32 - 1).astype(np.uint32),
        "grad_norm": rows.grad_norm.astype(np.float32),
        "learning_rate": rows.learning_rate.astype(np.float32),
        "throughput": rows.throughput.astype(np.float32),
        "running_bits": running.astype(np.float32),
        "tokens": rows.tokens.astype(np.uint32),
        "tokens_cut": rows.tokens_cut.clip(0, 2**32 - 1).astype(np.uint32),
        "cut_exact": rows.tokens_cut_exact.astype(np.uint8),
        "text_bytes": rows.text_bytes.clip(0, 2**32 - 1).astype(np.uint32),
        "shard": rows.shard.astype(np.uint32),
        "domain": domain_of.astype(np.uint8),
        "part": rows.part.astype(np.uint32),
    }
    arrays = {name: array[carried] for name, array in arrays.items()}
    # Readers go forward: differences are small numbers that compress to almost nothing.
    arrays["row"] = np.diff(rows.row[carried], prepend=0).astype(np.int32)
    if len(rows.names["mirror"]) > 1:
        arrays["mirror"] = rows.mirror[carried].astype(np.uint8)
    digits = 20 if len(rows) <= WHOLE_HASHES else 4
    # Byte by byte: hashes do not compress, whatever their order.
    arrays["sha1"] = np.ascontiguousarray(rows.sha1[carried, :digits]).reshape(-1)
    if every > 1:
        arrays["step"] = rows.step[carried].astype(np.uint32)
        begins = np.searchsorted(carried, np.arange(0, len(rows), every))
        for name in ("loss", "grad_norm"):
            # Every carried step shows the extremes of the block that it lies in.
            values = getattr(rows, name)
            finite = np.isfinite(values)
            starts = np.arange(0, len(rows), every)
            low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
            high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
            block = np.searchsorted(begins, np.arange(len(carried)), side="right") - 1
            arrays[f"{name}_low"] = np.where(np.isfinite(low), low, np.nan)[block].astype(np.float32)
            arrays[f"{name}_high"] = np.where(np.isfinite(high), high, np.nan)[block].astype(np.float32)
    return arrays


def _domains(rows: Rows) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The domains, the most frequent first, and the index into them of every row (steps,)."""
    names = rows.names["domain"]
    counts = np.bincount(rows.domain, minlength=len(names))
    order = sorted(range(len(names)), key=lambda index: (-counts[index], names[index]))
    shown = order[:MOST_DOMAINS] if len(order) > MOST_DOMAINS + 1 else order
    place = np.full(max(len(names), 1), len(shown), np.int64)
    place[shown] = np.arange(len(shown))
    domains = [
        {
            "name": palette.domain_name(names[index]),
            "full": names[index],
            "colour": palette.domain_colour(names[index]),
            "steps": int(counts[index]),
        }
        for index in shown
    ]
    if len(shown) < len(order):
        rest = int(counts[order[MOST_DOMAINS:]].sum())
        label = f"{len(order) - len(shown):,} more"
        domains.append({"name": label, "full": label, "colour": palette.domain_colour("unknown"), "steps": rest})
    return domains, place[rows.domain]


def _uniform_nats(rows: Rows) -> float | None:
    """ln(vocabulary), what the first token of a sample costs: from the code length of any row."""
    cost = (rows.code_bits * math.log(2) - rows.loss * rows.predicted) / np.maximum(rows.tokens - rows.predicted, 1)
    finite = cost[np.isfinite(cost)]
    return float(np.median(finite)) if len(finite) else None


def _events(rows: Rows, folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    sessions = record.get("sessions")
    resumed = [each.get("step") for each in sessions if isinstance(each, dict)] if isinstance(sessions, list) else []
    return {
        "spikes": sorted(rows.spikes.items(), key=lambda pair: -pair[1])[:MOST_EVENTS],
        "skipped_updates": list(rows.skipped_updates.items())[:MOST_EVENTS],
        "passed_over": list(rows.passed_over.items())[:MOST_EVENTS],
        "gaps": [[step, _places(found)] for step, found in list(rows.gaps.items())[:MOST_EVENTS]],
        "checkpoints": checkpoints.steps(folder.path),
        "resumes": sorted({step for step in resumed if isinstance(step, int) and step > 0}),
    }


def _places(gaps: Any) -> list[str]:
    if not isinstance(gaps, list):
        return []
    return [
        _without_home(f"{gap.get('shard')} from row {gap.get('row')} on: {gap.get('reason')}")
        for gap in gaps
        if isinstance(gap, dict)
    ]


# ---- numbers -------------------------------------------------------------------------------------------------------


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _bits_per_byte(rows: Rows, chosen: Any) -> float | None:
    bits, size = rows.code_bits[chosen], rows.text_bytes[chosen]
    counted = np.isfinite(bits)
    total = int(size[counted].sum())
    return float(bits[counted].sum()) / total if total else None


def _headline(rows: Rows) -> dict[str, Any]:
    seconds = float(np.nansum(rows.step_seconds))
    last = slice(max(len(rows) - _LAST, 0), None)
    found = noise.estimate(rows.grad_square, rows.grad_agreement)
    return {
        "loss": _mean(rows.loss[last]),
        "accuracy": _mean(rows.accuracy[last]),
        "bits_per_byte": _bits_per_byte(rows, slice(None)),
        "recent_bits_per_byte": _bits_per_byte(rows, slice(max(len(rows) - 1000, 0), None)),
        "tokens": int(rows.tokens.sum()),
        "text_bytes": int(rows.text_bytes.sum()),
        "seconds": seconds,
        "throughput": float(rows.tokens.sum()) / seconds if seconds else None,
        "documents": int((rows.part == 0).sum()),
        "not_finite": int((~np.isfinite(rows.loss)).sum()),
        "noise_scale": noise.in_words(found) if found is not None else None,
    }


def _noise(rows: Rows) -> dict[str, Any]:
    """How often the noise of the gradient was measured, and what is known of each layer (`noise.LayerNoise`)."""
    measured = list(rows.grad_layers.values())
    return {
        "measured": len(measured),
        "between": noise.STEPS_BETWEEN,
        "needed": noise.FEWEST,
        "layers": [dataclasses.asdict(each) for each in noise.by_layer(measured)],
    }


def _teaching(rows: Rows, domain_of: np.ndarray, domains: list[dict[str, Any]]) -> dict[str, Any]:
    """What updates taught: of all, and of each domain in the order of `domains` (`teaching.Taught`)."""
    names = [domain["full"] for domain in domains]
    whole, each = teaching.by_domain(rows.loss, rows.loss_after, rows.next_loss, rows.learning_rate, domain_of, names)
    return {
        "between": teaching.STEPS_BETWEEN,
        "needed": teaching.FEWEST,
        "all": _as_values(whole),
        "domains": [_as_values(taught) for taught in each],
        "verdict": teaching.verdict(each),
    }


def _as_values(taught: teaching.Taught) -> dict[str, Any]:
    falls = {name: getattr(taught, name) for name in ("own", "same", "other")}
    return {name: dataclasses.asdict(fall) | {"stands_out": fall.stands_out} for name, fall in falls.items()}


def _by_domain(rows: Rows, domain_of: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Per domain: documents, tokens, loss of its first and last tenth (at least 10 documents), accuracy, bits/byte."""
    found = []
    for domain in range(count):
        places = np.flatnonzero(domain_of == domain)
        part = min(max(len(places) // 10, 10), len(places))
        found.append(
            {
                "steps": len(places),
                "tokens": int(rows.tokens[places].sum()),
                "first_loss": _mean(rows.loss[places[:part]]),
                "last_loss": _mean(rows.loss[places[-part:]]),
                "last_accuracy": _mean(rows.accuracy[places[-part:]]),
                "last_bits_per_byte": _bits_per_byte(rows, places[-part:]),
            }
        )
    return found


def _by_length(rows: Rows) -> list[dict[str, Any]]:
    """Loss of the later half of the run by the length of the document in tokens, bins of powers of two."""
    later = np.arange(len(rows) // 2, len(rows))
    later = later[np.isfinite(rows.loss[later])]
    if not len(later):
        return []
    length = np.maximum(rows.tokens[later] + rows.tokens_cut[later], 1)
    bins = np.floor(np.log2(length)).astype(int).clip(3, 16)
    found = []
    for bin_ in range(int(bins.min()), int(bins.max()) + 1):
        losses = rows.loss[later[bins == bin_]]
        if len(losses):
            low, middle, high = np.percentile(losses, (25, 50, 75))
            found.append({"from": 2**bin_, "to": 2 ** (bin_ + 1), "count": len(losses), "mean": float(losses.mean()),
                          "low": float(low), "median": float(middle), "high": float(high)})  # fmt: skip
    return found


def _surprisals(folder: RunFolder, rows: Rows) -> tuple[np.ndarray | None, str]:
    """The side file as an array that is read where it is looked at, and what is missing of it, in words."""
    path = folder.path / surprisals.FILE_NAME
    expected = int(rows.predicted.sum())
    found = path.stat().st_size // surprisals.DTYPE.itemsize if path.is_file() else 0
    if not found:
        return (
            None,
            f"This run kept no surprisals ({path.name} is not there): tokens have colours at sampled steps only."
            if expected
            else "",
        )
    values = np.memmap(path, surprisals.DTYPE, "r", shape=(found,))
    missing = expected - found
    # While a run is on its last rows may be on their way.
    late = missing > 64 * 1024
    return (
        values,
        f"{path.name} ends {missing:,} tokens before the ledger does; those have no colour." if late else "",
    )


def _by_position(rows: Rows, nats: np.ndarray | None) -> dict[str, Any] | None:
    """Mean surprisal by position in the document, for each quarter of the run: bins that grow with the position."""
    if nats is None or not len(rows):
        return None
    begins = surprisals.offsets(rows.predicted)
    whole = int(np.searchsorted(begins, len(nats), side="right")) - 1
    whole = min(whole, len(rows))
    longest = int(rows.first_predicted[:whole].max(initial=0))
    if whole < 1 or longest < 1:
        return None
    edges = [1]
    while edges[-1] <= longest:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 1.35)))
    quarters = 4 if whole >= 40 else 1
    curves = []
    for quarter in range(quarters):
        first, last = whole * quarter // quarters, whole * (quarter + 1) // quarters
        chosen = first + _evenly(last - first, POSITION_ROWS)
        sums, counts = np.zeros(longest + 1), np.zeros(longest + 1)
        for part in range(0, len(chosen), 500):
            some = chosen[part : part + 500]
            length = rows.first_predicted[some]
            places = np.arange(longest)
            inside = places[None, :] < length[:, None]  # (rows, positions)
            index = np.minimum(begins[some][:, None] + places[None, :], len(nats) - 1)
            values = np.asarray(nats[index], np.float32)
            good = inside & np.isfinite(values)
            sums[1:] += np.where(good, values, 0).sum(axis=0)
            counts[1:] += good.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [
                float(sums[low:high].sum() / counts[low:high].sum()) if counts[low:high].sum() >= 5 else None
                for low, high in itertools.pairwise(edges)
            ]
        curves.append({"first": int(rows.step[first]), "last": int(rows.step[last - 1]), "means": means})
    return {"edges": edges, "curves": curves}


def _evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` positions, evenly spaced."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _passed_over(rows: Rows) -> list[list[Any]]:
    """[reason, records] of what was passed over, the most frequent first."""
    total: dict[str, int] = {}
    for found in rows.passed_over.values():
        for reason, count in found.items() if isinstance(found, dict) else ():
            total[reason] = total.get(reason, 0) + int(count)
    return [[reason, count] for reason, count in sorted(total.items(), key=lambda pair: -pair[1])]


def _evaluations(folder: RunFolder, steps: int) -> list[dict[str, Any]]:
    """Held-out scores of all domains together, by step."""
    found = []
    for entry in documents.json_lines(folder.evaluations):
        scores = entry.get("scores")
        whole = scores.get("all") if isinstance(scores, dict) else None
        if isinstance(whole, dict) and isinstance(entry.get("step"), int) and entry["step"] <= steps:
            found.append({"step": entry["step"], **{n: whole.get(n) for n in ("loss", "accuracy", "bits_per_byte")}})
    return found[-MOST_EVENTS:]


# ---- documents -----------------------------------------------------------------------------------------------------


def _pack_passports(
    passports: list[dict[str, Any]], rows: Rows, nats: np.ndarray | None, arrays: dict[str, np.ndarray]
) -> list[str]:
    """Add the arrays of the passports, one after the other; the texts that their numbers stand for.

    `piece`: tokens of each passport; `before`, `after`: ten-thousandths of a nat, tokens - 1 of each; `top`, `chance`:
    five guesses at each predicted token of those that have them, the chance as the square of n/255.
    """
    vocabulary: dict[str, int] = {}

    def number(text: Any) -> int:
        return vocabulary.setdefault(str(text), len(vocabulary))

    piece: list[int] = []
    before: list[np.ndarray] = []  # parts, joined at the end
    after: list[np.ndarray] = []
    top: list[np.ndarray] = []
    chance: list[np.ndarray] = []
    begins = surprisals.offsets(rows.predicted)
    for passport in passports:
        predicted = len(passport["input_ids"]) - 1
        step = passport["step"]
        piece += [number(text) for text in passport["pieces"]]
        if "before" not in passport and nats is not None and rows.first_predicted[step] == predicted:
            values = np.asarray(nats[begins[step] : begins[step] + predicted], np.float64)
            if len(values) == predicted:
                passport["before"] = [float(value) for value in values]
        unknown = np.full(predicted, documents.UNKNOWN, np.uint32)
        for name, parts in (("before", before), ("after", after)):
            parts.append(documents.ten_thousandths(documents.numbers(passport[name])) if name in passport else unknown)
        if "top_ids" in passport:
            guesses = passport.get("guesses", {})
            top.append(
                np.array(
                    [[number(guesses.get(str(i), f"<{i}>")) for i in _five(ids, -1)] for ids in passport["top_ids"]],
                    np.uint32,
                ).ravel()
            )
            probabilities = np.array([documents.numbers(_five(row, 0.0)) for row in passport["top_probs"]])
            chance.append((np.sqrt(np.nan_to_num(probabilities).clip(0, 1)) * 255).round().astype(np.uint8).ravel())
    arrays["piece"] = np.array(piece, np.uint32)
    for name, parts, kind in (
        ("before", before, np.uint32),
        ("after", after, np.uint32),
        ("top", top, np.uint32),
        ("chance", chance, np.uint8),
    ):
        arrays[name] = np.concatenate(parts) if parts else np.zeros(0, kind)
    if len(vocabulary) < 65536:
        arrays["piece"], arrays["top"] = arrays["piece"].astype(np.uint16), arrays["top"].astype(np.uint16)
    return list(vocabulary)


def _five(values: list[Any], filler: Any) -> list[Any]:
    return [*values[:5], *[filler] * (5 - len(values))]


def _samples(folder: RunFolder, texts: _Texts, notes: list[str]) -> list[dict[str, Any]]:
    """What the model wrote after openings of documents, beside what came there."""
    found = [entry for entry in documents.json_lines(folder.samples) if isinstance(entry.get("step"), int)]
    found = [found[place] for place in documents.spread(len(found), documents.MOST_SAMPLES)]
    samples = []
    for entry in found:
        if entry["step"] >= len(texts.rows):
            continue
        passport = texts.passports.get(entry["step"])
        true = entry.get("continuation")
        if true is None and passport is not None:
            begin = len(entry.get("input_ids") or [])
            true = documents.text_of(passport, begin, begin + 40)
        samples.append(
            {name: entry.get(name) for name in ("step", "input", "output", "accuracy", "error")} | {"true": true}
        )
    if not samples:
        notes.append("No samples were generated in this run yet (--display_samples N asks for one every N steps).")
    return samples


def _prompts(folder: RunFolder) -> list[dict[str, Any]]:
    found = [
        {
            "step": entry["step"],
            "texts": [[str(text.get("prompt")), str(text.get("output"))] for text in entry["texts"]],
        }
        for entry in documents.json_lines(folder.path / documents.PROMPTS)
        if isinstance(entry.get("step"), int) and isinstance(entry.get("texts"), list)
    ]
    return [found[place] for place in documents.spread(len(found), documents.MOST_WRITINGS)]


def _unusual(rows: Rows, texts: _Texts) -> dict[str, Any]:
    """The hardest and the easiest documents for their time: by robust z-score among the steps around.

    A run that noted them while it trained has their text; of others the scores are taken here, block by block.
    """
    noted = {step: p["unusual"] for step, p in texts.passports.items() if isinstance(p.get("unusual"), int | float)}
    finite = np.flatnonzero(np.isfinite(rows.loss))
    if noted:
        scores = noted
    elif len(finite) >= _BLOCK:
        losses = rows.loss[finite]
        blocks = losses[: len(losses) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        low, middle, high = np.percentile(blocks, (25, 50, 75), axis=1)
        block = np.minimum(np.arange(len(losses)) // _BLOCK, len(blocks) - 1)
        z = (losses - middle[block]) / (np.maximum(high - low, 1e-3)[block] / 1.349)
        order = np.argsort(z)
        scores = {int(finite[place]): float(z[place]) for place in (*order[:_UNUSUAL], *order[-_UNUSUAL:])}
    else:
        order = finite[np.argsort(rows.loss[finite])]
        mean = _mean(rows.loss) or 0.0
        ends = {
            int(i)
            for i in (*order[: min(_UNUSUAL, len(order) // 2)], *order[len(order) - min(_UNUSUAL, len(order) // 2) :])
        }
        scores = {step: float(rows.loss[step] - mean) for step in ends}
    ordered = sorted(scores, key=lambda step: scores[step])
    near = 25

    def described(step: int) -> dict[str, Any]:
        around = rows.loss[max(step - near, 0) : step + near + 1]
        usual = around[np.isfinite(around)]
        return {
            "step": step,
            "score": scores[step],
            "loss": float(rows.loss[step]),
            "usual": float(np.median(usual)) if len(usual) else None,
            "text": texts.opening(step),
        }

    return {
        "scored": bool(noted) or len(finite) >= _BLOCK,
        "hardest": [described(step) for step in reversed(ordered) if scores[step] > 0][:_UNUSUAL],
        "easiest": [described(step) for step in ordered if scores[step] < 0][:_UNUSUAL],
    }


class _Texts:
    """The texts of steps: from the passports, or from the corpus where it lies on this disk."""

    def __init__(self, record: dict[str, Any], rows: Rows, passports: list[dict[str, Any]]) -> None:
        self.record, self.rows = record, rows
        self.passports = {passport["step"]: passport for passport in passports}

    def opening(self, step: int) -> str | None:
        """How the document of a step begins, if a passport says so."""
        passport = self.passports.get(step)
        return documents.text_of(passport)[: documents.OPENING_CHARACTERS] if passport else None

    def read(self, samples: list[dict[str, Any]], unusual: dict[str, Any]) -> None:
        """Fill in what is missing among `samples` and `unusual` from the files of the corpus, checked by their hash."""
        rows = self.rows
        listed = [entry for kind in ("hardest", "easiest") for entry in unusual[kind] if entry["text"] is None]
        lacking = [sample for sample in samples if sample["true"] is None]
        steps = {entry["step"] for entry in (*listed, *lacking)}
        places = {step: (rows.names["shard"][rows.shard[step]], int(rows.row[step])) for step in steps}
        if not places:
            return
        wanted = {place: rows.sha1[step].tobytes().hex() for step, place in places.items()}
        found = documents.read_again(self.record, wanted, documents.READING_SECONDS)
        for entry in listed:
            text = found.get(places[entry["step"]])
            entry["text"] = text[: documents.OPENING_CHARACTERS] if text is not None else None
        for sample in lacking:
            text = found.get(places[sample["step"]])
            begin = sample["input"] or ""
            # The first sample of a document begins with the document; a tokenizer that changes spaces shows elsewhere.
            if text is not None and text.startswith(begin):
                sample["true"] = text[len(begin) : len(begin) + documents.OPENING_CHARACTERS]


# ---- the run -------------------------------------------------------------------------------------------------------


def _config(folder: RunFolder) -> list[list[str]]:
    """[key, value] of run_config.yaml as it was written."""
    if not folder.config.is_file():
        return []
    lines = folder.config.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.partition(":") for line in lines if re.match(r"(# )?\w+:", line)]
    return [[key, _without_home(value.strip())] for key, _, value in pairs]


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _about(record: dict[str, Any]) -> list[list[str]]:
    """[name, value] of what the run was and ran on, as far as run.json says."""
    corpus, model = _object(record, "corpus"), _object(record, "model")
    libraries = record.get("libraries")
    parameters = model.get("parameters")
    found: list[tuple[str, Any]] = [
        ("run", record.get("run_id")),
        ("started", record.get("started")),
        ("command", " ".join(map(str, record["command"])) if isinstance(record.get("command"), list) else None),
        ("corpus", corpus.get("name")),
        ("mirror", corpus.get("mirror")),
        ("revision", corpus.get("revision")),
        ("model", f"{model.get('name')}, {parameters:,} parameters" if isinstance(parameters, int) else None),
        ("precision", model.get("precision")),
        (
            "tokenizer",
            f"{record.get('tokenizer')}, {record.get('tokenizer_size', model['vocab_size']):,} tokens"
            if "vocab_size" in model
            else None,
        ),
        (
            "sample",
            f"{model.get('sample_mode')}, {model.get('max_seq_length')} tokens" if "sample_mode" in model else None,
        ),
        ("slimpajama_hf", record.get("version")),
        *(libraries.items() if isinstance(libraries, dict) else ()),
        ("python", record.get("python")),
        ("platform", record.get("platform")),
        ("cores", record.get("cores")),
        ("torch threads", record.get("torch_threads")),
    ]
    return [[name, _without_home(str(value))] for name, value in found if value is not None]
