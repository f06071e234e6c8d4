"""Progress bars on stderr that fit any width: one for training, and one for anything else that is counted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from slimpajama_hf import screen
from slimpajama_hf.screen import SCREEN, format_clock, format_time, say

#: Seconds between two lines of progress where there is no terminal.
SECONDS_BETWEEN_LINES = 10.0
#: Seconds before the first line of a `Counting` where there is no terminal.
SECONDS_TO_FIRST_LINE = 2.0
#: Seconds between two updates of a bar in a terminal.
SECONDS_BETWEEN_PICTURES = 0.2

#: Characters of the bar itself: without a limit on the width, and at least.
CELLS, FEWEST_CELLS = 10, 3

#: Parts of a line, in the order in which they are dropped when it is too narrow. The other parts are shown in full.
LEFT_OUT_FIRST = ("times", "tps", "bar", "label", "counts", "percent", "eta", "lr", "acc", "loss")


def line(
    label: str,
    done: int,
    total: int,
    times: str = "",
    numbers: dict[str, str] | None = None,
    columns: int | None = None,
    cells: str = " ▏▎▍▌▋▊▉█",
    share: float | None = None,
) -> str:
    """Return a line of progress, such as:

    `Training:  24%|███ | 2400/10000 [12:30<37:45, loss=2.3456, acc=28.3%, tps=34.2, lr=1.00e-03, eta=37.8m]`

    It has at most `columns` characters: parts are dropped in the order of `LEFT_OUT_FIRST`, and none is shortened.
    With None it has all parts and a bar of 10 cells. `share`: fraction done, if that is not `done / total`.
    """
    share = min(done / total, 1.0) if share is None and total else min(share or 0.0, 1.0)
    numbers = numbers or {}
    out: set[str] = set()
    for leave in (None, *LEFT_OUT_FIRST):
        if leave is not None:
            out.add(leave)
        left = f"{label}: " * ("label" not in out) + f"{math.floor(100 * share + 1e-9):3d}%" * ("percent" not in out)
        right = f"{done}/{total} " * ("counts" not in out)
        inner = [times] * bool(times and "times" not in out)
        inner += [f"{name}={value}" for name, value in numbers.items() if name not in out]
        right = (right + (f"[{', '.join(inner)}]" if inner else "")).rstrip()
        if "bar" in out:
            found = f"{left} {right}".strip()
            room = 0
        else:
            room = CELLS if columns is None else columns - len(left) - len(right) - 3
            found = f"{left}|{_drawn(share, room, cells)}| {right}".rstrip()
        if columns is None or (("bar" in out or room >= FEWEST_CELLS) and len(found) <= columns):
            return found
    return ""


def _drawn(share: float, width: int, cells: str) -> str:
    """The bar itself, `width` characters wide. `cells`: the characters for one cell, from empty to full."""
    parts = len(cells) - 1
    full, part = divmod(int(share * max(width, 0) * parts), parts)
    return (cells[-1] * full + (cells[part] if part else "")).ljust(max(width, 0), cells[0])


def training_numbers(
    loss: float, accuracy: float, tokens_per_second: float, learning_rate: float, eta_seconds: float
) -> dict[str, str]:
    """The numbers shown after the bar: `loss=2.3456, acc=28.3%, tps=34.2, lr=1.00e-03, eta=37.8m`."""
    return {
        "loss": f"{loss:.4f}",
        "acc": f"{accuracy:.1%}",
        "tps": f"{tokens_per_second:.1f}",
        "lr": f"{learning_rate:.2e}",
        "eta": format_time(eta_seconds),
    }


class TrainingBar:
    """The progress bar of training, with the numbers of the last step.

    In a terminal it is a tqdm bar; in a pipe or a log file it writes one line every 10 seconds. Throughput and time
    left are computed from the steps of this session alone, so they are right at once after a resume.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.first, self.done = total, done, done
        self._clock = clock
        self._start = clock()
        self._next_line = 0.0
        self._tokens, self._seconds = 0, 0.0
        self._last: tuple[float, float, float] | None = None
        self._shown = done
        self._bar: Any = None
        if screen.is_terminal():
            self._bar = _tqdm(self)
            SCREEN.bar = self._bar

    def update(self, loss: float, accuracy: float, learning_rate: float, tokens: int, seconds: float) -> None:
        """Count one more step. `seconds`: the training time that it took."""
        self.done += 1
        self._tokens += tokens
        self._seconds += seconds
        self._last = (loss, accuracy, learning_rate)
        if self._bar is not None:
            self._bar.update(1)
        elif self._clock() >= self._next_line or self.done == self.total:
            self._next_line = self._clock() + SECONDS_BETWEEN_LINES
            self._show_line()

    def _show_line(self) -> None:
        self._shown = self.done
        say(self.line())

    def line(self, columns: int | None = None, **how: Any) -> str:
        """The line as it is now."""
        times = format_clock(self._clock() - self._start)
        numbers = {}
        if self._last is not None:
            times += f"<{format_clock(self._eta())}"
            loss, accuracy, learning_rate = self._last
            rate = self._tokens / self._seconds if self._seconds else 0.0
            numbers = training_numbers(loss, accuracy, rate, learning_rate, self._eta())
        return line("Training", self.done, self.total, times, numbers, columns, **how)

    def _eta(self) -> float:
        """Seconds left at the mean step time of this session."""
        return self._seconds / max(self.done - self.first, 1) * (self.total - self.done)

    def close(self) -> None:
        """Leave the last step's numbers on the screen."""
        if self._bar is not None:
            SCREEN.bar = None
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self.done > self._shown:
            self._show_line()


