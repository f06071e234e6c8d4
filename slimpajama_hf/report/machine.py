"""The present state of a run and its machine: whether it trains, time left, memory, use of the machine's FLOP/s."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import psutil

from slimpajama_hf.record import lock

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns
    from slimpajama_hf.record.run_folder import RunFolder

#: Steps in the means of pace and use.
STEPS_OF_MEAN = 50

#: How long an answer about the GPUs is reused, in seconds; each question starts a process.
GPU_SECONDS = 5.0


def state(folder: RunFolder, rows: Columns, record: dict[str, Any], gpus: Gpus) -> dict[str, Any]:
    """The numbers of the live page that are not in the ledger; `record`: `run.json`. None: unknown.

    `training`: whether a process on this machine holds the folder (None: one on another machine). `left_seconds`: at
    the pace of the last `STEPS_OF_MEAN` steps. `process_bytes`: resident memory of that process. `gpus`: see `Gpus`.
    `rate`: the measured rate of matrix products (FLOP/s); `used`: the share of it that these steps use.
    """
    training, process_bytes = _process(folder)
    goal = record.get("max_steps")
    last = slice(max(len(rows) - STEPS_OF_MEAN, 0), None)
    seconds = float(rows.step_seconds[last].sum())
    left = goal - len(rows) if isinstance(goal, int) else None
    rate, used = _use(record, rows.tokens[last], seconds)
    return {
        "training": training,
        "steps": len(rows),
        "max_steps": goal if isinstance(goal, int) else None,
        "left_seconds": seconds / len(rows.tokens[last]) * max(left, 0) if left is not None and seconds else None,
        "process_bytes": process_bytes,
        "gpus": gpus.memory(),
        "rate": rate,
        "used": used,
    }


def _process(folder: RunFolder) -> tuple[bool | None, int | None]:
    """Whether the process that holds the folder is alive here, and its resident memory in bytes."""
    holder = lock.holder(folder.path)
    if not holder:
        return False, None
    if holder.get("host") != socket.gethostname():
        return None, None
    try:
        return True, psutil.Process(int(holder["pid"])).memory_info().rss
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False, None


def _use(record: dict[str, Any], tokens: Any, seconds: float) -> tuple[float | None, float | None]:
    """The rate that was measured when the run began (FLOP/s), and the share of it that these steps use."""
    measured, sessions = record.get("arithmetic"), record.get("sessions")
    try:
        if measured["session"] != len(sessions):  # type: ignore[index, arg-type]
            # Measured in an earlier session, perhaps on another machine.
            return None, None
        rate, linear, square = (float(measured[name]) for name in ("flops", "per_token", "per_token_squared"))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None, None
    if not rate or not seconds or record.get("processes", 1) != 1:
        return rate or None, None
    done = float((linear * tokens + square * tokens.astype(float) ** 2).sum())
    return rate, done / seconds / rate


class Gpus:
    """GPU memory on this machine according to nvidia-smi, in use by any process."""

    def __init__(self) -> None:
        self._program = shutil.which("nvidia-smi")
        self._asked = -GPU_SECONDS
        self._found: list[dict[str, int]] = []

    def memory(self) -> list[dict[str, int]]:
        """`[{"used_bytes", "total_bytes"}, ...]`; empty without a GPU or without nvidia-smi."""
        if self._program is not None and time.monotonic() - self._asked >= GPU_SECONDS:
            self._asked = time.monotonic()
            self._found = _ask(self._program)
        return self._found


def _ask(program: str) -> list[dict[str, int]]:
    question = [program, "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    found: list[dict[str, int]] = []
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        said = subprocess.run(question, capture_output=True, text=True, timeout=5, check=True).stdout
        for line in said.splitlines():
            used, total = (int(word) * 2**20 for word in line.split(","))
            found.append({"used_bytes": used, "total_bytes": total})
    return found
