"""How noisy the gradient of one step is: the gradient noise scale, estimated as training goes at almost no cost.

The noise scale B = tr(S) / |G|^2 is the batch at which noise and signal of the gradient are equal (McCandlish et al.
2018, arXiv 1812.06162, section 2.2, appendix A): far below it, twice the batch is worth twice the steps. Two batch
sizes tell noise from signal, since |g|^2 of a batch of b is |G|^2 + tr(S) / b on average. The small one is the step's
own gradient; the large one is AdamW's first moment, an average over about (1 + beta1) / (1 - beta1) steps that is
there anyway. Both as the optimizer sees them: clipped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

#: The first moment is looked at every so many steps: one pass over it.
STEPS_BETWEEN = 10
#: Rows that an estimate is made of, at most and at least.
WINDOW, FEWEST = 1000, 200


class NoiseScale:
    """The noise scale over the last `WINDOW` steps. `max_norm`: where gradients are clipped (0: nowhere).

    `rows`: those of the ledger before a resume; with them the estimates are those of a run that was never stopped.
    """

    def __init__(self, beta1: float, max_norm: float, rows: Iterable[dict[str, Any]] = ()) -> None:
        # Sum of the squared weights of an exponential average: one over the gradients that it is worth.
        self._of_average = (1 - beta1) / (1 + beta1)
        self._max_norm = max_norm or math.inf
        self._own: deque[float] = deque(maxlen=WINDOW)
        self._average: deque[float] = deque(maxlen=WINDOW // STEPS_BETWEEN)
        for row in rows:
            self.add(row["grad_norm"], row.get("momentum_norm"), 1)

    def add(self, grad_norm: float | None, momentum_norm: float | None, samples: int) -> float | None:
        """A step's gradient norm and, every `STEPS_BETWEEN` steps, that of the first moment without its bias.

        Returns the noise scale in samples (a step has `samples`) where the first moment is given and there is enough;
        None too where no signal stands out of the noise.
        """
        if grad_norm is not None and math.isfinite(grad_norm):
            self._own.append(min(grad_norm, self._max_norm) ** 2)
        if momentum_norm is None or not math.isfinite(momentum_norm):
            return None
        self._average.append(momentum_norm**2)
        if len(self._own) < FEWEST or len(self._average) < FEWEST // STEPS_BETWEEN:
            return None
        own, average = math.fsum(self._own) / len(self._own), math.fsum(self._average) / len(self._average)
        noise = (own - average) / (1 - self._of_average)
        signal = own - noise
        if noise <= 0 or signal <= 0:
            return None
        return float(f"{samples * noise / signal:.4g}")


def in_words(noise_scale: float, samples: int, batch: int = 8) -> str:
    """What a noise scale (in samples) means for steps of `samples` samples, in a sentence."""
    number = f"{noise_scale:,.0f}" if noise_scale >= 10 else f"{noise_scale:.1f}"
    # To learn as much, steps of b need in proportion 1 + b / B of the samples (McCandlish et al. 2018, eq. 2.11).
    more = (1 + batch * samples / noise_scale) / (1 + samples / noise_scale) - 1
    bound = (
        "noise-bound" if noise_scale > 3 * samples else "signal-bound" if noise_scale < samples / 3 else "in between"
    )
    return (
        f"{number} documents ({bound}): steps of {batch} times as many would need about {more:.0%} more documents to "
        f"learn as much, in {(1 + more) / batch:.2g} of the steps"
    )
