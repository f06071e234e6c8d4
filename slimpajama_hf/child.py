"""A process of ours beside training, as the one that draws: JSON objects, one a line, go in and come out.

It ends with the process that started it, however that ends: what it writes belongs to a run that is then another's.
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

#: Says to the child which process started it.
_PARENT = "SLIMPAJAMA_HF_PARENT"


class Child:
    """`python -m MODULE WORDS...`, started. Raises OSError where it cannot be. What it answers comes in `answers`."""

    def __init__(self, module: str, *words: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # A thread for arithmetic would only take a core from training.
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
        """Raises OSError where the process is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def end(self, patience_seconds: float) -> None:
        """Close its input, at which it ends; kill it where it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def begin() -> None:
    """In the child, first of all: Ctrl-C, which goes to the whole terminal, is the parent's to decide about, and the
    end of the parent is the end of this process (at once on Linux; elsewhere when its input ends)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    parent = os.environ.get(_PARENT)
    if parent is not None and os.getppid() != int(parent):
        # It ended before it was asked to say so.
        os._exit(0)


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this signal when the process that started this one ends. Linux only."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, number, 0, 0, 0)


def answer(message: dict[str, Any]) -> None:
    """In the child: a message to the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
