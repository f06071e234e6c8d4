"""`--lr_find`: which learning rate, by a short run at rates that rise from hardly any to far too much.

The range test of Smith 2017 (arXiv 1506.01186, section 3.3), on the run's own stream: model, data, optimizer and
clipping are those of the run that is asked about. At batch size 1 a document's loss says little, so losses are
averaged over their neighbours before anything is read from them. `session/range_test_result.py` says and draws what
was found.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LOWEST, HIGHEST = 1e-6, 0.3
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
    # Two digits, as they are said: the half of what is said is what is suggested.
    lowest = float(f"{rates[place]:.2g}")
    return Found(rates, smoothed, lowest, float(f"{lowest / SAFETY:.2g}"))
