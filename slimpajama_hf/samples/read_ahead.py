"""Samples are made in a thread of their own, while the model trains on the ones before."""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from slimpajama_hf.corpus.patience import Patience, StopRequested
from slimpajama_hf.screen import Waiting

Item = TypeVar("Item")

#: Seconds of waiting for the next item before the screen shows it, and between two looks at `stop`.
_LOOK_SECONDS = 0.05

#: Seconds of waiting before the screen says how much processor time the reading thread had.
LONG_WAIT_SECONDS = 2.0


class _Shelf(Generic[Item]):
    """What the thread that makes items and the one that takes them share."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.items: deque[Item] = deque()
        self.error: BaseException | None = None
        self.ended = self.closed = False
        self.change = threading.Condition()
        self.thread: threading.Thread | None = None
        self.clock: int | None = None
        """Clock of the thread's processor time. The thread sets it itself: a thread that has ended has no clock."""

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()


#: All open shelves, for `_close_all`.
_OPEN: weakref.WeakSet[_Shelf] = weakref.WeakSet()


def read_ahead(
    make: Callable[[Patience], Iterator[Item]],
    depth: int,
    patience_seconds: float,
    stop: Callable[[], bool],
    what: str = "waiting for the next document",
) -> Iterator[Item]:
    """Yield the items of `make(patience)`, up to `depth` of them made in advance. Its errors are raised in their place.

    The order is that of `make`: nothing depends on timing. While the next item is not ready, the screen shows what is
    waited for, and `stop()` is called 20 times a second. Once it is true, StopRequested is raised. The thread ends when
    this iterator is closed or forgotten (a request in progress ends by itself, within its time limit).
    """
    shelf: _Shelf[Item] = _Shelf(depth)
    patience = Patience(patience_seconds, lambda: shelf.closed or stop())
    shelf.thread = threading.Thread(target=_fill, args=(shelf, make, patience), name="read-ahead", daemon=True)
    _OPEN.add(shelf)
    shelf.thread.start()
    try:
        while True:
            with shelf.change:
                if not shelf.items and not shelf.ended:
                    shelf.change.wait(_LOOK_SECONDS)
                ready = bool(shelf.items) or shelf.ended
            if not ready:
                _wait(shelf, patience, stop, what)
            with shelf.change:
                item = shelf.items.popleft() if shelf.items else None
                shelf.change.notify_all()
            if item is None:
                if shelf.error is not None:
                    raise shelf.error
                return
            yield item
    finally:
        shelf.close()


def _wait(shelf: _Shelf, patience: Patience, stop: Callable[[], bool], what: str) -> None:
    began, cpu = time.monotonic(), _cpu_seconds(shelf)
    with Waiting(what) as waiting:
        while True:
            if stop():
                raise StopRequested
            waiting(patience.what or what + _why(time.monotonic() - began, _cpu_seconds(shelf) - cpu))
            with shelf.change:
                if shelf.items or shelf.ended:
                    return
                shelf.change.wait(_LOOK_SECONDS)


def _cpu_seconds(shelf: _Shelf[Item]) -> float:
    """Processor time that the thread of `shelf` has had; NaN if the system does not say (Unix does)."""
    if shelf.clock is None:
        # The thread has hardly begun.
        return 0.0 if hasattr(time, "pthread_getcpuclockid") else math.nan
    try:
        return time.clock_gettime(shelf.clock)
    except OSError:
        # The thread is gone.
        return math.nan


def _why(waited: float, cpu: float) -> str:
    """Say what the reading thread did during a long wait, judged by its processor time."""
    if waited < LONG_WAIT_SECONDS or math.isnan(cpu):
        return ""
    if cpu > waited / 2:
        return "; it is being read and cut"
    return f"; reading it has had {cpu:.1f}s of a processor: the disk is slow, or the machine is busy"


def _fill(shelf: _Shelf[Item], make: Callable[[Patience], Iterator[Item]], patience: Patience) -> None:
    """Run in the thread: make items until there are no more, an error comes, or nobody wants them."""
    try:
        if hasattr(time, "pthread_getcpuclockid"):
            shelf.clock = time.pthread_getcpuclockid(threading.get_ident())
        for item in make(patience):
            with shelf.change:
                while len(shelf.items) >= shelf.depth and not shelf.closed:
                    shelf.change.wait()
                if shelf.closed:
                    return
                shelf.items.append(item)
                shelf.change.notify_all()
    except BaseException as error:
        shelf.error = error
    finally:
        with shelf.change:
            shelf.ended = True
            shelf.change.notify_all()


@atexit.register
def _close_all() -> None:
    """Let the threads end before the interpreter does: one that is inside a library then may crash it. A thread that
    waits for a server cannot be hurried and is left behind."""
    shelves = list(_OPEN)
    for shelf in shelves:
        shelf.close()
    for shelf in shelves:
        if shelf.thread is not None:
            shelf.thread.join(timeout=0.5)
