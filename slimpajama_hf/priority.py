"""Process priority: drawing and pushing leave the processor to training, until training waits for them."""

from __future__ import annotations

import contextlib
import os


def stand_back() -> None:
    """Use only the processor time that training leaves. The threads of training wait for each other many times a step,
    so one thread that makes room for a chart delays all. Threads and processes that start later inherit this."""
    with contextlib.suppress(OSError):
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.nice(19)


def come_forward(process: int) -> None:
    """Give all threads of a process normal priority again, because training is over and waits for it.

    A user who may not raise a priority (RLIMIT_NICE, sched(7)) has to wait for the time that others leave.
    """
    if not hasattr(os, "SCHED_OTHER"):
        return
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{process}/task") if os.path.isdir(f"/proc/{process}/task") else [process]
        for thread in map(int, threads):
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
