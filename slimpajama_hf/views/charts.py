"""The chart of a run: eight panels below a headline, drawn from the ledger's columns and the samples.

To add a panel, write a function `draw_x(ax, columns, samples)` and add a line to `PANELS`.
The number of drawn elements is bounded: beyond `RAW_STEPS` steps, a band replaces the points.
"""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.agg import Figure, FigureCanvasAgg, matplotlib

# isort: split
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from slimpajama_hf import files, palette, terminal
from slimpajama_hf.record import noise
from slimpajama_hf.views.drawing import (
    BODY,
    CLOUD_POINTS,
    DPI,
    LEFT,
    LINE_POINTS,
    MONO,
    RAW_STEPS,
    STEP_COLOURS,
    STYLE,
    TITLE,
    WINDOW,
    centred_mean,
    draw_mean,
    draw_steps,
    evenly,
    fit,
    label_ends,
    last_mean,
    mark_unseen,
    note_unseen,
    number_axis,
    plural,
    printable,
    robust_limits,
    short_number,
    step_axis,
    unseen,
)

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns


RECENT = 500  # steps of the panel of recent steps
DOT_ROWS = 200  # fewer steps than this show domains as rows of dots, not as curves
DOMAINS_SHOWN = 9  # with a label of their own, the most frequent first
SAMPLES_SHOWN = 5

SIZE = (20.0, 14.0)  # inches
MARGIN = 0.45  # inches left and right of everything
LABELS = 2.6  # inches right of a plot that names domains
ROWS = ((7.76, 3.02), (3.95, 2.48), (0.2, 2.55))  # bottom and height of the plots of a row, inches

Samples = Sequence[dict[str, Any]]
Groups = Sequence[tuple[str, np.ndarray]]  # (domain, mask of its steps)


@dataclasses.dataclass
class Caption:
    """The parts of the headline that are not computed from the ledger."""

    title: str
    subtitle: str
    max_steps: int


