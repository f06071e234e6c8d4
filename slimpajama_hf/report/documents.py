"""The documents in the report: passports, generated texts, and documents read again from a corpus on this disk."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.corpus import documents, unchanged
from slimpajama_hf.corpus.shards import read_shard

PASSPORTS = "passports.jsonl"
PROMPTS = "prompts.jsonl"

#: How many documents with guesses a page has at most.
MOST_PASSPORTS = 260
#: How many samples, and how many generations from the fixed prompts, a page has at most.
MOST_SAMPLES = 300
MOST_WRITINGS = 60

#: How long reading documents again may take, in seconds.
READING_SECONDS = 1.5
#: Characters shown of the beginning of a document in a table, and of a true continuation.
OPENING_CHARACTERS = 160

#: Marks an unknown surprisal, in ten-thousandths of a nat.
UNKNOWN = 2**32 - 1

_STEP = re.compile(rb'^\{"step": ?(\d+)')


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions: the first dozen, the last, and others evenly in between."""
    if count <= most:
        return list(range(count))
    early = min(12, most // 3)
    rest = np.linspace(early, count - 1, most - early).round().astype(int).tolist()
    return sorted({*range(early), *rest})


def read_passports(path: Path, steps: int) -> list[dict[str, Any]]:
    """The passports for the page, by step: full ones spread over the run, and the most unusual ones.

    Passports of the same step are merged. Of the full ones only the chosen lines are parsed.
    """
    full: dict[int, int] = {}  # step -> where its line begins
    unusual: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        at = 0
        for line in file:
            match = _STEP.match(line)
            if match and line.endswith(b"\n") and int(match[1]) < steps:
                if b'"before"' in line:
                    full[int(match[1])] = at
                else:
                    with contextlib.suppress(ValueError):
                        unusual[int(match[1])] = json.loads(line)
            at += len(line)
        chosen = sorted(full)
        chosen = [chosen[place] for place in spread(len(chosen), MOST_PASSPORTS)]
        found = _most_unusual(unusual)
        for step in chosen:
            file.seek(full[step])
            with contextlib.suppress(ValueError):
                found[step] = {"unusual": unusual.get(step, {}).get("unusual"), **json.loads(file.readline())}
    return [passport for _, passport in sorted(found.items()) if _is_whole(passport)]


def _most_unusual(found: dict[int, dict[str, Any]], each: int = 12) -> dict[int, dict[str, Any]]:
    order = sorted(found, key=lambda step: found[step].get("unusual") or 0.0)
    return {step: found[step] for step in {*order[:each], *order[-each:]}}


def _is_whole(passport: dict[str, Any]) -> bool:
    ids, texts = passport.get("input_ids"), passport.get("pieces")
    if not isinstance(ids, list) or not isinstance(texts, list) or len(ids) != len(texts):
        return False
    lists = [passport.get(name) for name in ("before", "after", "top_ids", "top_probs")]
    return all(values is None or (isinstance(values, list) and len(values) == len(ids) - 1) for values in lists)


def ten_thousandths(nats: np.ndarray) -> np.ndarray:
    """Nats as ten-thousandths, uint32, at most 400,000 nats; `UNKNOWN` if not finite."""
    known = np.isfinite(nats)
    scaled = np.where(known, np.clip(np.nan_to_num(nats), 0, 4e5) * 10_000, UNKNOWN)
    return scaled.round().astype(np.uint32)


def numbers(values: list[float | None]) -> np.ndarray:
    """A JSON list as float64, null as NaN."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def text_of(passport: dict[str, Any], first: int = 0, last: int | None = None) -> str:
    """The text of tokens `first` to `last` of a passport."""
    return "".join(passport["pieces"][first:last])


def late_and_readable(passports: list[dict[str, Any]], steps: int) -> int | None:
    """The step at which the page opens: the newest readable document in the later half of the run.

    Preferred are documents with both surprisals, then those that are readable; of these only the ones whose loss is not
    above the median. None if no document of the later half has surprisals.
    """
    late = [each for each in passports if each["step"] >= steps // 2 and "before" in each]
    full = [each for each in late if "after" in each] or late
    readable = [each for each in full if is_readable(each["pieces"])] or full
    loss = {each["step"]: float(np.nan_to_num(np.nanmean(numbers(each["before"])), nan=np.inf)) for each in readable}
    usual = float(np.median(list(loss.values()))) if loss else 0.0
    return max((step for step in loss if loss[step] <= usual), default=None)


def is_readable(pieces: list[str]) -> bool:
    """Whether tokens are a longer text that is mostly letters, as prose and most code are."""
    text = "".join("".join(pieces).split())
    return len(pieces) >= 32 and sum(map(str.isalpha, text)) >= 0.7 * len(text)


def read_again(
    record: dict[str, Any], wanted: dict[tuple[str, int], str], seconds: float
) -> dict[tuple[str, int], str]:
    """Texts of documents by (shard, row), from files on this disk only. `wanted`: the SHA-1 of each document.

    Documents that are on the Hub, have changed or are not found within `seconds` are left out.
    """
    found: dict[tuple[str, int], str] = {}
    deadline = time.monotonic() + seconds
    try:
        corpus = unchanged.recorded(record["corpus"])
    except (KeyError, TypeError, ValueError):
        return found
    for shard in corpus.files:
        rows = sorted(row for name, row in wanted if name == shard.name)
        if not rows or not shard.is_local or not Path(shard.path).is_file():
            continue
        with contextlib.suppress(Exception):
            for row, value in read_shard(shard, rows[0], corpus.reading, None):
                if row > rows[-1] or time.monotonic() > deadline:
                    break
                if (shard.name, row) in wanted and not isinstance(value, str):
                    document = documents.to_document(value, corpus.text_column, corpus.mirror, shard.name, row)
                    if isinstance(document, documents.Document) and document.sha1 == wanted[shard.name, row]:
                        found[shard.name, row] = document.text
    return found
