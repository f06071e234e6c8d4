"""`compare RUN RUN...`: runs side by side, by step, by tokens and by training time; where two of one seed part.

Ledgers alone are read. Loss at equal steps, tokens and seconds is the mean of the last 50 steps at the point that all
runs have reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import files, terminal, verify
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.ledger import Columns
from slimpajama_hf.screen import Waiting, format_time
from slimpajama_hf.verify import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

#: Steps of the means that are compared.
WINDOW = 50

DEFAULT_OUTPUT = "comparison.png"

#: Okabe & Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/), without the yellow, which vanishes on
#: white; from the eighth run on the lines are dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")


@dataclasses.dataclass
class Course:
    """A run as it went."""

    name: str
    run: Run
    columns: Columns
    seconds: np.ndarray
    """Training time since the beginning, after each step; (steps,)."""
    tokens: np.ndarray
    """Tokens seen since the beginning, after each step; (steps,)."""
    means: np.ndarray
    """Mean loss of the last `WINDOW` steps at each step, nats per token; (steps,)."""

    def __len__(self) -> int:
        return len(self.columns)

    def axis(self, name: str) -> np.ndarray:
        """`steps`, `tokens` or `seconds` after each step, (steps,), growing."""
        return {"steps": self.columns.step + 1, "tokens": self.tokens, "seconds": self.seconds}[name]

    def loss_at(self, name: str, value: float) -> float:
        """The mean loss at the last step that was done by then (`axis`)."""
        place = int(np.searchsorted(self.axis(name), value * (1 + 1e-12), side="right")) - 1
        return float(self.means[place]) if place >= 0 else math.nan


def read_course(path: str, name: str) -> Course:
    """The course of a run. Raises UserError when its ledger cannot be read or has no step."""
    from slimpajama_hf.charts import running_mean

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
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """What to call the runs: the last part of each path, and as many parts before it as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("compare: the same folder is named twice; name each run once")


#: Fields of two rows that differ, named in words.
_FIELDS_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Parting:
    """Two runs of one seed."""

    left: str
    right: str
    same_steps: int
    """Steps that are the same, bit by bit; the next one differs, or one of the runs ends."""
    fields: dict[str, tuple[Any, Any]]
    """What differs at the next step; empty where one run is the beginning of the other."""

    def words(self) -> str:
        """What there is to say, in a sentence."""
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
        """The point of an axis (`steps`, `tokens`, `seconds`) that every run has reached."""
        return float(min(course.axis(axis)[-1] for course in self.courses))

    def table(self) -> list[dict[str, Any]]:
        """The numbers of each run; None for what is no number."""
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
        """All of it as JSON values."""
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
    """The seed of a run, as its configuration says; None where there is none to read."""
    seed = run.config().get("seed")
    if seed is None and run.folder.config.is_file():
        from slimpajama_hf.arguments import TRAINING_DEFAULTS

        seed = TRAINING_DEFAULTS["seed"][0]
    return seed


