"""How noisy the gradient of one document is: the gradient noise scale, measured as training goes.

The noise scale B = tr(S) / |G|^2 is the batch at which noise and signal of the gradient are equal (McCandlish et al.
2018, arXiv 1812.06162, section 2.2): far below it, twice the batch is worth twice the steps. Two documents' gradients
at the same weights tell signal from noise: their product is |G|^2 on average, the square of one is |G|^2 + tr(S). So
every `STEPS_BETWEEN` steps the gradients of the next documents are taken too, at the weights of the step, and thrown
away.

Averages over the steps of the run, as AdamW's first moment is one, are no substitute: at a constant rate successive
steps undo each other's noise, and such an average is shorter than as many independent gradients would make it
(measured here: 1 to 2 % below 1/19 of a single one's square where the signal alone adds 42 %).
"""

from __future__ import annotations

import dataclasses

import numpy as np

#: A measurement every so many steps, of so many documents: the step's own and the next. About 1 % of the run.
STEPS_BETWEEN, DOCUMENTS = 500, 8
#: Measurements that an estimate is made of, at most and at least.
WINDOW, FEWEST = 20, 3


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """In documents, with the bounds that two standard errors of the signal leave; `high` None: not bounded."""

    value: float
    low: float
    high: float | None


def estimate(squares: np.ndarray, agreements: np.ndarray) -> NoiseScale | None:
    """From the columns `grad_square` and `grad_agreement` of a ledger, (steps,), NaN where nothing was measured.

    None while there are too few measurements, or no signal stands out of them.
    """
    measured = np.isfinite(squares) & np.isfinite(agreements)
    squares, agreements = squares[measured][-WINDOW:], agreements[measured][-WINDOW:]
    if len(squares) < FEWEST:
        return None
    own, signal = float(squares.mean()), float(agreements.mean())
    error = float(agreements.std(ddof=1)) / len(agreements) ** 0.5
    if signal <= 2 * error or signal >= own:
        return None

    def scale(of: float) -> float:
        return max(own - of, 0.0) / of

    return NoiseScale(scale(signal), scale(signal + 2 * error), scale(signal - 2 * error))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def in_words(found: NoiseScale, batch: int = 8) -> str:
    """What a noise scale means for a run of one document a step, in a sentence."""
    # To learn as much, steps of b documents need in proportion 1 + b / B of them (McCandlish et al. 2018, eq. 2.11).
    more = (1 + batch / found.value) / (1 + 1 / found.value) - 1
    bound = "noise-bound" if found.value > 3 else "signal-bound" if found.value < 1 / 3 else "in between"
    high = _number(found.high) if found.high is not None else "any number"
    return (
        f"{_number(found.value)} documents ({_number(found.low)} to {high}; {bound}): steps of {batch} would need "
        f"about {more:.0%} more documents to learn as much, in {(1 + more) / batch:.2g} of the steps"
    )
