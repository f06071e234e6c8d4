"""Whose turn it is: what draws and pushes leaves the processor to training, until training waits for it."""

from __future__ import annotations

import contextlib
import os


def stand_back() -> None:
    """Take only the processor time that training leaves: its threads wait for each other many times a step, and one
    that is pushed aside for a chart holds up all. Threads and processes that are started later inherit it."""
    with contextlib.suppress(OSError):
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.nice(19)


def come_forward(process: int) -> None:
    """Training is over and waits for the process with this number: all of its threads take their turn from here on,
    whatever else the machine does.

    A user who may not raise a priority (RLIMIT_NICE, sched(7)) waits for what others leave.
    """
    if not hasattr(os, "SCHED_OTHER"):
        return
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{process}/task") if os.path.isdir(f"/proc/{process}/task") else [process]
        for thread in map(int, threads):
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
