"""Training time, without charts, samples, evaluation and saving."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass
class Pause:
    """`seconds` that the clock stood still, once it goes on."""

    seconds: float = 0.0


class TrainingClock:
    """Counts training time: charts, samples, evaluation and saving happen while it is paused."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lap_start = now()
        self._paused_in_lap = 0.0
        self.training_seconds = 0.0
        """Training time since the start of this session."""
        self.paused_seconds = 0.0
        """Time spent otherwise."""
        self.seconds_of: dict[str, float] = {}
        """Of that, what has a name: `scoring` held-out documents, `saving` checkpoints."""

    def start(self) -> None:
        """Training begins now: what came before does not count."""
        self._lap_start, self._paused_in_lap = self._now(), 0.0

    @contextlib.contextmanager
    def paused(self, what: str = "") -> Iterator[Pause]:
        """What is done meanwhile does not count; how long it took stands in what this gives, and under the name `what`
        in `seconds_of`."""
        start, pause = self._now(), Pause()
        try:
            yield pause
        finally:
            pause.seconds = self._now() - start
            self._paused_in_lap += pause.seconds
            if what:
                self.seconds_of[what] = self.seconds_of.get(what, 0.0) + pause.seconds

    def lap(self) -> float:
        """Training seconds since the last lap."""
        now = self._now()
        seconds = max(now - self._lap_start - self._paused_in_lap, 1e-9)
        self.paused_seconds += self._paused_in_lap
        self._lap_start, self._paused_in_lap = now, 0.0
        self.training_seconds += seconds
        return seconds