def _tqdm(bar: TrainingBar) -> Any:
    """A tqdm bar that shows `bar.line()`. tqdm decides when to draw it, and writes other lines above it."""
    from tqdm import tqdm

    class Drawn(tqdm):
        def __str__(self) -> str:
            # tqdm would cut its own line at the edge of the terminal, in the middle of a number.
            how = {"cells": " " + self.ascii} if isinstance(self.ascii, str) else {"cells": " #"} if self.ascii else {}
            return bar.line(screen.columns() - 1, **how)

    return Drawn(file=SCREEN, total=bar.total, initial=bar.done, mininterval=SECONDS_BETWEEN_PICTURES, ncols=10_000)


class Counting:
    """A progress bar for anything that is counted: `Scoring held-out documents:  28%|██ | 57/200 [0:03<0:08]`.

    In a terminal it redraws one line; elsewhere it writes a line after 2 seconds, then every 10 and at the end.
    """

    def __init__(self, label: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._clock = label, total, clock
        self._terminal = screen.is_terminal()
        self._start = self._next = 0.0
        self._shown = False
        self._last: tuple[int, float | None] = (0, None)

    def __enter__(self) -> Counting:
        self._start = self._clock()
        self._next = self._start + (0.0 if self._terminal else SECONDS_TO_FIRST_LINE)
        self(0)
        return self

    def __call__(self, done: int, share: float | None = None) -> None:
        """Show that `done` are done. `share`: fraction done, if that is not `done / total`."""
        self._last = (done, share)
        if self._clock() >= self._next:
            self._next = self._clock() + (SECONDS_BETWEEN_PICTURES if self._terminal else SECONDS_BETWEEN_LINES)
            self._show()

    def _show(self) -> None:
        self._shown = True
        done, share = self._last
        elapsed = self._clock() - self._start
        part = share if share is not None else done / self._total if self._total else 0.0
        times = format_clock(elapsed) + (f"<{format_clock(elapsed * (1 / part - 1))}" if 0 < part <= 1 else "")
        if self._terminal:
            screen.show_in_place(line(self._label, done, self._total, times, columns=screen.columns() - 1, share=share))
        else:
            say(line(self._label, done, self._total, times, share=share))

    def __exit__(self, *error: object) -> None:
        if self._terminal and self._shown:
            screen.clear_line()
        elif self._shown and error[0] is None:
            self._show()
