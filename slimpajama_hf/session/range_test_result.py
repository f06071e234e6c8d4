"""The result of `--lr_find`, in words and as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimpajama_hf import files
from slimpajama_hf.record.columns import read_columns
from slimpajama_hf.training import range_test

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from slimpajama_hf.record.run_folder import RunFolder

CHART = "lr_find.png"

SIZE = (12.0, 6.75)  # inches
BOX = (0.075, 0.12, 0.89, 0.7)  # of the plot: left, bottom, width, height, as fractions of the picture
LABELS = 0.16  # fraction of the plot's height, at its bottom, that is kept for the names of the marked rates


def draw(found: range_test.Found, losses: np.ndarray) -> Figure:
    """Draw loss over rate and mark what was found. `losses`: nats per token of each step, (steps,)."""
    from slimpajama_hf import palette
    from slimpajama_hf.agg import Figure, FigureCanvasAgg, matplotlib
    from slimpajama_hf.views import drawing

    # isort: split
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure(figsize=SIZE, dpi=drawing.DPI)
        FigureCanvasAgg(figure)
        ax = figure.add_axes(BOX)
        left = -drawing.LEFT * drawing.DPI / ax.bbox.width
        ax.set_title("Loss at rising learning rates", loc="left", fontsize=20, weight="bold", x=left, y=1.0, pad=42)
        ax.grid(axis="y", color=palette.GRID, lw=0.9)
        ax.tick_params(length=0, labelsize=drawing.BODY, labelcolor=palette.MUTED, pad=5)
        ax.plot(found.rates, losses, "o", color=palette.POINT, ms=6, mew=0, alpha=0.65, gid="steps")
        ax.plot(found.rates, found.smoothed, color=palette.ACCENT, lw=2.5, gid="mean")
        ax.set_ylim(*_limits(found, losses))
        drawing.number_axis(ax, "y", "nats per token · dots: single documents, line: their average over neighbours")
        ax.set_xscale("log")
        ax.set_xlim(found.rates[0] / 1.2, found.rates[-1] * 1.2)
        ax.xaxis.set_major_locator(LogLocator(numticks=12))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: _short(rate)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("learning rate, the same number of steps in every decade")
        # The suggested rate is the lower one. Its name stands left of its line, the other name right of its own.
        for rate, name, side in ((found.suggested, "suggested", -1), (found.lowest, "the falling ends", 1)):
            if rate is not None:
                ax.axvline(rate, color=palette.INK, lw=1.2, ls=":" if side > 0 else "-", gid=name)
                ax.annotate(
                    f"{name}\n{rate:.2g}", (rate, 0.02), xycoords=("data", "axes fraction"), xytext=(8 * side, 0),
                    textcoords="offset points", ha="left" if side > 0 else "right", va="bottom", gid="name",
                    weight="bold" if side < 0 else "normal", zorder=5,
                    bbox={"facecolor": palette.PAPER, "edgecolor": "none", "pad": 2, "alpha": 0.85},
                )  # fmt: skip
    return figure


def _short(rate: float) -> str:
    """`1e-4`, `0.01`."""
    return f"{rate:g}" if rate >= 0.01 else f"{rate:.0e}".replace("e-0", "e-")


def _limits(found: range_test.Found, losses: np.ndarray) -> tuple[float, float]:
    """Bottom and top of the plot: the whole fall, the beginning of the rise, and room for names below."""
    falling = losses[: int(np.nanargmin(found.smoothed)) + 1] if np.isfinite(found.smoothed).any() else losses
    known, anywhere = falling[np.isfinite(falling)], losses[np.isfinite(losses)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.quantile(anywhere, 0.005), np.quantile(known, 0.99)
    high += 0.15 * (high - low) + 0.1
    return float(low - (high - low) * LABELS / (1 - LABELS)), float(high)


def conclude(folder: RunFolder, steps: int) -> list[str]:
    """Read the ledger of a test in its run folder and draw the curve. Returns the lines that say what was found."""
    from slimpajama_hf import palette
    from slimpajama_hf.agg import matplotlib
    from slimpajama_hf.views import drawing

    columns = read_columns(folder.ledger)
    rates = np.array([range_test.rate(step, steps) for step in range(len(columns))])
    if not len(rates):
        return ["        lr_find  no step was made"]
    found = range_test.read(rates, columns.loss)
    path: Path = folder.path / CHART
    content = io.BytesIO()
    with matplotlib.rc_context(drawing.STYLE):
        draw(found, columns.loss).savefig(content, format="png", dpi=drawing.DPI, facecolor=palette.PAPER)
    files.write_whole(path, content.getvalue())
    if found.suggested is None or found.lowest is None:
        said = f"the loss did not fall clearly in {len(columns):,} steps"
    else:
        said = (
            f"the loss falls up to a rate of {found.lowest:g}; half of that is a rate to stay at: "
            f"--learning_rate {found.suggested:g}"
        )
    return [f"        lr_find  {said}", f"          curve  {path}"]