def draw_series(ax: Axes, columns: Columns, values: np.ndarray, unit: str, number: str, floor: bool) -> None:
    """One quantity per step and its mean. `number`: format of the mean of the last steps; `floor`: start at 0."""
    steps = columns.step
    # When a pixel is wider than WINDOW steps, means over WINDOW would only show which steps were picked.
    window = max(WINDOW, values.size // LINE_POINTS)
    key = draw_steps(ax, steps, values)
    now = draw_mean(ax, steps, values, window)
    low, high = robust_limits(values)
    ax.set_ylim(0 if floor else low, high if high > 0 else 1)
    step_axis(ax, steps)
    number_axis(ax, "y", f"{unit} · line: {mean_of(window, steps.size)}" + (f", {key}" if ax.bbox.width > 350 else ""))
    mark_unseen(ax, steps, values)
    label_ends(ax, [(now, format(now, number), palette.ACCENT)])


def mean_of(window: int, steps: int) -> str:
    """The axis label of a line of means; a short run has fewer steps than the window."""
    return f"mean of {min(window, max(steps, 1)):,} steps"


def by_frequency(columns: Columns) -> list[int]:
    """Indices into `columns.domains`, the most frequent first."""
    counts = np.bincount(columns.domain, minlength=len(columns.domains))
    return [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]


# Panels --------------------------------------------------------------------------------------------------------------


def draw_loss(ax: Axes, columns: Columns, samples: Samples) -> None:
    draw_series(ax, columns, columns.loss, "nats per token", ".3f", floor=False)


def draw_accuracy(ax: Axes, columns: Columns, samples: Samples) -> None:
    draw_series(ax, columns, 100 * columns.accuracy, "%", ".1f", floor=True)


def draw_throughput(ax: Axes, columns: Columns, samples: Samples) -> None:
    draw_series(ax, columns, columns.throughput, "tokens/s", ",.0f", floor=True)


def draw_learning_rate(ax: Axes, columns: Columns, samples: Samples) -> None:
    """The learning rate of every step on a log axis."""
    steps, rates = columns.step, columns.learning_rate
    if rates.size > RAW_STEPS:
        # Minimum and maximum of each chunk, so that no restart of a schedule falls between two points.
        chunk = rates.size // LINE_POINTS
        whole = rates[: rates.size // chunk * chunk].reshape(-1, chunk)
        start = np.arange(len(whole)) * chunk
        ends = np.array([0, rates.size - 1])
        shown = np.unique(np.concatenate([start + whole.argmin(axis=1), start + whole.argmax(axis=1), ends]))
        steps, rates = steps[shown], rates[shown]
    ax.set_yscale("log")
    positive = rates[np.isfinite(rates) & (rates > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1e-4, 1e-3)
    ax.set_ylim(low / 1.8, high * 1.8)
    marker = "o" if rates.size <= 30 else ""
    # A log axis has no place for a rate of 0: it is drawn at the bottom edge.
    ax.plot(steps, np.maximum(rates, low / 1.8), color=palette.ACCENT, lw=2, marker=marker, ms=5, gid="rate")
    step_axis(ax, columns.step)
    number_axis(ax, "y", "per step, log axis")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 10 else (1.0, 2.0, 5.0), numticks=6))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    if rates.size:
        label_ends(ax, [(max(float(rates[-1]), low / 1.8), f"{rates[-1]:.2e}".replace("e-0", "e-"), palette.ACCENT)])


def draw_cloud(ax: Axes, columns: Columns, samples: Samples) -> None:
    """Loss against accuracy: one point per step, evenly thinned, late steps on top."""
    shown = evenly(len(columns), CLOUD_POINTS)
    x, y, steps = 100 * columns.accuracy[shown], columns.loss[shown], columns.step[shown]
    last = max(len(columns) - 1, 1)
    size = 34 if shown.size <= 300 else 11
    cloud = ax.scatter(x, y, c=steps, cmap=STEP_COLOURS, vmin=0, vmax=last, s=size, lw=0, alpha=0.75, gid="cloud")
    ax.set_ylim(*robust_limits(y))
    right = 1.05 * float(np.nanmax(x, initial=0)) or 1.0
    ax.set_xlim(-0.02 * right, right)
    number_axis(ax, "x", "% of next tokens right")
    number_axis(ax, "y", "nats per token" + (f" · {shown.size:,} steps shown" if shown.size < len(columns) else ""))
    said = "\n".join(unseen(np.where(np.isfinite(columns.accuracy), columns.loss, np.nan), ax.get_ylim()))
    colour = palette.ALARM if "non-finite" in said else palette.MUTED
    # The corner of low loss and low accuracy is empty.
    ax.text(0.03, 0.04, said, transform=ax.transAxes, color=colour, va="bottom", gid="note")
    if not shown.size:
        return
    bar = ax.figure.colorbar(cloud, cax=ax.inset_axes((1.04, 0, 0.035, 1)), ticks=[0, last / 2, last])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda step, _: short_number(step) if step else "step 0"))
    bar.ax.tick_params(length=0, labelsize=BODY, labelcolor=palette.MUTED, pad=3)
    bar.ax.spines[:].set_visible(False)
    if bar.solids is not None:  # opaque, as overlapping points are
        bar.solids.set_alpha(1)


def draw_recent(ax: Axes, columns: Columns, samples: Samples) -> None:
    """Loss of the last RECENT steps, coloured by domain; labels give the mean of each domain in them."""
    steps, loss, domain = columns.step[-RECENT:], columns.loss[-RECENT:], columns.domain[-RECENT:]
    colours = np.array([palette.domain_colour(name) for name in columns.domains] or [palette.MUTED])
    size = 34 if steps.size <= 100 else 16
    ax.scatter(steps, loss, c=list(colours[domain]), s=size, lw=0, alpha=0.8, gid="recent")
    # Averaged over the whole run, so that the line has a full window at its left end.
    mean = centred_mean(columns.loss, WINDOW)[-RECENT:]
    ax.plot(steps, mean, color=palette.INK, lw=2, marker="o" if steps.size == 1 else "", gid="mean")
    ax.set_ylim(*robust_limits(loss))
    step_axis(ax, steps)
    number_axis(ax, "y", f"nats per token · colour: domain, with its mean · line: {mean_of(WINDOW, len(columns))}")
    mark_unseen(ax, steps, loss, gutter=1.9)
    labels = []
    for index in by_frequency(columns)[:DOMAINS_SHOWN]:
        own = loss[(domain == index) & np.isfinite(loss)]
        name = columns.domains[index]
        if own.size:
            labels.append((float(own.mean()), f"{domain_label(name)} {own.mean():.2f}", palette.domain_colour(name)))
    label_ends(ax, labels)


