"""The numbers on the page: by step, domain, length and position."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import files, palette
from slimpajama_hf.record import noise, surprisals, teaching
from slimpajama_hf.report import documents

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns
    from slimpajama_hf.record.run_folder import RunFolder


#: A longer run has only every k-th step in the page, with the minimum and maximum loss around it.
MOST_STEPS = 110_000


#: Up to so many steps the page has their whole SHA-1s, beyond only the first eight digits.
WHOLE_HASHES = 12_000


#: How many domains have a colour; the others are combined into one.
MOST_DOMAINS = 24


#: How many rows the loss by position is averaged over, in each quarter of the run.
POSITION_ROWS = 6_000


#: Prefix of the names of arrays with numbers that were added to the ledger.
ADDED = "added:"


BLOCK = 200

_LAST = 50


# ---- steps ---------------------------------------------------------------------------------------------------------


def carried_rows(rows: Columns, folder: RunFolder) -> tuple[np.ndarray, int]:
    """Indices of the rows that are in the page, ascending, and how many rows each stands for."""
    count = len(rows)
    every = -(-count // MOST_STEPS) if count > MOST_STEPS else 1
    if every == 1:
        return np.arange(count), 1
    named = [*rows.seldom["spike"], *rows.seldom["update_skipped"]]
    named += [entry["step"] for _, entry in files.json_lines(folder.samples) if isinstance(entry.get("step"), int)]
    named += [passport["step"] for passport in documents.read_passports(folder.path / documents.PASSPORTS, count)]
    named[:0] = np.flatnonzero(np.isfinite(taught_of(rows)[0])).tolist()
    extra = np.array([step for step in named[: MOST_STEPS // 10] if step < count], np.int64)
    return np.union1d(np.arange(0, count, every), extra), every


def taught_of(rows: Columns) -> tuple[np.ndarray, np.ndarray]:
    """How much each update lowered the loss of its own document and of the next one (`teaching.falls`)."""
    return teaching.falls(rows.loss, rows.loss_after, rows.next_loss, rows.learning_rate)


def step_arrays(rows: Columns, carried: np.ndarray, every: int, domain_of: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the steps in the page, with the types of the packing."""
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
    arrays |= dict(zip(("taught", "taught_next"), (fall.astype(np.float32) for fall in taught_of(rows)), strict=True))
    arrays |= {ADDED + name: values.astype(np.float32) for name, values in rows.added.items()}
    arrays = {name: array[carried] for name, array in arrays.items()}
    # Reading goes forward, so differences are small numbers and compress to almost nothing.
    arrays["row"] = np.diff(rows.row[carried], prepend=0).astype(np.int32)
    if len(rows.names["mirror"]) > 1:
        arrays["mirror"] = rows.mirror[carried].astype(np.uint8)
    digits = 20 if len(rows) <= WHOLE_HASHES else 4
    # Not transposed by bytes: hashes do not compress anyway.
    arrays["sha1"] = np.ascontiguousarray(rows.sha1[carried, :digits]).reshape(-1)
    if every > 1:
        arrays["step"] = rows.step[carried].astype(np.uint32)
        begins = np.searchsorted(carried, np.arange(0, len(rows), every))
        for name in ("loss", "grad_norm"):
            # Every step shows the extremes of its block.
            values = getattr(rows, name)
            finite = np.isfinite(values)
            starts = np.arange(0, len(rows), every)
            low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
            high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
            block = np.searchsorted(begins, np.arange(len(carried)), side="right") - 1
            arrays[f"{name}_low"] = np.where(np.isfinite(low), low, np.nan)[block].astype(np.float32)
            arrays[f"{name}_high"] = np.where(np.isfinite(high), high, np.nan)[block].astype(np.float32)
    return arrays


def domains_of(rows: Columns) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The domains, most frequent first, and the index of each row's domain in them, (steps,)."""
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


