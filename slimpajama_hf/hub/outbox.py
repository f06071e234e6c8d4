"""Checkpoints on their way to the Hub: `RUN/_outbox`, with a folder of hard links for each.

    _outbox/step-2000/       waits; a newer one takes its place
    _outbox/uploading-1000/  is being uploaded
    _outbox/pushed.json      what the Hub has

Every change is one rename, so that a kill leaves the old or the new state. Hard links cost no disk and no time, and
keep a checkpoint's bytes when its folder is deleted to make room.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from slimpajama_hf import files
from slimpajama_hf.record import checkpoints

#: The leading underscore keeps the outbox itself out of uploads.
FOLDER = "_outbox"

#: File in an entry if the file system has no hard links. It names the checkpoint, which the uploader copies.
NOT_LINKED = "not_linked"

_NO_LINKS = frozenset({errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})


class Gone(Exception):
    """The checkpoint of an entry was deleted before it could be copied. A newer one is coming."""


class Outbox:
    """The outbox of a run. Training adds checkpoints, and one uploader (the holder of `lock`) takes them."""

    def __init__(self, run: Path, most: int = 1) -> None:
        self.run, self.path, self.most = run, run / FOLDER, most
        """`most` checkpoints may wait beside the one that is being uploaded. Beyond that, the oldest are dropped."""

    # ---- training's side ----

    def add(self, checkpoint: Path) -> None:
        """Let `checkpoint` wait. Makes hard links and reads no bytes. Raises OSError if the disk takes nothing."""
        step = int(checkpoint.name.rpartition("-")[2])
        entry = self.path / f"_new.{os.getpid()}"
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir(parents=True)
        try:
            _link(checkpoint, entry)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                shutil.rmtree(entry, ignore_errors=True)
                raise
            shutil.rmtree(entry)
            entry.mkdir()
            (entry / NOT_LINKED).write_text(checkpoint.name, encoding="utf-8")
        self._throw_away(self.path / f"step-{step}")
        os.rename(entry, self.path / f"step-{step}")
        self._coalesce()

    def keep_up_to(self, step: int) -> None:
        """Drop checkpoints after `step`, because the run goes on from there and will make them again. Also drop what a
        kill left half done."""
        for path in self._entries():
            if path.name.startswith("_new."):
                shutil.rmtree(path, ignore_errors=True)
        for waiting in self.waiting():
            if waiting > step:
                self._throw_away(self.path / f"step-{waiting}")

    def waiting(self) -> list[int]:
        """Steps that wait or are being uploaded, ascending."""
        found = (re.fullmatch(r"(?:step|uploading)-(\d+)", path.name) for path in self._entries())
        return sorted({int(match.group(1)) for match in found if match})

    def pushed(self) -> dict[str, Any]:
        """What the Hub has: run_id, repo, revision, step, commit, url; empty before the first push."""
        try:
            pushed = files.read_json(self.path / "pushed.json")
        except (OSError, ValueError):
            return {}
        return pushed if isinstance(pushed, dict) else {}

    # ---- the uploader's side ----

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Yield whether this process may take from the outbox, until the end of the block."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock, held = filelock.FileLock(self.path / "_lock", blocking=False), True
        try:
            lock.acquire()
        except filelock.Timeout:
            held = False
        except (OSError, NotImplementedError):
            # A file system without locks. The run's own lock has reported that already.
            pass
        try:
            if held:
                self._take_back()
            yield held
        finally:
            lock.release()

    def claim(self) -> tuple[int, Path] | None:
        """Take the next checkpoint to push: its step and the folder of its files; None if nothing waits.

        Raises Gone if it was deleted in the meantime (only possible without hard links).
        """
        self._coalesce()
        for step in self._steps("step"):
            taken = self.path / f"uploading-{step}"
            try:
                os.rename(self.path / f"step-{step}", taken)
            except FileNotFoundError:
                # Training has put a newer one in its place.
                continue
            self._copy_if_not_linked(taken)
            return step, taken
        return None

    def give_back(self, step: int) -> None:
        """Let a checkpoint that could not be pushed wait again, unless a newer one waits."""
        held = self.path / f"uploading-{step}"
        try:
            os.rename(held, self.path / f"step-{step}")
        except OSError:
            # Training has added the same step again, with the chart and the report of its end.
            self._throw_away(held)
        self._coalesce()

    def done(self, step: int, pushed: dict[str, Any]) -> None:
        """Record that `step` is on the Hub, as `pushed` says."""
        files.write_json(self.path / "pushed.json", pushed, indent=1)
        self._throw_away(self.path / f"uploading-{step}")

    def drop(self, step: int) -> None:
        """Forget an entry that is no longer a checkpoint of this run."""
        self._throw_away(self.path / f"uploading-{step}")

    # ---- ----

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _steps(self, kind: str) -> list[int]:
        found = (re.fullmatch(rf"{kind}-(\d+)", path.name) for path in self._entries())
        return sorted(int(match.group(1)) for match in found if match)

    def _coalesce(self) -> None:
        for step in self._steps("step")[: -self.most]:
            self._throw_away(self.path / f"step-{step}")

    def _throw_away(self, entry: Path) -> None:
        # Renamed first, so that the other side sees all of an entry or nothing.
        trash = self.path / f"_trash.{entry.name}.{os.getpid()}"
        shutil.rmtree(trash, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry, trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _take_back(self) -> None:
        """Let what a killed uploader held wait again, and delete what was half thrown away."""
        for step in self._steps("uploading"):
            self.give_back(step)
        for path in self._entries():
            if path.name.startswith("_trash."):
                shutil.rmtree(path, ignore_errors=True)

    def _copy_if_not_linked(self, entry: Path) -> None:
        marker = entry / NOT_LINKED
        if not marker.is_file():
            return
        checkpoint = self.run / marker.read_text(encoding="utf-8")
        try:
            for path in checkpoint.rglob("*"):
                if path.is_file():
                    target = entry / path.relative_to(checkpoint)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            wrong = checkpoints.problem(entry)
        except OSError as error:
            wrong = str(error)
        if wrong is not None:
            self._throw_away(entry)
            raise Gone(f"{checkpoint.name}: {wrong}")
        marker.unlink()


def _link(checkpoint: Path, entry: Path) -> None:
    for path in checkpoint.rglob("*"):
        target = entry / path.relative_to(checkpoint)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.link(path, target)
