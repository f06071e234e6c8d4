"""Notes of the samples that a stream has given out but training has not taken yet.

Loaders read ahead, in worker processes. So the facts about a sample are noted where the sample is made, and read when
its batch has been learned. Workers write their notes into files before they give a sample out. So notes are there
whenever the batch is, and nothing waits.
"""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import struct
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from slimpajama_hf.samples.sample import Sample

#: Notes per file. Files that were read are deleted, so notes never grow with a run.
NOTES_A_FILE = 4096
_SIZE = struct.Struct("<I")


def note_of(sample: Sample) -> Sample:
    """The sample without its text and its ids, but with their number."""
    ids: Any = range(len(sample.input_ids))
    return dataclasses.replace(sample, input_ids=ids, document=dataclasses.replace(sample.document, text=""))


class Notes:
    """Notes of samples in their order, made in this process."""

    def __init__(self) -> None:
        self._notes: deque[Sample] = deque()
        self.ended = False
        """Whether no more will come, because the stream was read to its end."""

    def end(self) -> None:
        """No more will come."""
        self.ended = True

    def add(self, sample: Sample) -> None:
        """Add the note of the next sample."""
        self._notes.append(note_of(sample))

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples; fewer if there are no more."""
        return [self._notes.popleft() for _ in range(min(count, len(self._notes)))]


class WrittenNotes:
    """Notes of worker `number` of a loader, in files in `folder`; used in the worker."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._written = 0
        self._file: BinaryIO | None = None

    def add(self, sample: Sample) -> None:
        """Add the note of this worker's next sample; it can be read as soon as this returns."""
        data = pickle.dumps(note_of(sample), pickle.HIGHEST_PROTOCOL)
        self._write(data)

    def end(self) -> None:
        """No more will come from this worker."""
        self._write(b"")

    def _write(self, data: bytes) -> None:
        part, place = divmod(self._written, NOTES_A_FILE)
        if place == 0:
            if self._file is not None:
                self._file.close()
            self._file = open(_path(self._folder, self._number, part), "wb", buffering=0)  # noqa: SIM115
        assert self._file is not None
        self._file.write(_SIZE.pack(len(data)) + data)
        self._written += 1


def _path(folder: Path, number: int, part: int) -> Path:
    return folder / f"{number}.{part}"


class NotesOfWorkers:
    """The notes of all workers of a loader, in the order of the stream.

    Worker w has the blocks w, w + workers, ... of `block` samples each.
    """

    def __init__(self, folder: Path, workers: int, block: int) -> None:
        self._folder, self._workers, self._block = folder, workers, block
        self._taken = 0
        self._read = [0] * workers
        self._files: list[BinaryIO | None] = [None] * workers
        self.ended = False
        """Whether no more will come, because the worker whose turn it is has read the stream to its end."""

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples; fewer if there are no more."""
        found: list[Sample] = []
        while len(found) < count:
            note = self._next_of(self._taken // self._block % self._workers)
            if note is None:
                break
            found.append(note)
            self._taken += 1
        return found

    def _next_of(self, worker: int) -> Sample | None:
        part, place = divmod(self._read[worker], NOTES_A_FILE)
        path = _path(self._folder, worker, part)
        file = self._files[worker]
        if file is None or place == 0:
            if file is not None:
                file.close()
                _path(self._folder, worker, part - 1).unlink(missing_ok=True)
            self._files[worker] = None
            if not path.is_file():
                return None
            file = self._files[worker] = open(path, "rb")  # noqa: SIM115
        here = file.tell()
        head = file.read(_SIZE.size)
        data = file.read(_SIZE.unpack(head)[0]) if len(head) == _SIZE.size else b""
        if len(head) < _SIZE.size or len(data) < _SIZE.unpack(head)[0]:
            file.seek(here)
            return None
        if not data:
            self.ended = True
            file.seek(here)
            return None
        self._read[worker] += 1
        # Safe to unpickle: a worker of this very process wrote it.
        note: Sample = pickle.loads(data)
        return note


def empty_folder(folder: Path) -> Path:
    """An empty folder for notes; removes those of a run that was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
