"""The ledger as columns: one array for each number of a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.record.ledger import predicted, samples_of

#: Numeric columns that views need, with the type they are kept in.
NUMBERS = {
    "step": np.int64,
    "loss": np.float64,
    "accuracy": np.float64,
    "throughput": np.float64,
    "learning_rate": np.float64,
    "grad_norm": np.float64,
    "tokens": np.int64,
    "text_bytes": np.int64,
    "code_bits": np.float64,
    "grad_square": np.float64,
    "grad_agreement": np.float64,
    "loss_after": np.float64,
    "next_loss": np.float64,
}


#: Those that rows of older versions lack.
_NEWER = ("grad_square", "grad_agreement", "loss_after", "next_loss")


#: What is counted for each row.
COUNTED = {"domain": np.int16, "samples": np.int32, "predicted": np.int64}


class Columns:
    """The ledger as arrays that grow: each attribute of `NUMBERS` is an array of shape (steps,).

    `predicted` (steps,) counts the tokens that each step predicted, `samples` (steps,) its samples. `domain`
    (steps,) holds indices into `domains`. NaN stands for what was not finite.
    """

    def __init__(self) -> None:
        self._size = 0
        self._store = {name: np.empty(1024, dtype) for name, dtype in (NUMBERS | COUNTED).items()}
        self.domains: list[str] = []
        self._domain_index: dict[str, int] = {}

    def __len__(self) -> int:
        return self._size

    def __getattr__(self, name: str) -> np.ndarray:
        store = self.__dict__.get("_store", {})
        if name not in store:
            raise AttributeError(name)
        return store[name][: self._size]

    def append(self, row: dict[str, Any]) -> None:
        """Add one decoded row."""
        if self._size == len(self._store["step"]):
            # Doubling: the cost of growth is constant per row.
            self._store = {name: np.resize(array, 2 * self._size) for name, array in self._store.items()}
        domain = row["domain"]
        if domain not in self._domain_index:
            self._domain_index[domain] = len(self.domains)
            self.domains.append(domain)
        for name in NUMBERS:
            value = row.get(name) if name in _NEWER else row[name]
            self._store[name][self._size] = math.nan if value is None else value
        self._store["domain"][self._size] = self._domain_index[domain]
        self._store["samples"][self._size] = samples_of(row)
        self._store["predicted"][self._size] = predicted(row)
        self._size += 1

    def first(self, steps: int) -> Columns:
        """The first `steps` rows, sharing their memory."""
        part = Columns()
        part._store, part._size = self._store, min(steps, self._size)
        part.domains, part._domain_index = self.domains, self._domain_index
        return part

    def prequential_bits_per_byte(self) -> float:
        """Running code length of everything read so far, over its UTF-8 bytes; NaN before the first row."""
        bits, size = self.code_bits, self.text_bytes
        counted = np.isfinite(bits)
        total = int(size[counted].sum())
        return float(bits[counted].sum()) / total if total else math.nan


class Reader:
    """Reads a growing ledger: each `update` parses only what was appended since the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = Columns()
        self._offset = 0

    def update(self) -> Columns:
        """Take in the new rows. A torn last line waits for the next call; a ledger that was cut back is read anew."""
        if not self.path.exists():
            return self.columns
        if self.path.stat().st_size < self._offset:
            self.columns, self._offset = Columns(), 0
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.columns.append(json.loads(line))
                self._offset += len(line)
        return self.columns


def read_columns(path: Path) -> Columns:
    """The whole ledger at `path` as arrays."""
    return Reader(path).update()


def mean_of_last(values: Any, window: int = 50) -> float:
    """Mean of the last `window` finite values, NaN without any."""
    finite = values[np.isfinite(values)][-window:]
    return float(finite.mean()) if len(finite) else math.nan
