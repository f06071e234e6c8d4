"""The ledger as columns: one array for each field of its rows, growing with the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.record import ledger

#: Numeric fields of every row, with their dtypes. A field that an older row lacks is NaN or 0.
NUMBERS: dict[str, Any] = {
    "step": np.int64,
    "loss": np.float64,
    "accuracy": np.float64,
    "tokens": np.int64,
    "text_bytes": np.int64,
    "throughput": np.float64,
    "learning_rate": np.float64,
    "grad_norm": np.float64,
    "row": np.int64,
    "tokens_cut": np.int64,
    "tokens_cut_exact": np.int8,
    "code_bits": np.float64,
    "step_seconds": np.float64,
    "part": np.int64,
    "grad_square": np.float64,
    "grad_agreement": np.float64,
    "loss_after": np.float64,
    "next_loss": np.float64,
}
#: Counts for each row.
COUNTED: dict[str, Any] = {"samples": np.int32, "predicted": np.int64, "first_predicted": np.int64}
#: Texts that repeat; stored as indices, in the order of their first appearance.
NAMES = ("domain", "shard", "mirror")
#: Fields that few rows have; stored in dictionaries by step.
SELDOM = ("update_skipped", "spike", "skipped", "gaps", "documents", "grad_layers")


class Columns:
    """The ledger as arrays: each name in `NUMBERS` is an attribute of shape (steps,), NaN where the row has null.

    `predicted` (steps,) counts the predicted tokens of each step, `first_predicted` those of its first sample,
    `samples` its samples. `domain`, `shard` and `mirror` are indices into `names[field]`. `sha1` is (steps, 20).
    `seldom[field]` is a dictionary by step. `added` holds all other numbers of the ledger (`ledger.added`).
    """

    def __init__(self) -> None:
        self._size = 0
        kinds = NUMBERS | COUNTED | dict.fromkeys(NAMES, np.int32)
        self._store = {name: np.zeros(1024, kind) for name, kind in kinds.items()}
        self._sha1 = np.zeros((1024, 20), np.uint8)
        self._index: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        self._added: dict[str, np.ndarray] = {}
        self.names: dict[str, list[str]] = {name: [] for name in NAMES}
        self.seldom: dict[str, dict[int, Any]] = {name: {} for name in SELDOM}

    def __len__(self) -> int:
        return self._size

    def __getattr__(self, name: str) -> np.ndarray:
        store = self.__dict__.get("_store", {})
        if name not in store:
            raise AttributeError(name)
        return store[name][: self._size]

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of their first step."""
        return self.names["domain"]

    @property
    def sha1(self) -> np.ndarray:
        """SHA-1 of each step's document, (steps, 20) bytes; zeros where the ledger has none."""
        return self._sha1[: self._size]

    @property
    def added(self) -> dict[str, np.ndarray]:
        """Numbers besides the usual ones, (steps,) each, NaN where a row has none."""
        return {name: values[: self._size] for name, values in self._added.items()}

    def append(self, row: dict[str, Any]) -> None:
        """Add one decoded row."""
        at = self._size
        if at == len(self._sha1):
            # Doubling keeps the cost of growth constant per row.
            self._store = {name: np.resize(array, 2 * at) for name, array in self._store.items()}
            self._added = {name: np.resize(array, 2 * at) for name, array in self._added.items()}
            self._sha1 = np.resize(self._sha1, (2 * at, 20))
        for name, kind in NUMBERS.items():
            value = row.get(name)
            if value is None:
                value = math.nan if kind is np.float64 else at if name == "step" else 0
            self._store[name][at] = value
        for name in NAMES:
            text = str(row.get(name, "unknown"))
            index = self._index[name]
            if text not in index:
                index[text] = len(index)
                self.names[name].append(text)
            self._store[name][at] = index[text]
        self._store["samples"][at] = ledger.samples_of(row)
        known = "tokens" in row
        self._store["predicted"][at] = ledger.predicted(row) if known else 0
        self._store["first_predicted"][at] = ledger.predicted(next(ledger.each_sample(row))) if known else 0
        digest = bytes.fromhex(row.get("text_sha1", ""))
        self._sha1[at] = np.frombuffer(digest, np.uint8) if len(digest) == 20 else 0
        for name in SELDOM:
            if row.get(name):
                self.seldom[name][int(self._store["step"][at])] = row[name]
        added = ledger.added(row)
        for name in self._added.keys() | added.keys():
            value = added.get(name)
            if name not in self._added:
                self._added[name] = np.full(len(self._sha1), math.nan)
            self._added[name][at] = math.nan if value is None else value
        self._size += 1

    def first(self, steps: int) -> Columns:
        """The first `steps` rows. Shares memory with this object."""
        part = Columns()
        part.__dict__.update(self.__dict__, _size=min(steps, self._size))
        return part

    def prequential_bits_per_byte(self) -> float:
        """Code length of everything read so far, over its UTF-8 bytes; NaN before the first row."""
        bits, size = self.code_bits, self.text_bytes
        counted = np.isfinite(bits)
        total = int(size[counted].sum())
        return float(bits[counted].sum()) / total if total else math.nan


class Reader:
    """Reads a growing ledger: each `update` parses only what was appended since the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = Columns()
        self.trouble = ""
        """What is wrong with the ledger, in words; empty if nothing is."""
        self._offset = 0

    def update(self) -> Columns:
        """Read new rows, up to one that cannot be read. A torn last line waits for the next call. A ledger that was
        cut back is read anew."""
        if not self.path.exists():
            self.trouble = "there is no ledger in this folder yet"
            return self.columns
        self.trouble = ""
        if self.path.stat().st_size < self._offset:
            self.columns, self._offset = Columns(), 0
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    self.columns.append(json.loads(line))
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                    self.trouble = (
                        f"the ledger cannot be read beyond its row {len(self.columns):,}; "
                        "python -m slimpajama_hf verify says what is wrong"
                    )
                    break
                self._offset += len(line)
        return self.columns


def read_columns(path: Path) -> Columns:
    """The whole ledger at `path` as arrays."""
    return Reader(path).update()


#: Steps of the mean that represents the end of a run.
LAST_STEPS = 50


def mean_of_last(values: Any, window: int = LAST_STEPS) -> float:
    """Mean of the last `window` finite values, NaN without any."""
    finite = values[np.isfinite(values)][-window:]
    return float(finite.mean()) if len(finite) else math.nan
