"""How much each token surprised the model when it was read: the loss of every token of every step.

`surprisals.f32` holds little-endian float32, nats: one value for each predicted token (the first of a sample is not),
sample after sample and row after row of the ledger. The ledger tells where a row begins. NaN if a step has no loss.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimpajama_hf import files

if TYPE_CHECKING:
    from slimpajama_hf.record.ledger import Kept

FILE_NAME = "surprisals.f32"
DTYPE = np.dtype("<f4")


class Surprisals:
    """Writes the values of finished steps. `predicted`: how many values the file has already."""

    def __init__(self, path: Path, predicted: int = 0) -> None:
        self.path = path
        self._predicted = predicted
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | files.NO_LINK, 0o666)

    def write(self, nats: np.ndarray) -> None:
        """Write the values (tokens - 1,) of the next step. Until `advance` is called, they can be written again.

        Raises OSError if the disk is full.
        """
        data = nats.astype(DTYPE, copy=False).tobytes()
        if os.pwrite(self._file, data, self._predicted * DTYPE.itemsize) != len(data):
            raise OSError(28, "No space left on device", str(self.path))

    def advance(self, predicted: int) -> None:
        """Go on behind the written step, of `predicted` values, once its row is in the ledger."""
        self._predicted += predicted

    def sync(self) -> None:
        """Flush the values to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def cut_back(path: Path, kept: Kept) -> list[int]:
    """Keep the values of the rows of `kept`; values that the file lacks become NaN. The values of a step whose mean is
    not its loss become NaN too; returns these steps."""
    predicted = int(kept.predicted.sum())
    size = path.stat().st_size if path.exists() else 0
    if size > predicted * DTYPE.itemsize:
        os.truncate(path, predicted * DTYPE.itemsize)
    elif missing := predicted - size // DTYPE.itemsize:
        with open(path, "r+b" if size else "wb") as file:
            file.seek(size // DTYPE.itemsize * DTYPE.itemsize)
            file.write(np.full(missing, np.nan, DTYPE).tobytes())
    if not predicted:
        return []
    values = np.memmap(path, DTYPE, "r+", shape=(predicted,))
    damaged, _ = compare(values, kept.predicted, kept.losses)
    begins = offsets(kept.predicted)
    for step in damaged:
        values[begins[step] : begins[step + 1]] = np.nan
    if damaged:
        values.flush()
    return damaged


def compare(values: np.ndarray, predicted: np.ndarray, losses: np.ndarray, block: int = 4096) -> tuple[list[int], int]:
    """The steps whose values do not have the step's loss as their mean, and how many steps were compared: those with a
    loss and a value. `predicted`, `losses`: of each step, (steps,)."""
    begins, found, count = offsets(predicted), list[int](), 0
    for first in range(0, len(predicted), block):
        last = min(first + block, len(predicted))
        steps = first + np.flatnonzero(predicted[first:last])
        if not len(steps):
            continue
        part = np.asarray(values[begins[first] : begins[last]], np.float64)
        starts = begins[steps] - begins[first]
        with np.errstate(invalid="ignore", over="ignore"):
            means = np.add.reduceat(part, starts) / predicted[steps]
            empty = np.add.reduceat(np.isnan(part), starts) == predicted[steps]
            same = np.abs(means - losses[steps]) <= 1e-4 * np.maximum(1.0, np.abs(losses[steps]))
        looked_at = ~empty & np.isfinite(losses[steps])
        found += steps[~same & looked_at].tolist()
        count += int(looked_at.sum())
    return found, count


def offsets(predicted: np.ndarray) -> np.ndarray:
    """The index of the first value of each step, (steps + 1,), from the predicted tokens of each step, (steps,)."""
    return np.concatenate([[0], np.cumsum(predicted)])


def read(path: Path, first: int, count: int) -> np.ndarray:
    """`count` values from index `first` on, float32, nats; NaN beyond the end of the file."""
    found = np.full(count, np.nan, np.float32)
    if path.exists() and count:
        with open(path, "rb") as file:
            file.seek(first * DTYPE.itemsize)
            values = np.frombuffer(file.read(count * DTYPE.itemsize), DTYPE)
        found[: len(values)] = values
    return found
