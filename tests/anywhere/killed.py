"""Runs a script and kills its process, kill -9, at a moment that its run folder tells.

killed.py RUN MOMENT SCRIPT ARGUMENTS...; MOMENT is `rows:N` (the ledger has N rows), `staging` (a checkpoint is being
written) or `never`.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path


def rows_of(run: Path) -> int:
    path = run / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _kill_when(run: Path, moment: str) -> None:
    kind, _, number = moment.partition(":")
    while True:
        if kind == "rows" and rows_of(run) >= int(number):
            break
        if kind == "staging" and any(run.glob("_staging.*/checkpoint-*/*")):
            break
        time.sleep(0.001)
    # The workers of a loader with it, as a machine that goes down does.
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    # A group of its own, so that nobody else is killed with it.
    with contextlib.suppress(OSError):
        os.setsid()
    folder, when, script = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    sys.argv = sys.argv[3:]
    if when != "never":
        # What an earlier start has left there would kill this one before it begins.
        threading.Thread(target=_kill_when, args=(folder, when), daemon=True).start()
    runpy.run_path(script, run_name="__main__")
