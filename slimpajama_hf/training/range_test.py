"""`--lr_find`: finds a learning rate by a short run whose rate rises from very low to far too high.

This is the range test of Smith 2017 (arXiv 1506.01186, section 3.3) with the model, data, optimizer and clipping of the
run itself. At batch size 1 the loss of a document says little, so losses are averaged over neighbouring steps first.
`session/range_test_result.py` prints and draws the result.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LOWEST, HIGHEST = 1e-6, 0.3
#: A run stays at its rate, so the rate must be below the one at which the loss stops falling. This factor is from one
#: model: the loss of the 5.3M GPT-2 fell up to 5e-4 in a test, and 3e-4 learned most from 2,000 documents (of 5e-5,
#: 3e-4, 1e-3, 2.5e-3).
SAFETY = 2.0


def rate(step: int, steps: int) -> float:
    """The learning rate of step `step` of `steps`: every decade has equally many steps."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / max(steps - 1, 1))


@dataclasses.dataclass
class Found:
    """The result of a test; rates as for --learning_rate."""

    rates: np.ndarray
    """The rate of each step, (steps,)."""
    smoothed: np.ndarray
    """Loss averaged over neighbouring steps, nats per token, (steps,)."""
    lowest: float | None
    """The rate at which the loss stops falling; None if it did not fall."""
    suggested: float | None


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Averages under a Gaussian of standard deviation `width` steps, without values that are not finite."""
    steps = np.arange(len(values))
    good = np.isfinite(values)
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / width) ** 2) * good
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(good, values, 0.0)) / weights.sum(axis=1)


def read(rates: np.ndarray, losses: np.ndarray) -> Found:
    """Evaluate the losses of a test."""
    smoothed = smooth(losses, max(len(losses) / 40, 1.0))
    if not np.isfinite(smoothed).any():
        return Found(rates, smoothed, None, None)
    place = int(np.nanargmin(smoothed))
    begin = float(np.nanmean(smoothed[: max(len(smoothed) // 10, 1)]))
    # Noise alone makes some loss the lowest, so it must be well below the losses at the beginning. Losses after the
    # lowest one scatter too much to be counted.
    apart = np.abs(losses - smoothed)[: place + 1]
    scatter = 1.4826 * float(np.nanmedian(apart)) / max(len(losses) / 20, 1.0) ** 0.5
    if begin - smoothed[place] < 4 * scatter:
        return Found(rates, smoothed, None, None)
    # Rounded first: the suggested rate is half of the rate that is printed.
    lowest = float(f"{rates[place]:.2g}")
    return Found(rates, smoothed, lowest, float(f"{lowest / SAFETY:.2g}"))
