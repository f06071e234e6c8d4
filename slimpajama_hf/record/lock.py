"""One run in a folder at a time: an advisory lock that the kernel takes back from a process that died."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from slimpajama_hf import screen
from slimpajama_hf.errors import UserError

#: The underscore keeps it out of uploads.
FILE_NAME = "_lock"


class FolderLock:
    """Holds `<folder>/_lock` from `take` to `release`. A stale lock is recognised and taken over."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._descriptor: int | None = None

    def take(self) -> None:
        """Raises UserError naming the run that is on in this folder: process, host, since when."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{self.path.parent}: a run is on in this folder (process {holder.get('pid', '?')} on "
                f"{holder.get('host', '?')} since {holder.get('since', '?')}); wait for it, stop it, or choose another "
                "--output_dir"
            ) from None
        except OSError:
            # A file system without locks: the run goes on without one.
            screen.say(f"{self.path.parent}: this file system has no locks; do not start two runs in this folder")
            os.close(descriptor)
            return
        left = self._holder(descriptor)
        if left:
            screen.say(
                f"took over a stale lock: process {left.get('pid', '?')} on {left.get('host', '?')}, here since "
                f"{left.get('since', '?')}, is gone"
            )
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        self._descriptor = descriptor
        atexit.register(self.release)

    @staticmethod
    def _holder(descriptor: int) -> dict[str, Any]:
        try:
            holder = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def release(self) -> None:
        """Give the folder back; the file goes first, so that nobody finds it stale."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