def compare(paths: Sequence[str]) -> Comparison:
    """Runs side by side. Raises UsageError for fewer than two, UserError for one that cannot be read."""
    if len(paths) < 2:
        raise UsageError(f"compare {' '.join(paths)}: expected two runs or more, as compare runs/a runs/b")
    courses = [read_course(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
    partings, first_of_seed = [], dict[Any, Course]()
    for course in courses:
        # Each is held against the first of its seed: that says of all of them where they part.
        seed = seed_of(course.run)
        first = first_of_seed.setdefault(seed, course)
        if seed is not None and first is not course:
            same, fields, _ = verify.compare_ledgers(first.run, course.run)
            partings.append(Parting(first.name, course.name, same, fields))
    return Comparison(courses, partings)


# ---- the table ----

#: Rows of the table: what it is, the key, how it is written.
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

#: Lines in which the least (-1) or the greatest (1) is the best.
_BEST = {"throughput": 1, "final_loss": -1, "final_accuracy": 1, "bits_per_byte": -1, "loss_at_equal_steps": -1,
         "loss_at_equal_tokens": -1, "loss_at_equal_seconds": -1}  # fmt: skip


def lines_of(comparison: Comparison) -> list[tuple[str, list[str], int | None]]:
    """The table: what a line is, its text for each run, and which run is the best in it, if one alone is."""
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
        if key in _BEST and len(known) > 1:
            top = max(known) if _BEST[key] > 0 else min(known)
            best = values.index(top) if values.count(top) == 1 else None
        lines.append((title.format(**reached, time=clock), texts, best))
    return lines


def show(drawn: Console, comparison: Comparison) -> None:
    """The table on a terminal, in pieces where it is too narrow for all runs; and where runs part."""
    from rich.text import Text

    lines = lines_of(comparison)
    names = [terminal.visible(course.name, line_ends=False) for course in comparison.courses]
    widths = [max(len(name), *(len(texts[i]) for _, texts, _ in lines)) + 2 for i, name in enumerate(names)]
    room = drawn.width - max(len(title) for title, _, _ in lines) - 2
    first = 0
    while first < len(names):
        last = first + 1
        while last < len(names) and sum(widths[first : last + 1]) <= room:
            last += 1
        if first:
            drawn.print()
        right = {"justify": "right", "overflow": "fold"}
        table = terminal.grid(
            {"header": "", "no_wrap": True}, *({"header": name, **right} for name in names[first:last])
        )
        for title, texts, best in lines:
            shown = [Text(texts[i], "bold" if i == best else "") for i in range(first, last)]
            table.add_row(Text(title, "dim"), *shown)
        drawn.print(table)
        first = last
    drawn.print(Text(f"losses and accuracy: mean of {WINDOW} steps; bold: the best", "dim"))
    for parting in comparison.partings:
        drawn.print(Text(terminal.visible(parting.words(), line_ends=False)))


# ---- the chart ----

#: Panels: the axis, its title, its label.
_PANELS = (
    ("steps", "Loss by step", "optimizer steps"),
    ("tokens", "Loss by tokens", "tokens seen"),
    ("seconds", "Loss by time", "seconds of training"),
)

_WIDTH, _PLOT = 20.0, 4.1  # of the picture, and height of its plots; inches
_LINE = 0.3  # of the table
_RUNS_SHOWN, _PARTINGS_SHOWN = 14, 3  # in the table and below it


def draw(comparison: Comparison) -> Figure:
    """Loss by step, by tokens and by training time, one line a run, and the table below."""
    from slimpajama_hf import charts, palette
    from slimpajama_hf.agg import Figure, FigureCanvasAgg, matplotlib

    width = _WIDTH
    said = min(len(comparison.courses), _RUNS_SHOWN + 1) + min(len(comparison.partings), _PARTINGS_SHOWN + 1)
    bottom = 2.0 + _LINE * said
    height = bottom + _PLOT + 1.6
    with matplotlib.rc_context(charts.STYLE):
        figure = Figure(figsize=(width, height), dpi=charts.DPI)
        FigureCanvasAgg(figure)
        left = charts.MARGIN
        title = f"{len(comparison.courses)} runs side by side"
        figure.text(left / width, 1 - 0.6 / height, title, fontsize=24, weight="bold")
        plot = (width - 2 * charts.MARGIN) / len(_PANELS)
        drawn = np.concatenate([course.means[len(course) // 50 :] for course in comparison.courses])
        limits = charts.robust_limits(drawn)
        for number, (axis, title, label) in enumerate(_PANELS):
            box = (left + number * plot + charts.LEFT, bottom, plot - charts.LEFT - 0.75, _PLOT)
            bounds = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
            ax = figure.add_axes(bounds, gid=axis)
            x = -charts.LEFT * charts.DPI / ax.bbox.width
            ax.set_title(title, loc="left", fontsize=charts.TITLE, fontweight="bold", x=x, y=1.0, pad=28)
            ax.grid(axis="y", color=palette.GRID, lw=0.9)
            ax.tick_params(length=0, labelsize=charts.BODY, labelcolor=palette.MUTED, pad=5)
            ax.set_ylim(*limits)
            _draw_panel(ax, comparison, axis, label)
        _draw_table(figure, comparison, width, height, bottom - 1.35)
    return figure


def line_style(number: int) -> tuple[str, str]:
    """(colour, dashes) of the run `number`, from 0."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _draw_panel(ax: Axes, comparison: Comparison, axis: str, label: str) -> None:
    from slimpajama_hf import charts, palette

    end = max(float(course.axis(axis)[-1]) for course in comparison.courses)
    ax.set_xlim(0, 1.012 * end)
    charts.number_axis(ax, "x", label)
    charts.number_axis(ax, "y", f"nats per token · mean of the last {WINDOW} steps")
    reached = comparison.reached(axis)
    if reached < end:
        ax.axvline(reached, color=palette.MUTED, lw=1, ls=(0, (2, 3)), gid="reached")
        # On the side where there is room, and few lines.
        near = reached < 0.6 * end
        ax.annotate(
            "all runs come this far", (reached, 1), xycoords=("data", "axes fraction"), xytext=(6 if near else -6, -2),
            textcoords="offset points", ha="left" if near else "right", va="top", color=palette.MUTED,
        )  # fmt: skip
    for number, course in enumerate(comparison.courses):
        colour, dashes = line_style(number)
        shown = charts.evenly(len(course), charts.RAW_STEPS)
        # A single step is a dot, not a line.
        marker = "o" if len(course) == 1 else ""
        ax.plot(
            course.axis(axis)[shown], course.means[shown], color=colour, ls=dashes, lw=2, marker=marker, alpha=0.9,
            gid=f"run {number}",
        )  # fmt: skip
    by_name = {course.name: (number, course) for number, course in enumerate(comparison.courses)}
    for parting in comparison.partings:
        number, course = by_name[parting.right]
        if parting.fields and 0 < parting.same_steps <= len(course):
            place = parting.same_steps - 1
            ax.plot(
                [course.axis(axis)[place]], [course.means[place]], marker="o", ms=9, mfc=palette.PAPER,
                mec=line_style(number)[0], mew=2, ls="none", gid=f"parts {number}",
            )  # fmt: skip


def _draw_table(figure: Figure, comparison: Comparison, width: float, height: float, top: float) -> None:
    """The table, one line a run, its first at `top` inches: below the plots, in the colours of the lines."""
    from matplotlib.lines import Line2D

    from slimpajama_hf import charts, palette

    lines = lines_of(comparison)
    first, most = 5.0, _RUNS_SHOWN
    column = (width - charts.MARGIN - first) / len(lines)

    def place(x: float, y: float, text: str, **how: Any) -> None:
        figure.text(x / width, y / height, text, va="baseline", fontsize=charts.BODY, **how)

    for index, (title, _, _) in enumerate(lines):
        words = _two_lines(title)
        place(first + (index + 1) * column, top + 0.36, words, ha="right", color=palette.MUTED, linespacing=1.15)
    for number, course in enumerate(comparison.courses[:most]):
        y = top - number * _LINE
        colour, dashes = line_style(number)
        x = charts.MARGIN / width
        figure.add_artist(
            Line2D(
                (x, x + 0.45 / width), ((y + 0.06) / height,) * 2, color=colour, ls=dashes, lw=3, gid=f"key {number}"
            )
        )
        name = charts.printable(course.name)
        place(charts.MARGIN + 0.6, y, name if len(name) <= 42 else f"{name[:20]}…{name[-20:]}")
        for index, (_, texts, best) in enumerate(lines):
            place(
                first + (index + 1) * column,
                y,
                texts[number],
                ha="right",
                weight="bold" if best == number else "normal",
            )
    y = top - min(len(comparison.courses), most) * _LINE
    if len(comparison.courses) > most:
        place(charts.MARGIN, y, f"and {len(comparison.courses) - most} runs more", color=palette.MUTED)
        y -= _LINE
    partings = [
        charts.printable(("○ " if parting.fields else "") + parting.words())[:200] for parting in comparison.partings
    ]
    more = len(partings) - _PARTINGS_SHOWN
    for words in partings[:_PARTINGS_SHOWN] + [f"and {more} runs more of one seed"] * (more > 0):
        place(charts.MARGIN, y - 0.15, words, color=palette.MUTED, gid="parting")
        y -= _LINE


def _two_lines(title: str) -> str:
    """A title broken at the space nearest to its middle."""
    spaces = [place for place, char in enumerate(title) if char == " "]
    if not spaces or len(title) < 12:
        return title
    middle = min(spaces, key=lambda place: abs(place - len(title) / 2))
    return f"{title[:middle]}\n{title[middle + 1 :]}"


def render(comparison: Comparison) -> bytes:
    """The chart as PNG."""
    from slimpajama_hf import charts, palette
    from slimpajama_hf.agg import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(charts.STYLE):  # ticks and texts are laid out only now
        draw(comparison).savefig(content, format="png", dpi=charts.DPI, facecolor=palette.PAPER)
    return content.getvalue()


def main(options: argparse.Namespace) -> int:
    """`compare RUN RUN...`; the exit code."""
    output = options.output or (None if options.json else DEFAULT_OUTPUT)
    if output is not None and not output.endswith(".png"):
        raise UsageError(f"--output {output}: expected a name that ends with .png")
    with Waiting("reading the ledgers") as waiting:
        comparison = compare(options.runs)
        if output is not None:
            waiting("drawing the chart")
            try:
                files.write_whole(Path(output), render(comparison))
            except OSError as error:
                raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another file") from None
    if options.json:
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
        return 0
    show(terminal.console(), comparison)
    sys.stderr.write(f"{output}\n")
    return 0
