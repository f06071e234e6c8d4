"""A helper process beside training, such as the one that draws charts. It reads and writes JSON objects, one per line.

It ends when the process that started it ends, for whatever reason: the run's folder may then belong to another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

from slimpajama_hf import ROOT

#: The environment variable that tells the child which process started it.
_PARENT = "SLIMPAJAMA_HF_PARENT"


class Child:
    """Start `python -m MODULE WORDS...`. Its answers arrive in `answers`. Raises OSError if it cannot be started."""

    def __init__(self, module: str, *words: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # More threads for arithmetic would take cores from training.
        environment = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": path,
            _PARENT: str(os.getpid()),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=os.environ | environment,
        )
        self.pid = self._process.pid
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True, name=module.rpartition(".")[2]).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.answers.put(json.loads(line))

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Send an object to the process. Raises OSError if it is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def end(self, patience_seconds: float) -> None:
        """Close the input of the process, which makes it end. Kill it if that takes longer than `patience_seconds`."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def begin() -> None:
    """The child calls this first. It ignores Ctrl-C, which reaches all processes of a terminal: the parent decides what
    happens. It ends when the parent ends (at once on Linux; elsewhere when its input ends)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    parent = os.environ.get(_PARENT)
    if parent is not None and os.getppid() != int(parent):
        # The parent ended before the signal above was set up.
        os._exit(0)


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this signal to this process when its parent ends. Linux only."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, number, 0, 0, 0)


def answer(message: dict[str, Any]) -> None:
    """Send a message from the child to its parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