def domain_label(domain: str) -> str:
    """The name of a domain, short and printable."""
    name = printable(palette.domain_name(domain))
    return name if len(name) <= 13 else f"{name[:6]}…{name[-6:]}"  # both ends help to tell names apart


def draw_domains(ax: Axes, columns: Columns, samples: Samples) -> None:
    """Loss of each domain: rows of dots for a short run, running means for a long one; both with counts."""
    groups = [(columns.domains[i], columns.domain == i) for i in by_frequency(columns)[:DOMAINS_SHOWN]]
    if len(columns) < DOT_ROWS:
        heights, means = domain_dots(ax, columns, groups)
        note_unseen(ax, columns.loss, ax.get_xlim(), gutter=LABELS - 0.1)
    else:
        heights = means = domain_curves(ax, columns, groups)
        note_unseen(ax, columns.loss, (-math.inf, math.inf), gutter=LABELS - 0.1)
    if len(columns.domains) > DOMAINS_SHOWN:
        more = len(columns.domains) - DOMAINS_SHOWN
        ax.yaxis.label.set_text(f"{ax.get_ylabel()} · {more} rarer not shown")  # set_ylabel would move the label
    labels = []
    for (name, where), height, mean in zip(groups, heights, means, strict=True):
        text = f"{domain_label(name)} {mean:.2f} · {short_number(int(where.sum()))}"
        labels.append((height, text, palette.domain_colour(name)))
    label_ends(ax, labels)


def domain_dots(ax: Axes, columns: Columns, groups: Groups) -> tuple[list[float], list[float]]:
    """One row per domain, highest loss on top: documents as dots, their mean as a bar. Returns heights and means."""
    means = [last_mean(columns.loss[where], DOT_ROWS) for _, where in groups]
    heights = [float(rank) for rank in np.argsort(np.argsort(means, kind="stable"))]
    for (name, where), mean, height in zip(groups, means, heights, strict=True):
        colour, loss = palette.domain_colour(name), columns.loss[where]
        ax.plot(loss, np.full(loss.size, height), ls="none", marker="o", ms=8, mew=0, color=colour, alpha=0.4, gid=name)
        ax.plot([mean], [height], marker="|", ms=20, mew=3, color=palette.text_colour(colour), gid=f"mean {name}")
    ax.set_ylim(-0.7, max(len(groups), 1) - 0.3)
    ax.set_xlim(*robust_limits(columns.loss))
    number_axis(ax, "x", "nats per token")
    number_axis(ax, "y", "dots: documents · bar: mean · right: mean, documents")
    ax.set_yticks([])
    ax.grid(axis="x", color=palette.GRID, lw=0.9)
    return heights, means


def domain_curves(ax: Axes, columns: Columns, groups: Groups) -> list[float]:
    """Mean of each domain's documents around each step. Returns the mean of the last documents of each domain."""
    # With a fixed window, rare domains would move in leaps. 1 % of a domain's documents keeps the curves of a long run
    # smooth and apart.
    windows = [max(WINDOW, int(where.sum()) // 100) for _, where in groups]
    means = [
        draw_mean(ax, columns.step[where], columns.loss[where], window, palette.domain_colour(name), f"mean {name}")
        for (name, where), window in zip(groups, windows, strict=True)
    ]
    ax.set_ylim(*robust_limits(np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.lines])))
    step_axis(ax, columns.step)
    if max(windows) > WINDOW:
        over = f"1 % of documents (≥ {WINDOW})"
    else:
        over = f"{'up to ' if any(where.sum() < WINDOW for _, where in groups) else ''}{WINDOW} documents"
    number_axis(ax, "y", f"nats per token · mean of {over} · right: last mean, documents")
    return means


