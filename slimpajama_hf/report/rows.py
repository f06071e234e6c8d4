"""The ledger as the report needs it: every field of every row in arrays that grow with the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.record import ledger

#: Numeric fields and the type they are kept in; a row of an older version that lacks one gives NaN or 0.
_NUMBERS: dict[str, Any] = {
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
#: Texts that repeat, kept as numbers of their first appearance.
_NAMES = ("domain", "shard", "mirror")


class Rows:
    """Reads a growing ledger; each attribute of a numeric field is an array (steps,), NaN where it was null.

    `predicted` counts the tokens that a step predicted, `first_predicted` those of its first sample (most steps have
    one); a report shows that one's text. `domain`, `shard` and `mirror` are arrays of indices into `names[field]`;
    `sha1` has shape (steps, 20). What only few rows have stands in dictionaries by step: `skipped_updates`, `spikes`,
    `passed_over`, `gaps`, `documents`, `grad_layers`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        """What is wrong with the ledger, in words; empty when nothing is."""
        self._start_anew()

    def _start_anew(self) -> None:
        self._size, self._offset = 0, 0
        self._store = {name: np.zeros(1024, kind) for name, kind in _NUMBERS.items()}
        self._store |= {name: np.zeros(1024, np.int64) for name in ("predicted", "first_predicted")}
        self._store |= {name: np.zeros(1024, np.int32) for name in _NAMES}
        self._sha1 = np.zeros((1024, 20), np.uint8)
        self._index: dict[str, dict[str, int]] = {name: {} for name in _NAMES}
        self.names: dict[str, list[str]] = {name: [] for name in _NAMES}
        self.skipped_updates: dict[int, str] = {}
        self.spikes: dict[int, float] = {}
        self.passed_over: dict[int, dict[str, int]] = {}
        self.gaps: dict[int, list[dict[str, Any]]] = {}
        self.documents: dict[int, list[dict[str, Any]]] = {}
        self.grad_layers: dict[int, dict[str, list[float]]] = {}

    def __len__(self) -> int:
        return self._size

    def __getattr__(self, name: str) -> np.ndarray:
        store = self.__dict__.get("_store", {})
        if name not in store:
            raise AttributeError(name)
        return store[name][: self._size]

    @property
    def sha1(self) -> np.ndarray:
        """SHA-1 of each step's document, (steps, 20) bytes; zeros where the ledger has none."""
        return self._sha1[: self._size]

    def update(self) -> Rows:
        """Take in what was appended since the last time. A torn last line waits; a ledger cut back is read anew."""
        if not self.path.exists():
            self.trouble = "there is no ledger in this folder yet"
            return self
        self.trouble = ""
        if self.path.stat().st_size < self._offset:
            self._start_anew()
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    self._append(row)
                except (ValueError, TypeError, KeyError, AttributeError):
                    self.trouble = (
                        f"the ledger cannot be read beyond its row {self._size:,}; "
                        "python -m slimpajama_hf verify says what is wrong"
                    )
                    break
                self._offset += len(line)
        return self

    def _append(self, row: dict[str, Any]) -> None:
        at = self._size
        if at == len(self._store["step"]):
            # Doubling: the cost of growth is constant per row.
            self._store = {name: np.resize(array, 2 * at) for name, array in self._store.items()}
            self._sha1 = np.resize(self._sha1, (2 * at, 20))
        for name, kind in _NUMBERS.items():
            value = row.get(name)
            if value is None:
                value = math.nan if kind is np.float64 else at if name == "step" else 0
            self._store[name][at] = value
        for name in _NAMES:
            text = str(row.get(name, "unknown"))
            index = self._index[name]
            if text not in index:
                index[text] = len(index)
                self.names[name].append(text)
            self._store[name][at] = index[text]
        if "tokens" in row:
            self._store["predicted"][at] = ledger.predicted(row)
            self._store["first_predicted"][at] = ledger.predicted(next(ledger.each_sample(row)))
        digest = bytes.fromhex(row.get("text_sha1", ""))
        self._sha1[at] = np.frombuffer(digest, np.uint8) if len(digest) == 20 else 0
        step = int(self._store["step"][at])
        for field, place in (
            ("update_skipped", self.skipped_updates),
            ("spike", self.spikes),
            ("skipped", self.passed_over),
            ("gaps", self.gaps),
            ("documents", self.documents),
            ("grad_layers", self.grad_layers),
        ):
            if row.get(field):
                place[step] = row[field]
        self._size += 1
