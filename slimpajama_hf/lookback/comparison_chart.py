"""The chart and the table of runs side by side."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf.lookback.comparison import WINDOW, lines_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slimpajama_hf.lookback.comparison import Comparison


#: Okabe & Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/), without yellow, which is hard to see on
#: white. From the eighth run on, lines are dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


DASHES = ("-", "--", ":", "-.")


#: Panels: axis, title, label.
_PANELS = (
    ("steps", "Loss by step", "optimizer steps"),
    ("tokens", "Loss by tokens", "tokens seen"),
    ("seconds", "Loss by time", "seconds of training"),
)

_WIDTH, _PLOT = 20.0, 4.1  # width of the picture, height of its plots; inches


_LINE = 0.3  # height of a line of the table, inches


_RUNS_SHOWN, _PARTINGS_SHOWN = 14, 3  # in the table and below it


def draw(comparison: Comparison) -> Figure:
    """Loss by step, by tokens and by training time, one line per run, with the table below."""
    from slimpajama_hf import palette
    from slimpajama_hf.agg import Figure, FigureCanvasAgg, matplotlib
    from slimpajama_hf.views import charts, drawing

    width = _WIDTH
    said = min(len(comparison.courses), _RUNS_SHOWN + 1) + min(len(comparison.partings), _PARTINGS_SHOWN + 1)
    bottom = 2.0 + _LINE * said
    height = bottom + _PLOT + 1.6
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure(figsize=(width, height), dpi=drawing.DPI)
        FigureCanvasAgg(figure)
        left = charts.MARGIN
        title = f"{len(comparison.courses)} runs side by side"
        figure.text(left / width, 1 - 0.6 / height, title, fontsize=24, weight="bold")
        plot = (width - 2 * charts.MARGIN) / len(_PANELS)
        drawn = np.concatenate([course.curve[len(course) // 50 :] for course in comparison.courses])
        limits = drawing.robust_limits(drawn)
        for number, (axis, title, label) in enumerate(_PANELS):
            box = (left + number * plot + drawing.LEFT, bottom, plot - drawing.LEFT - 0.75, _PLOT)
            bounds = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
            ax = figure.add_axes(bounds, gid=axis)
            x = -drawing.LEFT * drawing.DPI / ax.bbox.width
            ax.set_title(title, loc="left", fontsize=drawing.TITLE, fontweight="bold", x=x, y=1.0, pad=28)
            ax.grid(axis="y", color=palette.GRID, lw=0.9)
            ax.tick_params(length=0, labelsize=drawing.BODY, labelcolor=palette.MUTED, pad=5)
            ax.set_ylim(*limits)
            _draw_panel(ax, comparison, axis, label)
        _draw_table(figure, comparison, width, height, bottom - 1.35)
    return figure


def line_style(number: int) -> tuple[str, str]:
    """(colour, dashes) of run `number`, from 0."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _draw_panel(ax: Axes, comparison: Comparison, axis: str, label: str) -> None:
    from slimpajama_hf import palette
    from slimpajama_hf.views import drawing

    end = max(float(course.axis(axis)[-1]) for course in comparison.courses)
    ax.set_xlim(0, 1.012 * end)
    drawing.number_axis(ax, "x", label)
    drawing.number_axis(ax, "y", f"nats per token · mean of {WINDOW} steps around")
    reached = comparison.reached(axis)
    if reached < end:
        ax.axvline(reached, color=palette.MUTED, lw=1, ls=(0, (2, 3)), gid="reached")
        # On the side with more room and fewer lines.
        near = reached < 0.6 * end
        ax.annotate(
            "all runs come this far", (reached, 1), xycoords=("data", "axes fraction"), xytext=(6 if near else -6, -2),
            textcoords="offset points", ha="left" if near else "right", va="top", color=palette.MUTED,
        )  # fmt: skip
    for number, course in enumerate(comparison.courses):
        colour, dashes = line_style(number)
        shown = drawing.evenly(len(course), drawing.RAW_STEPS)
        # A single step is a dot, not a line.
        marker = "o" if len(course) == 1 else ""
        ax.plot(
            course.axis(axis)[shown], course.curve[shown], color=colour, ls=dashes, lw=2, marker=marker, alpha=0.9,
            gid=f"run {number}",
        )  # fmt: skip
    by_name = {course.name: (number, course) for number, course in enumerate(comparison.courses)}
    for parting in comparison.partings:
        number, course = by_name[parting.right]
        if parting.fields and 0 < parting.same_steps <= len(course):
            place = parting.same_steps - 1
            ax.plot(
                [course.axis(axis)[place]], [course.curve[place]], marker="o", ms=9, mfc=palette.PAPER,
                mec=line_style(number)[0], mew=2, ls="none", gid=f"parts {number}",
            )  # fmt: skip


def _draw_table(figure: Figure, comparison: Comparison, width: float, height: float, top: float) -> None:
    """The table, one line per run in the style of its curve; the first line is at `top` inches."""
    from matplotlib.lines import Line2D

    from slimpajama_hf import palette
    from slimpajama_hf.views import charts, drawing

    lines = lines_of(comparison)
    first, most = 5.0, _RUNS_SHOWN
    column = (width - charts.MARGIN - first) / len(lines)

    def place(x: float, y: float, text: str, **how: Any) -> None:
        figure.text(x / width, y / height, text, va="baseline", fontsize=drawing.BODY, **how)

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
        name = drawing.printable(course.name)
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
        drawing.printable(("○ " if parting.fields else "") + parting.words())[:200] for parting in comparison.partings
    ]
    more = len(partings) - _PARTINGS_SHOWN
    for words in partings[:_PARTINGS_SHOWN] + [f"and {more} runs more of one seed"] * (more > 0):
        place(charts.MARGIN, y - 0.15, words, color=palette.MUTED, gid="parting")
        y -= _LINE


def _two_lines(title: str) -> str:
    """A title, broken at the space nearest to its middle."""
    spaces = [place for place, char in enumerate(title) if char == " "]
    if not spaces or len(title) < 12:
        return title
    middle = min(spaces, key=lambda place: abs(place - len(title) / 2))
    return f"{title[:middle]}\n{title[middle + 1 :]}"


def render(comparison: Comparison) -> bytes:
    """The chart as PNG."""
    from slimpajama_hf import palette
    from slimpajama_hf.agg import matplotlib
    from slimpajama_hf.views import drawing

    content = io.BytesIO()
    with matplotlib.rc_context(drawing.STYLE):  # saving lays out ticks and texts
        draw(comparison).savefig(content, format="png", dpi=drawing.DPI, facecolor=palette.PAPER)
    return content.getvalue()