def uniform_nats(rows: Columns) -> float | None:
    """ln(vocabulary), the cost of the first token of a sample, from the code lengths of rows."""
    cost = (rows.code_bits * math.log(2) - rows.loss * rows.predicted) / np.maximum(rows.tokens - rows.predicted, 1)
    finite = cost[np.isfinite(cost)]
    return float(np.median(finite)) if len(finite) else None


# ---- numbers -------------------------------------------------------------------------------------------------------


def mean_of(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _bits_per_byte(rows: Columns, chosen: Any) -> float | None:
    bits, size = rows.code_bits[chosen], rows.text_bytes[chosen]
    counted = np.isfinite(bits)
    total = int(size[counted].sum())
    return float(bits[counted].sum()) / total if total else None


def headline(rows: Columns) -> dict[str, Any]:
    """The numbers at the top of the page: loss and accuracy of the last steps, totals of all."""
    seconds = float(np.nansum(rows.step_seconds))
    last = slice(max(len(rows) - _LAST, 0), None)
    found = noise.estimate(rows.grad_square, rows.grad_agreement)
    return {
        "recent_steps": _LAST,
        "loss": mean_of(rows.loss[last]),
        "accuracy": mean_of(rows.accuracy[last]),
        "bits_per_byte": _bits_per_byte(rows, slice(None)),
        "tokens": int(rows.tokens.sum()),
        "text_bytes": int(rows.text_bytes.sum()),
        "seconds": seconds,
        "throughput": float(rows.tokens.sum()) / seconds if seconds else None,
        "documents": int((rows.part == 0).sum()),
        "samples": int(rows.samples.sum()),
        "noise_scale": noise.in_words(found) if found is not None else None,
    }


def noise_of_gradients(rows: Columns) -> dict[str, Any]:
    """How often the noise of the gradient was measured, and the result for each layer (`noise.LayerNoise`)."""
    measured = list(rows.seldom["grad_layers"].values())
    return {
        "measured": len(measured),
        "between": noise.STEPS_BETWEEN,
        "needed": noise.FEWEST,
        "layers": [dataclasses.asdict(each) for each in noise.by_layer(measured)],
    }


def what_updates_taught(rows: Columns, domain_of: np.ndarray, domains: list[dict[str, Any]]) -> dict[str, Any]:
    """What updates taught: all together, and by domain in the order of `domains` (`teaching.Taught`)."""
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


def by_domain(rows: Columns, domain_of: np.ndarray, count: int) -> list[dict[str, Any]]:
    """By domain: documents, tokens, loss of its first and last tenth (at least 10 documents), accuracy, bits/byte."""
    found = []
    for domain in range(count):
        places = np.flatnonzero(domain_of == domain)
        part = min(max(len(places) // 10, 10), len(places))
        found.append(
            {
                "steps": len(places),
                "tokens": int(rows.tokens[places].sum()),
                "first_loss": mean_of(rows.loss[places[:part]]),
                "last_loss": mean_of(rows.loss[places[-part:]]),
                "last_accuracy": mean_of(rows.accuracy[places[-part:]]),
                "last_bits_per_byte": _bits_per_byte(rows, places[-part:]),
            }
        )
    return found


def by_length(rows: Columns) -> list[dict[str, Any]]:
    """Loss in the later half of the run by the length of documents in tokens, in bins of powers of two."""
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


def surprisals_of(folder: RunFolder, rows: Columns) -> tuple[np.ndarray | None, str]:
    """The file of surprisals as a memory map, and what is missing in it, in words."""
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
    # While a run is in progress, its last rows may not be written yet.
    late = missing > 64 * 1024
    return (
        values,
        f"{path.name} ends {missing:,} tokens before the ledger does; those have no colour." if late else "",
    )


def by_position(rows: Columns, nats: np.ndarray | None) -> dict[str, Any] | None:
    """Mean surprisal by position in the document, for each quarter of the run; bins grow with the position."""
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
