"""From the step to the ledger: numbers leave the device without making it wait, and become rows in order."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from slimpajama_hf.ledger import Ledger, Row
from slimpajama_hf.samples import Sample

#: Steps that the ledger may lag behind a device before it waits for it.
MOST_BEHIND = 16


class TrainingClock:
    """Counts training time: charts, samples, evaluation and saving happen while it is paused."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lap_start = now()
        self._paused_in_lap = 0.0
        self.training_seconds = 0.0
        """Training time since the start of this session."""
        self.paused_seconds = 0.0
        """Time spent otherwise."""

    def start(self) -> None:
        """Training begins now: what came before does not count."""
        self._lap_start, self._paused_in_lap = self._now(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._paused_in_lap += self._now() - start

    def lap(self) -> float:
        """Training seconds since the last lap."""
        now = self._now()
        seconds = max(now - self._lap_start - self._paused_in_lap, 1e-9)
        self.paused_seconds += self._paused_in_lap
        self._lap_start, self._paused_in_lap = now, 0.0
        self.training_seconds += seconds
        return seconds


class _Reading:
    """A few numbers on their way from the device; `values` has shape (3,)."""

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def here(self) -> bool:
        return self._event is None or self._event.query()

    def numbers(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def shortest(value: float) -> float:
    """A float32 as the shortest decimal that reads back as the same float32: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


class StepRecorder:
    """Turns finished steps into ledger rows, in order, and tells those who listen.

    `tokens - 1` tokens of a sample are predicted; the first is coded at its uniform cost, ln(vocabulary) nats.
    """

    def __init__(self, ledger: Ledger | None, vocab_size: int) -> None:
        self._ledger = ledger
        self._uniform_nats = math.log(vocab_size)
        self._waiting: deque[tuple[int, Sample, _Reading, float, float]] = deque()
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.last: dict[str, Any] | None = None

    def add(
        self,
        step: int,
        sample: Sample,
        loss: torch.Tensor,
        correct: torch.Tensor,
        grad_norm: torch.Tensor,
        learning_rate: float,
        seconds: float,
    ) -> None:
        """One finished step; the three tensors are scalars on the device and are not waited for."""
        values = torch.stack([loss.detach().float(), correct.float(), grad_norm.detach().float()])  # (3,)
        self._waiting.append((step, sample, _Reading(values), learning_rate, seconds))
        while self._waiting and (self._waiting[0][2].here() or len(self._waiting) > MOST_BEHIND):
            self._write(*self._waiting.popleft())

    def flush(self) -> None:
        """Write every step that was added; waits for the device."""
        while self._waiting:
            self._write(*self._waiting.popleft())

    def _write(self, step: int, sample: Sample, reading: _Reading, learning_rate: float, seconds: float) -> None:
        loss, correct, grad_norm = reading.numbers()
        tokens = len(sample.input_ids)
        row = Row(
            step=step,
            loss=shortest(loss),
            accuracy=correct / (tokens - 1),
            tokens=tokens,
            text_bytes=sample.text_bytes,
            throughput=round(tokens / seconds, 2),
            learning_rate=learning_rate,
            grad_norm=shortest(grad_norm),
            mirror=sample.document.mirror,
            shard=sample.document.shard,
            row=sample.document.row,
            text_sha1=sample.document.sha1,
            domain=sample.document.domain,
            tokens_cut=sample.tokens_cut,
            tokens_cut_exact=sample.tokens_cut_exact,
            code_bits=(shortest(loss) * (tokens - 1) + self._uniform_nats) / math.log(2),
            step_seconds=round(seconds, 6),
            part=sample.part,
            skipped=sample.skipped,
        )
        # Only rank 0 keeps a ledger.
        if self._ledger is not None:
            self.last = self._ledger.append(row)
            for listener in self.listeners:
                listener(self.last)

    def sync(self) -> None:
        """Write and force to the disk what a checkpoint counts on."""
        self.flush()
        if self._ledger is not None:
            self._ledger.sync()

    def close(self) -> None:
        self.flush()
        if self._ledger is not None:
            self._ledger.close()
