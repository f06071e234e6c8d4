"""Allows one run in a folder at a time, by an advisory lock that the kernel releases if the process dies."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import filelock

from slimpajama_hf import screen
from slimpajama_hf.errors import UserError

#: The underscore keeps this file out of uploads. It stays, empty, when a run ends: if it were removed while another
#: process waits for it, two processes could hold the lock.
FILE_NAME = "_lock"


def holder(folder: Path) -> dict[str, Any]:
    """Which process claims to run in a folder: `pid`, `host`, `since`; empty if none does."""
    try:
        found = json.loads((folder / FILE_NAME).read_bytes()[:4096] or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class FolderLock:
    """Holds `<folder>/_lock` from `take` to `release`. A stale lock is recognised and taken over."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._lock = filelock.FileLock(self.path, blocking=False)

    def take(self) -> None:
        """Take the lock. Raises UserError that names the run in this folder: process, host, since when."""
        try:
            with warnings.catch_warnings():
                # Reported below in our words.
                warnings.simplefilter("ignore")
                self._lock.acquire()
        except filelock.Timeout:
            other = holder(self.path.parent)
            raise UserError(
                f"{self.path.parent}: a run is on in this folder (process {other.get('pid', '?')} on "
                f"{other.get('host', '?')} since {other.get('since', '?')}); wait for it, stop it, or choose another "
                "--output_dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in (
                errno.ENOSYS,
                errno.ENOLCK,
                errno.EOPNOTSUPP,
                errno.EINVAL,
            ):
                raise
            # A file system without locks: the run goes on without one.
            screen.say(f"{self.path.parent}: this file system has no locks; do not start two runs in this folder")
            return
        left = holder(self.path.parent)
        if left:
            screen.say(
                f"took over a stale lock: process {left.get('pid', '?')} on {left.get('host', '?')}, here since "
                f"{left.get('since', '?')}, is gone"
            )
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._write(json.dumps(own))
        atexit.register(self.release)

    def _write(self, text: str) -> None:
        """Write into the lock file itself: a new file in its place would not be locked."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text.encode(), 0)
            finally:
                os.close(descriptor)

    def release(self) -> None:
        """Release the folder. The holder's name is removed first, so that nobody finds a stale lock."""
        if self._lock.is_locked:
            self._write("")
            self._lock.release()
