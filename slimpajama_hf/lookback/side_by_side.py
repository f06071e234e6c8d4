"""The differences between two rows or two runs."""

from __future__ import annotations

import filecmp
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf.lookback.run import Report, Run, shown_value
from slimpajama_hf.record import checkpoints, ledger

if TYPE_CHECKING:
    from slimpajama_hf.lookback.run import Row


# ---- rows side by side ----


def differences(left: Row, right: Row) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two rows, bit for bit, with both values; without the fields of the clock.

    `chain` is included only if nothing else differs, because it depends on the others.
    """
    found = {
        name: (left.get(name), right.get(name))
        for name in left | right
        if name not in ledger.TIME_FIELDS and _bits(left.get(name)) != _bits(right.get(name))
    }
    if len(found) > 1:
        found.pop("chain", None)
    return found


def document_of(row: Row) -> tuple[Any, ...]:
    """The identity of what a step learned: equal for two rows of the same document."""
    of_one = tuple(row.get(name) for name in ("shard", "row", "part", "text_sha1", "tokens"))
    return (*of_one, *(sample.get("text_sha1") for sample in row.get("samples", ())))


def _bits(value: Any) -> Any:
    """A value that is equal only for equal bits: 1 differs from 1.0, and -0.0 from 0.0."""
    return value.hex() if isinstance(value, float) else (type(value), value)


def side_by_side(found: dict[str, tuple[Any, Any]]) -> str:
    """Fields that differ, with both values, in words."""
    return ", ".join(f"{name} {shown_value(left)} / {shown_value(right)}" for name, (left, right) in found.items())


# ---- two runs ----


def compare(path: str | Path, other: str | Path) -> Report:
    """Whether two runs are the same run; one may go further than the other.

    Raises UserError if a ledger cannot be read from its start on.
    """
    left, right = Run(path), Run(other)
    same, found, ended = compare_ledgers(left, right)
    weights = _compare_weights(left, right)
    # After the step at which the ledgers diverge, weights differ anyway.
    early = [step for step, equal in weights.items() if not equal and step <= same]
    ok = not found and not early
    lines = [_words_on_steps(path, other, same, found, ended)]
    lines += [
        f"checkpoint-{step}: model.safetensors {'equal' if equal else 'differs'}" for step, equal in weights.items()
    ]
    settings = _differing(_comparable(left), _comparable(right))
    lines += [f"{name}: {shown_value(a)} / {shown_value(b)}" for name, (a, b) in settings.items()]
    return Report(ok, lines, {
        "run": str(path), "other": str(other), "ok": ok, "same_steps": same, "parts_at": same if found else None,
        "differences": found, "prefix": ended if not found else None, "weights_equal": weights,
        "configuration": settings,
    })  # fmt: skip


def compare_ledgers(left: Run, right: Run) -> tuple[int, dict[str, tuple[Any, Any]], str | None]:
    """(number of equal steps, fields that differ at the next, which ended first: `run`, `other` or None)."""
    same = 0
    for a, b in itertools.zip_longest(left.whole_rows(), right.whole_rows()):
        if a is None or b is None:
            return same, {}, "run" if a is None else "other"
        found = differences(a, b)
        if found:
            return same, found, None
        same += 1
    return same, {}, None


def _words_on_steps(
    path: str | Path, other: str | Path, same: int, found: dict[str, tuple[Any, Any]], ended: str | None
) -> str:
    if found:
        return f"they part at step {same}: {side_by_side(found)}"
    if ended is None:
        return f"the same for {same:,} steps"
    short, long = (path, other) if ended == "run" else (other, path)
    return f"the same for {same:,} steps; there {short} ends, and {long} goes on"


def _compare_weights(left: Run, right: Run) -> dict[int, bool]:
    """Whether the weights of each checkpoint that both runs have are equal, byte for byte."""
    result = {}
    for step in left.manifests.keys() & right.manifests.keys():
        a, b = (checkpoints.path_of(run.folder.path, step) / "model.safetensors" for run in (left, right))
        result[step] = a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)
    return dict(sorted(result.items()))


def _comparable(run: Run) -> dict[str, Any]:
    """The settings and versions of a run that may differ from another's: configuration, libraries, threads."""
    config = {name: value for name, value in run.config().items() if name != "output_dir"}
    machine = {name: run.record.get(name) for name in ("python", "platform", "torch_threads")}
    return config | run.record.get("libraries", {}) | machine


def _differing(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (left.get(name), right.get(name)) for name in left | right if left.get(name) != right.get(name)}
