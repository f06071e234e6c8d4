"""Reads `evaluations.jsonl`, the held-out scores of a run.

An entry has the `step`, the `corpus`, and `scores`: by domain, with all documents together under `all`. Entries of runs
with an average of the weights have its scores under `averaged`. A score that is not finite is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimpajama_hf import files

#: What the scores of a domain have, besides the number of documents (`samples`).
NUMBERS = ("loss", "perplexity", "accuracy", "bits_per_byte")


def read(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The entries, in order, up to `last_step`. Lines that are no entry are left out: `verify` names what was changed
    after it was written. Raises OSError."""
    return [
        entry
        for _, entry in files.json_lines(path)
        if isinstance(entry.get("step"), int)
        and (last_step is None or entry["step"] <= last_step)
        and isinstance(entry.get("corpus"), str)
        and _are_scores(entry.get("scores"))
        and (entry.get("averaged") is None or _are_scores(entry["averaged"]))
    ]


def _are_scores(found: Any) -> bool:
    return isinstance(found, dict) and "all" in found and all(_is_score(each) for each in found.values())


def _is_score(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("samples"), int):
        return False
    return all(name in found and isinstance(found[name], float | int | None) for name in NUMBERS)
