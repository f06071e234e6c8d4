"""`--lr_find`: which learning rate, by a short run at rates that rise from hardly any to far too much.

The range test of Smith 2017 (arXiv 1506.01186, section 3.3), on the run's own stream: model, data, optimizer and
clipping are those of the run that is asked about. At batch size 1 a document's loss says little, so losses are
averaged over their neighbours before anything is read from them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.record.columns import read_columns

LOWEST, HIGHEST = 1e-6, 0.3
CHART = "lr_find.png"
#: A run stays at its rate, so it has to be below the one where the falling ends. By how much, from one model: the 5.3M
#: GPT-2 fell up to 5e-4 in a test, and learned most from 2,000 documents at 3e-4 (of 5e-5, 3e-4, 1e-3, 2.5e-3).
SAFETY = 2.0


def rate(step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: as many steps in every decade."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / max(steps - 1, 1))


@dataclasses.dataclass
class Found:
    """What the curve says; rates as --learning_rate takes them."""

    rates: np.ndarray
    """Of each step, (steps,)."""
    smoothed: np.ndarray
    """Loss, averaged over neighbouring steps, nats per token, (steps,)."""
    lowest: float | None
    """The rate where the falling ends; None where the loss did not fall."""
    suggested: float | None


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Averages under a Gaussian of standard deviation `width` steps; what is not finite counts nothing."""
    steps = np.arange(len(values))
    good = np.isfinite(values)
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / width) ** 2) * good
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(good, values, 0.0)) / weights.sum(axis=1)


def read(rates: np.ndarray, losses: np.ndarray) -> Found:
    """What to make of the losses of a test."""
    smoothed = smooth(losses, max(len(losses) / 40, 1.0))
    if not np.isfinite(smoothed).any():
        return Found(rates, smoothed, None, None)
    place = int(np.nanargmin(smoothed))
    begin = float(np.nanmean(smoothed[: max(len(smoothed) // 10, 1)]))
    # Noise alone makes some place the lowest: it has to be well below where it began.
    # Up to there: behind it losses jump about.
    apart = np.abs(losses - smoothed)[: place + 1]
    scatter = 1.4826 * float(np.nanmedian(apart)) / max(len(losses) / 20, 1.0) ** 0.5
    if begin - smoothed[place] < 4 * scatter:
        return Found(rates, smoothed, None, None)
    lowest = float(rates[place])
    return Found(rates, smoothed, lowest, float(f"{lowest / SAFETY:.1g}"))


def draw(found: Found, losses: np.ndarray, path: Path) -> None:
    """The curve: loss over rate, what was found marked."""
    from slimpajama_hf import palette
    from slimpajama_hf.agg import Figure, FigureCanvasAgg

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.plot(found.rates, losses, ".", color=palette.GRID, markersize=4, label="each document")
    ax.plot(found.rates, found.smoothed, color=palette.ACCENT, linewidth=2.5, label="averaged over neighbours")
    low, high = np.nanmin(found.smoothed), np.nanmax(found.smoothed[: len(losses) // 2])
    ax.set_ylim(low - 0.35 * (high - low), high + 0.5 * (high - low))
    for value, name in ((found.lowest, "the falling ends"), (found.suggested, "suggested")):
        if value is not None:
            ax.axvline(value, color=palette.MUTED, linewidth=1, linestyle=":")
            ax.annotate(
                f"{name}\n{value:.1g}", (value, 0.02), xycoords=("data", "axes fraction"), xytext=(6, 4),
                textcoords="offset points", color=palette.MUTED,
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("loss, nats per token")
    ax.set_title("Learning rate range test", loc="left", fontweight="bold")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def conclude(folder: Any, steps: int) -> list[str]:
    """Read the ledger of a test in its run folder, draw the curve; the lines that say what was found."""
    columns = read_columns(folder.ledger)
    rates = np.array([rate(step, steps) for step in range(len(columns))])
    found = read(rates, columns.loss)
    path = folder.path / CHART
    draw(found, columns.loss, path)
    if found.suggested is None or found.lowest is None:
        more = f"the loss did not fall clearly in {len(columns):,} steps"
        return [f"        lr_find  {more}", f"          curve  {path}"]
    return [
        f"        lr_find  the loss falls up to a rate of {found.lowest:.1g}; half of that is a rate to stay at: "
        f"--learning_rate {found.suggested:g}",
        f"          curve  {path}",
    ]
