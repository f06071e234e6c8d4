"""How long a stream waits for a server that does not answer, and what it shows in the meantime."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.screen import Waiting, format_time

#: Seconds that a server may fail in a row before the stream gives up (`--stream_patience`).
SECONDS = 600.0

LONGEST_PAUSE_SECONDS = 30.0
#: A server may ask for more (`Retry-After`), up to this.
LONGEST_PAUSE_ASKED_SECONDS = 120.0
#: Seconds between two looks, during a pause, whether the run must stop.
_LOOK_SECONDS = 0.2


class StopRequested(Exception):
    """The run was asked to stop while it waited for its next sample. It is no failure: what was learned is whole."""


class OutOfPatience(UserError):
    """A server failed for longer than the run may wait. `__cause__` is the last failure."""


class Patience:
    """Waits between two tries: 1, 2, 4 ... 30 s, with jitter, until `seconds` of failure in a row are over.

    During a pause `stop()` is called every 0.2 s, and StopRequested is raised once it is true. `what` says what is
    waited for ("" while all is well); with `visible` it is on screen too. One object per reader: not for threads.
    """

    def __init__(
        self, seconds: float = SECONDS, stop: Callable[[], bool] = lambda: False, visible: bool = False
    ) -> None:
        self.seconds, self.stop, self.visible = seconds, stop, visible
        self.what = ""
        self._tries = 0
        self._since = 0.0
        # Its own generator: a draw from the global one would change the run.
        self._draw = random.Random()

    def __reduce__(self) -> tuple[Any, ...]:
        # `datasets` hashes the arguments of a generator. Callables do not belong in the hash.
        return Patience, (self.seconds,)

    def __deepcopy__(self, memory: dict[int, Any]) -> Patience:
        return self

    def succeeded(self) -> None:
        """A try succeeded: the next failure counts as the first."""
        self._tries, self.what = 0, ""

    def failed(
        self, what: str, why: str, error: BaseException, began: float, asked_seconds: float | None = None
    ) -> None:
        """Wait after a failed try at `what` that began at `began` (`time.monotonic`). `asked_seconds`: server's wish.

        Raises OutOfPatience when the time is over, and StopRequested when the run must stop.
        """
        if self._tries == 0:
            self._since = began
        self._tries += 1
        gone = time.monotonic() - self._since
        if self.stop():
            raise StopRequested
        if gone >= self.seconds:
            tries = "1 try" if self._tries == 1 else f"{self._tries} tries"
            raise OutOfPatience(
                f"{what}: {why}; {tries} in {format_time(gone)}. The run can be resumed when it answers again "
                "(--stream_patience SECONDS waits longer)"
            ) from error
        pause = min(2.0 ** min(self._tries - 1, 10), LONGEST_PAUSE_SECONDS) * self._draw.uniform(0.75, 1.0)
        if asked_seconds is not None:
            pause = max(pause, min(asked_seconds, LONGEST_PAUSE_ASKED_SECONDS))
        # The last try comes exactly when the time is over, not later.
        self._pause(min(pause, self.seconds - gone), f"{what}: {why}")

    def _pause(self, seconds: float, what: str) -> None:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - (time.monotonic() - self._since)))
        end = time.monotonic() + seconds
        with Waiting(what) if self.visible else contextlib.nullcontext() as waiting:
            while (left := end - time.monotonic()) > 0:
                self.what = f"{what}; failing since {since}, try {self._tries + 1} in {left:.0f} s"
                if waiting is not None:
                    waiting(self.what)
                if self.stop():
                    raise StopRequested
                time.sleep(min(_LOOK_SECONDS, left))
        self.what = f"{what}; failing since {since}, try {self._tries + 1} is on"
