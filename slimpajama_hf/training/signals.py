"""Signals that ask a run to end or to save: noted at once, obeyed between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from slimpajama_hf import child, screen


def can_be_caught() -> bool:
    """Whether this thread may handle signals; in Python only the main thread may."""
    return threading.current_thread() is threading.main_thread()


class StopSignals:
    """Context that notes SIGINT, SIGTERM and SIGHUP in `received`. After any of them SIGINT or SIGTERM exits at once.

    Outside the main thread signals are not handled, and the screen says so.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.save_requested = False
        """Set by SIGUSR1: save a checkpoint after this step and go on."""
        self.shared = False
        """Whether all processes must stop and save at the same step: then only `agreed` and `save_agreed` count."""
        self.agreed: signal.Signals | None = None
        self.save_agreed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if not can_be_caught():
            screen.say(
                "this run is in a thread: Ctrl-C and SIGTERM are not caught, so they save nothing; after them "
                "--resume_from_checkpoint true goes on from the last checkpoint"
            )
            return self
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note_save)
        _end_with_launcher()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGHUP:
                # The launcher or the terminal goes away while the run ends.
                return
            os._exit(128 + number)
        self.received = signal.Signals(number)
        name = "Ctrl-C" if number == signal.SIGINT else self.received.name
        screen.say(f"\n{name}: stopping after this step; once more to exit at once, without saving")

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True

    def to_stop(self) -> bool:
        """Whether the run ends after this step."""
        return (self.agreed if self.shared else self.received) is not None

    def take_save(self) -> bool:
        """Whether a checkpoint is to be saved after this step; True once per request."""
        if self.shared:
            asked, self.save_agreed = self.save_agreed, False
        else:
            asked, self.save_requested = self.save_requested, False
        return asked

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, else 0."""
        return 0 if self.received is None else 128 + self.received


def _end_with_launcher() -> None:
    """Under `accelerate launch` (Linux only), treat the launcher's death as SIGHUP. The launcher passes no signal on
    (accelerate launch.py, `simple_launcher`), so after `kill <launcher>` this process would train on alone."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        child.end_with_parent(signal.SIGHUP)
