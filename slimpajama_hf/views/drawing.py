"""Parts of all charts: axes, bands, running means, labels, and texts that fit."""

from __future__ import annotations

import functools
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimpajama_hf.agg import matplotlib

# isort: split

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from slimpajama_hf import palette

WINDOW = 50  # steps in a mean; fewer if a run has fewer


RAW_STEPS = 2_500  # more steps than this are drawn as a band


BINS = 400  # in a band or in marks at an edge: about one per two pixels


LINE_POINTS = 600  # in a running mean over more than RAW_STEPS steps


CLOUD_POINTS = 4_000  # in the panel of loss against accuracy


DPI = 100


LEFT = 0.62  # inches left of a plot for tick labels; titles begin there


BODY, TITLE = 12.5, 16.0  # points


MONO = "DejaVu Sans Mono"  # comes with matplotlib, so charts look the same everywhere


CHARACTER = 0.602 * BODY / 72  # width of one character of MONO at BODY, inches

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": BODY,
    "text.usetex": False,
    "text.hinting": "no_hinting",  # even letter spacing, and a fifth faster
    "text.parse_math": False,  # a `$` in a document is a dollar sign
    "text.color": palette.INK,
    "figure.facecolor": palette.PAPER,
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "axes.facecolor": "none",
    "axes.edgecolor": palette.MUTED,
    "axes.labelcolor": palette.MUTED,
    "axes.labelsize": BODY,
    "axes.labelpad": 5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": False,
    "lines.antialiased": True,
    "path.simplify": True,
}

#: Early steps are pale, late steps dark. The palest third is left out, because it would vanish on the paper.
STEP_COLOURS = LinearSegmentedColormap.from_list("steps", matplotlib.colormaps["YlGnBu"](np.linspace(0.32, 1, 64)))


# Numbers -------------------------------------------------------------------------------------------------------------


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` finite values up to each position, fewer at the start; same shape (n,).

    At a value that is not finite the mean before it is repeated; before the first finite value the mean is NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    kept = values[finite]
    if not kept.size:
        return np.full(values.shape, np.nan)
    # A window is the end of one block of `window` values and the start of the next. Sums stay within their blocks, so
    # one huge value cannot destroy the precision of all later means, as it would in a single cumulative sum.
    blocks = np.zeros(-(-kept.size // window) * window)
    blocks[: kept.size] = kept
    blocks = blocks.reshape(-1, window)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.cumsum(blocks, axis=1)
        sums[1:, :-1] += np.cumsum(blocks[:-1, ::-1], axis=1)[:, ::-1][:, 1:]
    means = sums.reshape(-1)[: kept.size] / np.minimum(np.arange(1, kept.size + 1), window)
    last = np.cumsum(finite) - 1
    return np.where(last >= 0, means[last], np.nan)


def centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` finite values around each position; same shape (n,).

    Unlike `running_mean` it does not lag behind a falling loss. The window shrinks at both ends: at the first value it
    reaches as far ahead as back, at the last it has only earlier values. Not finite: as in `running_mean`.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    kept = values[finite]
    if not kept.size:
        return np.full(values.shape, np.nan)
    place, back = np.arange(kept.size), window // 2
    ahead = window - 1 - back
    # A window that ends at `last` is a trailing window; one that the end cuts off is a trailing window in reverse.
    last = place + np.minimum(place, ahead)
    cut_off = last >= kept.size
    means = running_mean(kept, window)[np.minimum(last, kept.size - 1)]
    first = np.maximum(place - back, 0)[cut_off]
    means[cut_off] = running_mean(kept[::-1], window)[kept.size - 1 - first]
    rank = np.cumsum(finite) - 1
    return np.where(rank >= 0, means[rank], np.nan)