def draw_samples(ax: Axes, columns: Columns, samples: Samples) -> None:
    """Table of the last generated samples, newest first. Units are inches, because texts are wrapped in inches."""
    ax.set_axis_off()
    width, height = ax.bbox.width / DPI, ax.bbox.height / DPI
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    text_width = (width - 2.5) / 2 - 0.3
    lefts = (0.0, 1.2, 1.2 + text_width + 0.3, width)
    heads = ("step", "input: how the document opens", "output: what the model wrote", "accuracy")
    for left, head in zip(lefts, heads, strict=True):
        ax.text(left, -0.1, head, color=palette.MUTED, va="baseline", ha="right" if left == width else "left")
    if not samples:
        ax.text(0, 0.35, "no sample generated yet", color=palette.MUTED, gid="empty")
    for row, sample in enumerate(reversed(samples[-SAMPLES_SHOWN:])):
        top = row * height / SAMPLES_SHOWN
        ax.add_line(Line2D((0, width), (top, top), color=palette.GRID, lw=1))
        failed, accuracy = sample.get("error"), sample.get("accuracy")
        output = f"failed: {failed}" if failed else terminal.written(str(sample.get("output") or ""))
        share = f"{100 * accuracy:.1f} %" if isinstance(accuracy, (int, float)) and math.isfinite(accuracy) else "—"
        step = f"{sample['step']:,}" if isinstance(sample.get("step"), int) else "?"
        cells = (step, fit(sample.get("input", ""), text_width, 2), fit(output, text_width, 2), share)
        colours = (palette.INK, palette.MUTED, palette.ALARM if failed else palette.INK, palette.INK)
        for left, cell, colour, gid in zip(lefts, cells, colours, ("step", "input", "output", "accuracy"), strict=True):
            ax.text(
                left, top + 0.07, cell, color=colour, va="top", ha="right" if left == width else "left",
                family=MONO, linespacing=1.2, gid=f"{gid} {row}",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel and its place. Panels share the width of their `row` by `weight`; `left` and `gutter`: inches beside it.

    `{steps}` and `{samples}` in the title are replaced by how many are shown.
    """

    name: str
    title: str
    draw: Callable[[Axes, Columns, Samples], None]
    row: int
    weight: float
    gutter: float = 0.8
    left: float = LEFT


PANELS: list[Panel] = [
    Panel("loss", "Loss", draw_loss, row=0, weight=6.7),
    Panel("accuracy", "Next-token accuracy", draw_accuracy, row=0, weight=5.6),
    Panel("domains", "Loss by domain", draw_domains, row=0, weight=6.8, gutter=LABELS),
    Panel("recent", "Last {steps}", draw_recent, row=1, weight=6.7, gutter=2.1),
    Panel("cloud", "Loss against accuracy", draw_cloud, row=1, weight=4.6, gutter=1.15),
    Panel("throughput", "Throughput", draw_throughput, row=1, weight=4.0, gutter=0.85),
    Panel("learning_rate", "Learning rate", draw_learning_rate, row=1, weight=3.8, gutter=0.95),
    Panel("samples", "Last {samples}", draw_samples, row=2, weight=1, gutter=0.0, left=0.0),
]


# The picture ---------------------------------------------------------------------------------------------------------


def headline(columns: Columns, max_steps: int) -> list[tuple[str, str, str]]:
    """The big numbers: (number, name, explanation)."""
    done = len(columns)
    series = (columns.loss, 100 * columns.accuracy, columns.throughput)
    loss, accuracy, throughput = (last_mean(values, WINDOW) for values in series)
    bits, documents = columns.prequential_bits_per_byte(), int(columns.samples.sum())
    each = "one document per step" if documents == done else f"{documents:,} documents"
    over = f"mean of the last {min(WINDOW, done)} steps" if done > 1 else ("no step yet", "of a single step")[done]
    share = f"{100 * done / max_steps:.3g} % of {max_steps:,}" if max_steps > 0 else "no end set"

    def number(value: float, form: str, unit: str = "") -> str:
        return format(value, form) + unit if math.isfinite(value) else "—"

    return [
        (f"{done:,}", "optimizer steps", share),
        (number(loss, ".3f"), "loss, nats per token", over),
        (number(accuracy, ".1f", " %"), "next-token accuracy", over),
        (number(bits, ".3f"), "prequential bits per byte", "scored before learned"),
        (number(throughput, ",.0f"), "tokens per second", over),
        (short_number(int(columns.tokens.sum())), "tokens seen", each),
        *_noise(columns),
    ]


def _noise(columns: Columns) -> list[tuple[str, str, str]]:
    """The noise scale, if it is known."""
    found = noise.estimate(columns.grad_square, columns.grad_agreement)
    if found is None:
        return []
    return [(short_number(float(f"{found.value:.2g}")), "noise scale, documents", "where signal equals noise")]


def draw_headline(figure: Figure, columns: Columns, caption: Caption) -> None:
    """Title, subtitle and big numbers, above the panels."""
    width, height = SIZE
    left, right = MARGIN / width, 1 - MARGIN / width

    def place(x: float, inches: float, text: str, size: float, **how: Any) -> None:
        figure.text(x, inches / height, text, fontsize=size, va="baseline", **how)

    place(left, 13.45, printable(caption.title)[:90], 24, weight="bold", gid="title")
    place(left, 13.08, textwrap.shorten(printable(caption.subtitle), 190, placeholder=" …"), 13.5, color=palette.MUTED)
    numbers = headline(columns, caption.max_steps)
    for index, (number, what, how) in enumerate(numbers):
        x = left + (right - left) * index / len(numbers)
        place(x, 12.36, number, 30, color=palette.ACCENT, gid=what)
        place(x, 12.06, what, 13.5)
        place(x, 11.81, how, BODY, color=palette.MUTED)
    done = min(len(columns) / caption.max_steps, 1.0) if caption.max_steps > 0 else 0.0
    for end, colour in ((right, palette.GRID), (left + done * (right - left), palette.ACCENT)):
        y = 11.6 / height
        figure.add_artist(Line2D((left, end), (y, y), color=colour, lw=4, solid_capstyle="butt", gid="progress"))


def places(panels: Iterable[Panel]) -> list[tuple[Panel, tuple[float, float, float, float]]]:
    """The rectangle (left, bottom, width, height) of each panel's plot, in fractions of the figure."""
    panels = list(panels)
    placed = []
    for row, (bottom, height) in enumerate(ROWS):
        own = [panel for panel in panels if panel.row == row]
        inch = (SIZE[0] - 2 * MARGIN) / (sum(panel.weight for panel in own) or 1)
        left = MARGIN
        for panel in own:
            plot = panel.weight * inch - panel.left - panel.gutter
            box = ((left + panel.left) / SIZE[0], bottom / SIZE[1], plot / SIZE[0], height / SIZE[1])
            placed.append((panel, box))
            left += panel.weight * inch
    return placed


def draw(columns: Columns, samples: Samples, caption: Caption) -> Figure:
    """The chart of a run. `samples`: dicts with `step`, `input`, `output`, `accuracy` (fraction or None), and `error`
    if the generation failed; the last SAMPLES_SHOWN are shown."""
    shown = {
        "steps": plural(min(len(columns), RECENT), "step"),
        "samples": plural(min(len(samples), SAMPLES_SHOWN), "sample"),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, dpi=DPI)
        FigureCanvasAgg(figure)
        draw_headline(figure, columns, caption)
        for panel, box in places(PANELS):
            ax = figure.add_axes(box, gid=panel.name)
            x = -panel.left * DPI / ax.bbox.width
            ax.set_title(
                panel.title.format_map(shown), loc="left", fontsize=TITLE, fontweight="bold", x=x, y=1.0, pad=28
            )
            ax.grid(axis="y", color=palette.GRID, lw=0.9)
            ax.tick_params(length=0, labelsize=BODY, labelcolor=palette.MUTED, pad=5)
            panel.draw(ax, columns, samples)
            if not len(columns) and ax.axison:
                ax.set(xticks=[], yticks=[])
                ax.text(0.5, 0.5, "no step yet", transform=ax.transAxes, ha="center", color=palette.MUTED, gid="empty")
    return figure


def render(columns: Columns, samples: Samples, caption: Caption) -> bytes:
    """The chart as PNG."""
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):  # saving lays out ticks and texts
        figure = draw(columns, samples, caption)
        figure.savefig(content, format="png", dpi=DPI, facecolor=palette.PAPER, pil_kwargs={"compress_level": 3})
    return content.getvalue()


def write(folder: Path, columns: Columns, samples: Samples, caption: Caption) -> Path:
    """Write `training_step_NNNNNN.png` (NNNNNN: finished steps) and the same bytes as `training_latest.png`."""
    content = render(columns, samples, caption)
    path = folder / f"training_step_{len(columns):06d}.png"
    for target in (path, folder / "training_latest.png"):
        files.write_whole(target, content)
    return path
