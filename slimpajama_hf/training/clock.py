"""Measures training time, without charts, samples, evaluation and saving."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass
class Pause:
    """How long the clock stood still, in `seconds`; known when it goes on."""

    seconds: float = 0.0


class TrainingClock:
    """Counts training time. It is paused during charts, samples, evaluation and saving."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lap_start = now()
        self._paused_in_lap = 0.0
        self.training_seconds = 0.0
        """Training time since the start of this session."""
        self.paused_seconds = 0.0
        """Time in pauses, up to the last lap."""
        self.seconds_of: dict[str, float] = {}
        """Of that time, what has a name: `scoring` held-out documents, `saving` checkpoints."""

    def start(self) -> None:
        """Training begins now; earlier time does not count."""
        self._lap_start, self._paused_in_lap = self._now(), 0.0

    @contextlib.contextmanager
    def paused(self, what: str = "") -> Iterator[Pause]:
        """Context whose time does not count as training. Its length is in the `Pause` it gives, and is added to
        `seconds_of` under the name `what`."""
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