def robust_limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that shows the course of `values` (n,), not its outliers.

    They include all values inside the fence, the first values inside theirs, and the medians of chunks, so that a long
    run still shows from where it fell.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    chunk = max(5, -(-finite.size // BINS))
    course = np.median(finite[: finite.size // chunk * chunk].reshape(-1, chunk), axis=1)
    shown = np.concatenate([fenced(finite), fenced(finite[:WINDOW]), course])
    low, high = float(shown.min()), float(shown.max())
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (low - pad if low < 0 else max(low - pad, 0.0)), high + pad


def fenced(values: np.ndarray) -> np.ndarray:
    """Minimum and maximum of finite `values` (n,) within Tukey's outer fence, 3 interquartile ranges."""
    first, middle, third = (float(q) for q in np.percentile(values, (25, 50, 75)))
    fence = 3 * (third - first) or abs(middle) or math.inf
    inside = values[(values >= first - fence) & (values <= third + fence)]
    return np.array([inside.min(), inside.max()])


def spread(positions: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """`positions` (k,) in [0, 1], moved as little as possible so that neighbours are `gap` apart, in the same order."""
    order = np.argsort(positions, kind="stable")
    room = max(1 - gap * (len(order) - 1), 0.0)
    # Without the gaps, "apart" becomes "not decreasing": isotonic regression by pooling adjacent violators.
    pools: list[list[float]] = []  # [mean, size]
    for rank, index in enumerate(order):
        pools.append([min(max(positions[index] - rank * gap, 0.0), room), 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, size = pools.pop()
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * size) / (pools[-1][1] + size), pools[-1][1] + size]
    placed = np.empty(len(order))
    placed[order] = np.repeat([p[0] for p in pools], [int(p[1]) for p in pools]) + gap * np.arange(len(order))
    return placed


def band(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Last index, 5 % and 95 % quantile (nearest rank) of each of about `bins` chunks of `values` (n,)."""
    size = -(-values.size // bins)
    padded = np.full(-(-values.size // size) * size, np.nan)
    padded[: values.size] = np.where(np.isfinite(values), values, np.nan)
    chunks = np.sort(padded.reshape(-1, size), axis=1)  # sorts NaN last
    top = np.isfinite(chunks).sum(axis=1) - 1
    row = np.arange(len(chunks))
    ends = np.minimum((row + 1) * size, values.size) - 1
    low, high = (chunks[row, np.maximum(np.rint(q * top), 0).astype(int)] for q in (0.05, 0.95))
    return ends, low, high


def evenly(n: int, most: int) -> np.ndarray:
    """At most `most` indices of `n`, evenly spaced, with the first and the last."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(np.int64)


def short_number(value: float) -> str:
    """A count to three digits: `2,500`, `33.1k`, `1.25M`."""
    if abs(value) < 9_999.5:
        return f"{value:,.0f}"
    value = float(f"{value:.3g}")  # rounded first, so that 999,999 is 1M
    size, letter = next(pair for pair in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= pair[0])
    return f"{value / size:g}{letter}"


def tick_text(value: float) -> str:
    """An exact tick label: `0.25`, `2,500`, `250k`, `1,234,200`."""
    value = round(value, 9)
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if abs(value) >= max(size, 10_000) and value % (size / 4) == 0:
            return f"{value / size:g}{letter}"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points that MONO can draw."""
    return frozenset(font_manager.get_font(font_manager.findfont(MONO)).get_charmap())


def printable(text: object, most: int = 2_000) -> str:
    """The first `most` characters of `text` as one safe line: line ends as ⏎, characters without a glyph as `·`."""
    shown: list[str] = []
    for char in unicodedata.normalize("NFC", str(text)[:most].replace("\r\n", "\n")):
        kind = unicodedata.category(char)
        if char in "\n\u2028\u2029":
            shown.append(" ⏎ ")
        elif char == "\t" or kind == "Zs":
            shown.append(" ")
        elif kind in ("Cf", "Mn", "Me"):
            continue  # invisible, changes the writing direction, or combines with its neighbour
        elif ord(char) in _glyphs() and kind != "Cc":
            shown.append(char)
        elif shown[-3:] != ["·"] * 3:
            shown.append("·")
    return "".join(shown)


def fit(text: object, width: float, lines: int) -> str:
    """Printable `text`, wrapped to `lines` lines of MONO within `width` inches; ends in `…` if it was cut."""
    characters = max(int(width / CHARACTER), 10)
    return "\n".join(textwrap.wrap(printable(text), characters, max_lines=lines, placeholder=" …"))


# Parts of panels -----------------------------------------------------------------------------------------------------


def step_axis(ax: Axes, steps: np.ndarray) -> None:
    """A horizontal axis of optimizer steps, from the first to the last of `steps`."""
    first, last = (float(steps[0]), float(steps[-1])) if steps.size else (0.0, 1.0)
    span = max(last - first, 1.0)
    ax.set_xlim(first - 0.012 * span, first + 1.012 * span)
    number_axis(ax, "x", "optimizer step", whole=True)


def number_axis(ax: Axes, which: str, label: str, whole: bool = False) -> None:
    """Ticks and label of the axis `which` ("x" or "y"); few ticks, because each costs time and space."""
    axis, pixels = (ax.xaxis, ax.bbox.width) if which == "x" else (ax.yaxis, ax.bbox.height)
    nbins = min(max(int(pixels / (75 if which == "x" else 48)), 2), 7)
    axis.set_major_locator(MaxNLocator(nbins=nbins, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    if which == "x":
        ax.set_xlabel(label)
    else:
        # Horizontal, above the axis, to be readable.
        ax.set_ylabel(label, rotation=0, ha="left", va="bottom")
        ax.yaxis.set_label_coords(-LEFT * DPI / ax.bbox.width, 1 + 0.1 * DPI / ax.bbox.height)


def draw_steps(ax: Axes, steps: np.ndarray, values: np.ndarray) -> str:
    """Single steps: points if they are few, else a band from their 5 % to their 95 % quantile. Returns its legend."""
    if values.size <= RAW_STEPS:
        size = 6.0 if values.size <= 300 else 3.6
        ax.plot(steps, values, ls="none", marker="o", ms=size, mew=0, color=palette.POINT, alpha=0.65, gid="steps")
        return "dots: single steps"
    ends, low, high = band(values, BINS)
    ax.fill_between(steps[ends], low, high, color=palette.POINT, alpha=0.38, lw=0, gid="band")
    return "band: 5–95 % of steps"


def draw_mean(
    ax: Axes, steps: np.ndarray, values: np.ndarray, window: int, colour: str = palette.ACCENT, gid: str = "mean"
) -> float:
    """Mean of the `window` steps around each of `values` (n,) as a line; returns the mean of the last `window`."""
    means = centred_mean(values, window)
    shown = evenly(means.size, means.size if means.size <= RAW_STEPS else LINE_POINTS)
    marker = "o" if values.size == 1 else ""
    ax.plot(steps[shown], means[shown], color=colour, lw=2, marker=marker, ms=7, gid=gid)
    return last_mean(values, window)


def last_mean(values: np.ndarray, window: int) -> float:
    """Mean of the last `window` finite values of `values` (n,); NaN if there are none."""
    kept = values[np.isfinite(values)][-window:]
    return float(running_mean(kept, window)[-1]) if kept.size else math.nan


def label_ends(ax: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Texts right of the plot, at the heights of what they name but apart. `labels`: (data y, text, colour)."""
    labels = [label for label in labels if math.isfinite(label[0])]
    points = ax.transData.transform([(ax.get_xlim()[1], y) for y, _, _ in labels] or np.empty((0, 2)))
    wanted = np.clip(ax.transAxes.inverted().transform(points)[:, 1], 0, 1) if labels else np.empty(0)
    placed = spread(wanted, gap=1.3 * BODY * DPI / 72 / ax.bbox.height)
    for (_, text, colour), want, got in zip(labels, wanted, placed, strict=True):
        ax.annotate(
            text, (1, got), xycoords="axes fraction", xytext=(14, 0), textcoords="offset points",
            va="center_baseline", color=palette.text_colour(colour), gid="end",
        )  # fmt: skip
        if abs(got - want) > 0.01:
            x = (1.0, 1 + 16 / ax.bbox.width)
            ax.add_line(Line2D(x, (want, got), transform=ax.transAxes, color=colour, lw=0.8, clip_on=False))


def mark_unseen(ax: Axes, steps: np.ndarray, values: np.ndarray, gutter: float = 0.0) -> None:
    """Mark and count steps that are not finite (red, at the top edge) or beyond the limits (triangles)."""
    lost = ~np.isfinite(values)
    low, high = ax.get_ylim()
    marks = ((lost, 1.0, "|", 13, palette.ALARM, "nonfinite"), (values > high, 0.985, "^", 6, palette.MUTED, "above"),
             (values < low, 0.015, "v", 6, palette.MUTED, "below"))  # fmt: skip
    for where, height, marker, size, colour, gid in marks:
        if where.any():
            x = steps[where]
            # At most one mark per two pixels; more would overlap.
            x = x[np.unique((x - x[0]) * BINS // max(int(steps[-1] - steps[0]), 1), return_index=True)[1]]
            ax.plot(
                x, np.full(x.size, height), ls="none", marker=marker, ms=size, mew=2 if marker == "|" else 0,
                color=colour, transform=ax.get_xaxis_transform(), clip_on=False, gid=gid,
            )  # fmt: skip
    note_unseen(ax, values, (low, high), gutter)


def unseen(values: np.ndarray, limits: tuple[float, float]) -> list[str]:
    """Phrases that count `values` (n,) that are not finite or beyond `limits`; empty if all are shown."""
    finite = np.isfinite(values)
    lost = int((~finite).sum())
    beyond = int((finite & ((values < limits[0]) | (values > limits[1]))).sum())
    return [plural(lost, "non-finite step")] * (lost > 0) + [f"{beyond:,} off the axis"] * (beyond > 0)


def note_unseen(ax: Axes, values: np.ndarray, limits: tuple[float, float], gutter: float = 0.0) -> None:
    """Write the phrases of `unseen` into the line of the title, up to `gutter` inches right of the plot."""
    said = " · ".join(unseen(values, limits))
    colour = palette.ALARM if "non-finite" in said else palette.MUTED
    ax.set_title(said, loc="right", x=1 + gutter * DPI / ax.bbox.width, y=1.0, pad=28, fontsize=BODY, color=colour)
