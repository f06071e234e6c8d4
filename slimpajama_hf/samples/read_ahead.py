"""Samples made ready in a thread of their own while the model trains on the one before."""

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

#: Seconds of waiting for the next item after which the screen shows it, and between two looks at `stop`.
_LOOK_SECONDS = 0.05

#: Seconds of waiting after which the screen says what the thread that reads had of a processor.
LONG_WAIT_SECONDS = 2.0


class _Shelf(Generic[Item]):
    """What stands between the thread that makes items and the one that takes them."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.items: deque[Item] = deque()
        self.error: BaseException | None = None
        self.ended = self.closed = False
        self.change = threading.Condition()
        self.thread: threading.Thread | None = None
        self.clock: int | None = None
        """Of the thread's processor time. The thread asks for it itself: one that is gone must not be asked about."""

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()


#: Those that are open, for `_close_all`.
_OPEN: weakref.WeakSet[_Shelf] = weakref.WeakSet()


def read_ahead(
    make: Callable[[Patience], Iterator[Item]],
    depth: int,
    patience_seconds: float,
    stop: Callable[[], bool],
    what: str = "waiting for the next document",
) -> Iterator[Item]:
    """The items of `make(patience)`, up to `depth` of them made before they are asked for; its errors in their place.

    The order is that of `make`: nothing depends on timing. While the next item is not ready the screen shows what is
    being waited for, and `stop()` is asked 20 times a second: once it is true, StopRequested is raised. The thread
    ends when this iterator is closed or forgotten (a request that is on ends by itself, within its time limit).
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
    """Processor time that the thread of `shelf` has had; NaN where the system does not say (it is Unix that does)."""
    if shelf.clock is None:
        # It has hardly begun.
        return 0.0 if hasattr(time, "pthread_getcpuclockid") else math.nan
    try:
        return time.clock_gettime(shelf.clock)
    except OSError:
        # The thread is gone.
        return math.nan


def _why(waited: float, cpu: float) -> str:
    """Of a long wait, what the thread that reads did meanwhile, as far as its processor time tells."""
    if waited < LONG_WAIT_SECONDS or math.isnan(cpu):
        return ""
    if cpu > waited / 2:
        return "; it is being read and cut"
    return f"; reading it has had {cpu:.1f}s of a processor: the disk is slow, or the machine is busy"


def _fill(shelf: _Shelf[Item], make: Callable[[Patience], Iterator[Item]], patience: Patience) -> None:
    """The thread: make items until there are no more, there is an error, or nobody wants them."""
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
    """Let the threads end before the interpreter does: one that is inside a library then may bring all down. One that
    waits for a server cannot be hurried, and is left behind."""
    shelves = list(_OPEN)
    for shelf in shelves:
        shelf.close()
    for shelf in shelves:
        if shelf.thread is not None:
            shelf.thread.join(timeout=0.5)
