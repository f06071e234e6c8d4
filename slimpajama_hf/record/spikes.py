"""Finds losses that are unusual for their time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class LossSpikes:
    """Finds losses that are far above the 200 before them, in robust standard deviations.

    The standard deviation is estimated as the interquartile range over 1.349 (that of a normal distribution), so that
    one spike does not hide the next.
    """

    WINDOW = 200
    FEWEST = 50
    #: Documents differ a lot at batch size 1; in an ordinary run about one step in 10,000 is beyond this.
    THRESHOLD = 5.0

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        for loss in losses:
            self._remember(loss)

    def _remember(self, loss: float) -> None:
        self._recent.append(loss)
        insort(self._sorted, loss)
        if len(self._recent) > self.WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]

    def score(self, loss: float) -> float | None:
        """The robust z-score of `loss` if it is a spike, else None. Remembers `loss` (nats per token, finite)."""
        spike, count = None, len(self._sorted)
        if count >= self.FEWEST:
            low, middle, high = (self._sorted[count * quarter // 4] for quarter in (1, 2, 3))
            scale = max(high - low, 1e-3) / 1.349
            z = (loss - middle) / scale
            spike = round(z, 2) if z > self.THRESHOLD else None
        self._remember(loss)
        return spike
