"""Several runs side by side: curves, numbers, and the differences of their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from slimpajama_hf.record import evaluations
from slimpajama_hf.report import content, numbers

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns
    from slimpajama_hf.report.live import LiveRun

#: Steps in the mean at each point of a curve.
WINDOW = 50

#: Maximum points of a curve; a wide chart has no pixels for more.
MOST_POINTS = 800

#: Keys that differ between any two runs and do not affect how they learn.
_OF_EVERY_RUN = {"output_dir"}


def together(runs: Sequence[LiveRun]) -> dict[str, Any]:
    """JSON values: `runs`, each with numbers and curve; `equal_steps`, the step that all of them have reached."""
    rows = [run.rows for run in runs]
    reached = [len(each) for each in rows if len(each)]
    equal = min(reached) if len(reached) > 1 else None
    found = [_one(run, each, equal) for run, each in zip(runs, rows, strict=True)]
    return content.strict({"runs": found, "equal_steps": equal, "window": WINDOW})


def _one(run: LiveRun, rows: Columns, equal: int | None) -> dict[str, Any]:
    head = numbers.headline(rows)
    held_out = evaluations.read(run.folder.evaluations)
    means = _means(rows.loss)
    return {
        "name": run.name,
        **{name: head[name] for name in ("loss", "accuracy", "bits_per_byte", "tokens", "seconds", "throughput")},
        "held_out": held_out[-1]["scores"]["all"]["loss"] if held_out else None,
        "equal_loss": float(means[equal - 1]) if equal is not None and len(rows) >= equal else None,
        "state": run.state,
        "curve": _curve(rows, means),
    }


def _means(values: np.ndarray) -> np.ndarray:
    """Mean of the last `WINDOW` finite values at each step, fewer at the start; (steps,)."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - WINDOW, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[ends] - sums[begins]) / (counts[ends] - counts[begins])


def _curve(rows: Columns, means: np.ndarray) -> dict[str, list[Any]]:
    """Steps, tokens and training seconds so far, with the mean loss there: at most `MOST_POINTS`, and the last."""
    count = len(rows)
    # The same places as the run grows, so that the curve does not jitter.
    stride = 1
    while count / stride > MOST_POINTS:
        stride *= 2
    places = np.unique(np.append(np.arange(stride - 1, count, stride), count - 1)) if count else np.arange(0)
    return {
        "steps": (places + 1).tolist(),
        "tokens": np.cumsum(rows.tokens)[places].tolist(),
        "seconds": np.cumsum(rows.step_seconds)[places].round(2).tolist(),
        "loss": means[places].round(4).tolist(),
    }


def differences(runs: Sequence[LiveRun]) -> list[list[Any]]:
    """`[[key, value of each run, ...], ...]` of run_config.yaml where the runs differ; None: the key is not there."""
    configs = [_config(run) for run in runs]
    keys = sorted(set().union(*configs) - _OF_EVERY_RUN)
    rows = [[key, *(config.get(key) for config in configs)] for key in keys]
    return [[row[0], *map(_shown, row[1:])] for row in rows if any(value != row[1] for value in row[2:])]


def _shown(value: Any) -> str | None:
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _config(run: LiveRun) -> dict[str, Any]:
    try:
        found = yaml.safe_load(run.folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
