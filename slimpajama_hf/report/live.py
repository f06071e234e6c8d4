"""A run in progress for the live page: new rows at once, the whole content from time to time."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import threading
import time
from typing import Any

import numpy as np

from slimpajama_hf.errors import UserError
from slimpajama_hf.record.columns import Columns, Reader
from slimpajama_hf.record.run_folder import GROWING, RunFolder
from slimpajama_hf.report import content, machine, numbers, page
from slimpajama_hf.report.packing import pack

#: The maximum share of a core for gathering the whole content while a run is in progress.
GATHERING = 0.01
#: The minimum time between two gatherings, in seconds; each builds the whole page anew.
LEAST_SECONDS_BETWEEN = 5.0

#: Files whose growth means that there is something new besides rows.
_BESIDE = ("run.json", *GROWING)


@dataclasses.dataclass(frozen=True)
class Whole:
    """The packed content of a run (`page.packed_content`), and what it was made from."""

    packed: bytes
    meta: dict[str, Any]
    tag: str
    """`GENERATION-HASH`; changes with the content."""
    kind: tuple[Any, ...]


class LiveRun:
    """Follows one run folder; may be used by several threads."""

    def __init__(self, folder: RunFolder, name: str, gpus: machine.Gpus) -> None:
        self.folder, self.name = folder, name
        self.whole: Whole | None = None
        """None until there is a run in the folder."""
        self.generation = 0
        """How often the ledger began anew; rows that a page already has are then those of another run."""
        self.state: dict[str, Any] = {}
        """See `machine.state`; `trouble` says why something cannot be shown, and is empty otherwise."""
        self.record: dict[str, Any] = {}
        self._gpus = gpus
        self._reader = Reader(folder.ledger)
        # New rows are read while the content is gathered, so both need a reader of their own.
        self._gathering_reader = (0, Reader(folder.ledger))
        self._stamp: Any = None
        self._rows = Columns()
        self._looking, self._gathering = threading.Lock(), threading.Lock()
        self._gathered, self._cost_seconds = -1e9, 0.0
        self._gathered_stamp: Any = None
        self._ungathered = ""

    # ---- rows: every half second ----

    @property
    def rows(self) -> Columns:
        """The rows as of the last `look`."""
        return self._rows

    def look(self) -> None:
        """Read new rows of the ledger, and the present state of the run."""
        with self._looking:
            state, unreadable = self.state, ""
            try:
                self._take_in()
                state = machine.state(self.folder, self._rows, self.record, self._gpus)
            except Exception as error:
                unreadable = f"{type(error).__name__}: {error}"
            self.state = state | {"trouble": unreadable or self._ungathered}

    def _take_in(self) -> None:
        stamp = _stamp(self.folder, "ledger.jsonl")
        if stamp != self._stamp:
            inode = stamp[0][1] if stamp else None
            if self._stamp and inode != self._stamp[0][1]:
                self._reader = Reader(self.folder.ledger)
            columns = self._reader.columns
            rows = self._reader.update()
            if len(self._rows) and (rows is not columns or len(rows) < len(self._rows)):
                self.generation += 1
            self._stamp, self._rows = stamp, rows.first(len(rows))
        try:
            self.record = self.folder.read_record()
        except UserError:
            self.record = {}

    def rows_from(self, first: int) -> dict[str, Any]:
        """The rows from step `first` on: `from`, `to`, and `packed`, their packed content in base64."""
        rows = self._rows
        last = len(rows)
        domains, domain_of = numbers.domains_of(rows)
        tail = np.arange(first, last)
        arrays = numbers.step_arrays(rows, tail, 1, domain_of)
        if self.kind[0] > 1:
            # `step_arrays` adds these if a row stands for several steps; here each stands for itself.
            arrays["step"] = tail.astype(np.uint32)
            for name in ("loss", "grad_norm"):
                arrays[f"{name}_low"] = arrays[f"{name}_high"] = arrays[name]
        seldom = {
            name: [[step, value] for step, value in list(rows.seldom[name].items()) if first <= step < last]
            for name in ("spike", "update_skipped", "skipped")
        }
        # What a step taught is known one row later, and depends on the newest learning rate: all of it is sent again.
        own, following = numbers.taught_of(rows)
        taught = [[at, own[at], following[at]] for at in np.flatnonzero(np.isfinite(own))]
        meta = {
            "steps": last,
            "taught": taught,
            "headline": numbers.headline(rows),
            "domains": domains,
            "shards": rows.names["shard"],
            "mirrors": rows.names["mirror"],
            "seldom": seldom,
        }
        packed = base64.b64encode(pack(content.strict(meta), arrays)).decode()
        return {"from": first, "to": last, "packed": packed}

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rows can be appended to a content only if this is equal: steps per row, length of hashes, added numbers,
        whether there are rows, generation."""
        count = len(self._rows)
        every = -(-count // numbers.MOST_STEPS) if count > numbers.MOST_STEPS else 1
        return every, count <= numbers.WHOLE_HASHES, tuple(self._rows.added), count > 0, self.generation

    # ---- the whole content: as often as its share allows ----

    def is_due(self) -> bool:
        """Whether the content should be gathered again."""
        if self.whole is None:
            return _stamp(self.folder, *_BESIDE, "ledger.jsonl") != self._gathered_stamp
        if self.whole.kind != self.kind:
            return True
        pause = max(LEAST_SECONDS_BETWEEN, self._cost_seconds / GATHERING)
        if time.monotonic() - self._gathered < pause:
            return False
        return _stamp(self.folder, *_BESIDE, "ledger.jsonl") != self._gathered_stamp

    def gather(self) -> None:
        """Gather the content again. Raises UserError if there is no run in the folder, and any error of `page`. After
        an error it is due again when a file changes."""
        with self._gathering:
            self._ungathered = ""
            stamp, kind = _stamp(self.folder, *_BESIDE, "ledger.jsonl"), self.kind
            start = time.thread_time()
            self._gathered, self._gathered_stamp = time.monotonic(), stamp
            if self._gathering_reader[0] != kind[-1]:
                self._gathering_reader = (kind[-1], Reader(self.folder.ledger))
            try:
                packed, meta = page.packed_content(self.folder, self._gathering_reader[1])
            except UserError:
                raise
            except Exception as error:
                self._ungathered = f"{type(error).__name__}: {error}"
                raise
            digest = hashlib.blake2b(packed, digest_size=12).hexdigest()
            self._cost_seconds = time.thread_time() - start
            self.whole = Whole(packed, meta, f"{kind[-1]}-{digest}", kind)


def _stamp(folder: RunFolder, *names: str) -> tuple[Any, ...]:
    found = []
    for name in names:
        try:
            state = os.stat(folder.path / name)
        except OSError:
            continue
        found.append((name, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)
