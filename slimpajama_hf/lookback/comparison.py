"""`compare RUN RUN...`: runs side by side, by step, tokens and training time; and where runs of one seed diverge.

Only ledgers and configurations are read. Loss at equal steps, tokens and seconds is the mean of the last 50 steps at
the point that all runs have reached.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import side_by_side
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.record.columns import Columns
from slimpajama_hf.screen import format_time

#: Steps of the means that are compared.
WINDOW = 50


@dataclasses.dataclass
class Course:
    """A run with its loss and time so far at each step."""

    name: str
    run: Run
    columns: Columns
    seconds: np.ndarray
    """Training time since the beginning, after each step; (steps,)."""
    tokens: np.ndarray
    """Tokens seen since the beginning, after each step; (steps,)."""
    means: np.ndarray
    """Mean loss of the last `WINDOW` steps at each step, nats per token; (steps,). For comparisons."""
    curve: np.ndarray
    """Mean loss of the `WINDOW` steps around each step, nats per token; (steps,). For charts: it does not lag."""

    def __len__(self) -> int:
        return len(self.columns)

    def axis(self, name: str) -> np.ndarray:
        """`steps`, `tokens` or `seconds` after each step, (steps,), ascending."""
        return {"steps": self.columns.step + 1, "tokens": self.tokens, "seconds": self.seconds}[name]

    def loss_at(self, name: str, value: float) -> float:
        """The mean loss at the last step that was finished at `value` on the axis `name`."""
        place = int(np.searchsorted(self.axis(name), value * (1 + 1e-12), side="right")) - 1
        return float(self.means[place]) if place >= 0 else math.nan


def read_course(path: str, name: str) -> Course:
    """The course of a run. Raises UserError if its ledger cannot be read or has no step."""
    from slimpajama_hf.views.drawing import centred_mean, running_mean

    run, columns, seconds = Run(path), Columns(), array("d")
    for row in run.whole_rows():
        columns.append(row)
        seconds.append(row["step_seconds"])
    if not len(columns):
        raise UserError(f"{path}: no step in its ledger yet; nothing to compare")
    return Course(
        name,
        run,
        columns,
        np.cumsum(np.frombuffer(seconds)),
        np.cumsum(columns.tokens),
        running_mean(columns.loss, WINDOW),
        centred_mean(columns.loss, WINDOW),
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """Names for the runs: the last part of each path, and as many parts before it as distinguish them."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("compare: the same folder is named twice; name each run once")


#: How many differing fields of two rows are named.
_FIELDS_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Parting:
    """Two runs of one seed."""

    left: str
    right: str
    same_steps: int
    """Steps that are equal, bit for bit; the next one differs, or one of the runs ends."""
    fields: dict[str, tuple[Any, Any]]
    """The fields that differ at the next step; empty if one run is the beginning of the other."""

    def words(self) -> str:
        """The result in a sentence."""
        if self.fields:
            more = len(self.fields) - _FIELDS_NAMED
            named = ", ".join(list(self.fields)[:_FIELDS_NAMED]) + (f" and {more} more" if more > 0 else "")
            return f"{self.left} and {self.right} have one seed and part at step {self.same_steps:,} ({named})"
        return f"{self.left} and {self.right} have one seed and are the same for {self.same_steps:,} steps"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    courses: list[Course]
    partings: list[Parting]

    def reached(self, axis: str) -> float:
        """The point on an axis (`steps`, `tokens`, `seconds`) that every run has reached."""
        return float(min(course.axis(axis)[-1] for course in self.courses))

    @property
    def are_as_long(self) -> bool:
        """Whether all runs have the same number of steps."""
        return len({len(course) for course in self.courses}) == 1

    def table(self) -> list[dict[str, Any]]:
        """The numbers of each run; None if not finite."""
        reached = {axis: self.reached(axis) for axis in ("steps", "tokens", "seconds")}
        return [
            {
                "run": course.name,
                "seed": seed_of(course.run),
                "steps": len(course),
                "tokens": int(course.tokens[-1]),
                "seconds": float(course.seconds[-1]),
                "final_loss": _number(course.means[-1]),
                "final_accuracy": _number(_last_mean(course.columns.accuracy)),
                "bits_per_byte": _number(course.columns.prequential_bits_per_byte()),
                "throughput": _number(course.tokens[-1] / course.seconds[-1]),
                **{f"loss_at_equal_{axis}": _number(course.loss_at(axis, value)) for axis, value in reached.items()},
            }
            for course in self.courses
        ]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "runs": self.table(),
            "equal": {axis: self.reached(axis) for axis in ("steps", "tokens", "seconds")},
            "window": WINDOW,
            "partings": [
                dataclasses.asdict(parting) | {"parts_at": parting.same_steps if parting.fields else None}
                for parting in self.partings
            ],
        }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _last_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)][-WINDOW:]
    return float(finite.mean()) if finite.size else math.nan


def seed_of(run: Run) -> int | None:
    """The seed in a run's configuration; None if that cannot be read."""
    seed = run.config().get("seed")
    if seed is None and run.folder.config.is_file():
        from slimpajama_hf.settings.arguments import TRAINING_DEFAULTS

        seed = TRAINING_DEFAULTS["seed"][0]
    return seed


def compare(paths: Sequence[str]) -> Comparison:
    """Compare runs side by side. Raises UsageError for fewer than two, UserError for one that cannot be read."""
    if len(paths) < 2:
        raise UsageError(f"compare {' '.join(paths)}: expected two runs or more, as compare runs/a runs/b")
    courses = [read_course(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
    partings, first_of_seed = [], dict[Any, Course]()
    for course in courses:
        # Comparing each with the first of its seed shows for all of them where they diverge.
        seed = seed_of(course.run)
        first = first_of_seed.setdefault(seed, course)
        if seed is not None and first is not course:
            same, fields, _ = side_by_side.compare_ledgers(first.run, course.run)
            partings.append(Parting(first.name, course.name, same, fields))
    return Comparison(courses, partings)


# ---- the table ----

#: Lines of the table: title, key, format.
_LINES: tuple[tuple[str, str, str], ...] = (
    ("steps", "steps", ",d"),
    ("tokens", "tokens", ",d"),
    ("training time", "seconds", "time"),
    ("tokens per second", "throughput", ",.0f"),
    ("final loss, nats per token", "final_loss", ".4f"),
    ("final accuracy", "final_accuracy", ".2%"),
    ("prequential bits per byte", "bits_per_byte", ".4f"),
    ("loss at {steps:,.0f} steps", "loss_at_equal_steps", ".4f"),
    ("loss at {tokens:,.0f} tokens", "loss_at_equal_tokens", ".4f"),
    ("loss at {time} of training", "loss_at_equal_seconds", ".4f"),
)

#: Lines with a best value: the lowest (-1) or the highest (1).
_BEST = {"throughput": 1, "final_loss": -1, "final_accuracy": 1, "bits_per_byte": -1, "loss_at_equal_steps": -1,
         "loss_at_equal_tokens": -1, "loss_at_equal_seconds": -1}  # fmt: skip

#: Lines about the end of each run, which cannot be compared if one run is longer.
_OF_THE_END = ("final_loss", "final_accuracy", "bits_per_byte")


def lines_of(comparison: Comparison) -> list[tuple[str, list[str], int | None]]:
    """The lines of the table: title, text for each run, and which run is best, if only one is."""
    table = comparison.table()
    reached = {axis: comparison.reached(axis) for axis in ("steps", "tokens")}
    clock = format_time(comparison.reached("seconds"))
    lines = []
    for title, key, form in _LINES:
        values = [entry[key] for entry in table]
        texts = [
            "—" if value is None else format_time(value) if form == "time" else format(value, form) for value in values
        ]
        best = None
        known = [value for value in values if value is not None]
        comparable = comparison.are_as_long or key not in _OF_THE_END
        if key in _BEST and comparable and len(known) > 1:
            top = max(known) if _BEST[key] > 0 else min(known)
            best = values.index(top) if values.count(top) == 1 else None
        lines.append((title.format(**reached, time=clock), texts, best))
    return lines
