"""From the step to the ledger: numbers leave the device without making it wait, and become rows in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.model.transfers import Reading
from slimpajama_hf.record import noise
from slimpajama_hf.record.ledger import Row
from slimpajama_hf.record.spikes import LossSpikes

if TYPE_CHECKING:
    from slimpajama_hf.record.ledger import Ledger
    from slimpajama_hf.record.surprisals import Surprisals
    from slimpajama_hf.samples.sample import Sample
    from slimpajama_hf.training.clock import TrainingClock
    from slimpajama_hf.training.processes import Told


#: Steps that the ledger may lag behind a device before it waits for it.
MOST_BEHIND = 16


def shortest(value: float) -> float:
    """A float32 as the shortest decimal that reads back as the same float32: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


class StepRecorder:
    """Turns finished steps into ledger rows, in order, and tells those who listen.

    `tokens - 1` tokens of a sample are predicted; the first is coded at its uniform cost, ln(vocabulary) nats. Rows
    that the disk does not take are kept and tried again at every later step. `remembered`: rows before a resume.
    `surprisals`: where the loss of every token goes, if it is kept. Of several processes the first has the ledger.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        vocab_size: int,
        remembered: Sequence[dict[str, Any]] = (),
        surprisals: Surprisals | None = None,
        world_size: int = 1,
    ) -> None:
        self._ledger = ledger
        self._world_size = world_size
        self._surprisals = surprisals
        self._uniform_nats = math.log(vocab_size)
        self._waiting: deque[tuple[int, Sample, Reading, float, float, str]] = deque()
        self._unwritten: deque[tuple[Row, np.ndarray]] = deque()
        self._spikes = LossSpikes(row["loss"] for row in remembered if row["loss"] is not None)
        self.not_finite: list[dict[str, Any]] = []
        """The latest rows, unbroken, whose loss or gradient was no number."""
        for row in remembered:
            self._watch(row)
        self.layers: list[str] = []
        """Name of the layer that each parameter of the model belongs to, where noise is measured (`noise.layer_of`)."""
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.trouble: Callable[[str], None] = screen.say
        """Told what is not being saved."""

    @property
    def chain(self) -> str:
        """Hash chain of the ledger up to the last row written."""
        return self._ledger.chain if self._ledger is not None else ""

    @property
    def unwritten(self) -> int:
        """Rows that the disk has not taken."""
        return len(self._unwritten)

    def add(
        self,
        step: int,
        sample: Sample,
        values: torch.Tensor,
        learning_rate: float,
        seconds: float,
        update_skipped: str = "",
    ) -> None:
        """One finished step; `values`, float32, is on the device and is not waited for: loss in nats per token, tokens
        right, gradient norm, 1.0 where the update was skipped because one of them is no number, mean square and mean
        product of some gradients (NaN where noise was not measured), loss of its document after the update and of the
        next one before it (NaN where that was not looked at); the surprisal of each predicted token, nats,
        (tokens - 1,); where noise was measured, mean squares and mean products by parameter, (2 x parameters,)."""
        self._waiting.append((step, sample, Reading(values), learning_rate, seconds, update_skipped))
        while self._waiting and (self._waiting[0][2].here() or len(self._waiting) > MOST_BEHIND):
            self._write(*self._waiting.popleft())

    def flush(self) -> None:
        """Write every step that was added; waits for the device."""
        while self._waiting:
            self._write(*self._waiting.popleft())

    def add_shared(self, told: Told) -> None:
        """One finished step of several samples (`processes.News`)."""
        self._record(
            told.step, told.sample, told.losses, told.correct, told.nats, told.of_step, told.learning_rate,
            told.seconds, "",
        )  # fmt: skip

    def _write(
        self, step: int, sample: Sample, reading: Reading, learning_rate: float, seconds: float, update_skipped: str
    ) -> None:
        values = reading.values().numpy()
        (loss, correct, *of_step), rest = values[:8].tolist(), values[8:]
        nats, of_parameters = rest[: sample.predicted], rest[sample.predicted :].reshape(2, -1)
        self._record(
            step, sample, [loss], [correct], [nats], of_step, learning_rate, seconds,
            update_skipped, noise.of_layers(self.layers, *of_parameters),
        )  # fmt: skip

    def _record(
        self,
        step: int,
        sample: Sample,
        losses: list[float],
        correct: list[float],
        nats: list[np.ndarray],
        of_step: Sequence[float],
        learning_rate: float,
        seconds: float,
        update_skipped: str,
        grad_layers: dict[str, list[float]] | None = None,
    ) -> None:
        grad_norm, not_finite, square, agreement, loss_after, next_loss = of_step
        together = sample.together or [sample]
        predicted = [each.predicted for each in together]
        loss = losses[0]
        if len(together) > 1:
            loss = sum(each * count for each, count in zip(losses, predicted, strict=True)) / sum(predicted)
        loss = shortest(loss)
        tokens = sum(predicted) + len(together)
        first = together[0]
        row = Row(
            step=step,
            loss=loss,
            accuracy=sum(correct) / sum(predicted),
            tokens=tokens,
            text_bytes=sum(each.text_bytes for each in together),
            throughput=round(tokens / seconds, 2),
            learning_rate=learning_rate,
            grad_norm=shortest(grad_norm),
            mirror=first.document.mirror,
            shard=first.document.shard,
            row=first.document.row,
            text_sha1=first.document.sha1,
            domain=first.document.domain,
            tokens_cut=sum(each.tokens_cut for each in together),
            tokens_cut_exact=all(each.tokens_cut_exact for each in together),
            code_bits=(loss * sum(predicted) + len(together) * self._uniform_nats) / math.log(2),
            step_seconds=round(seconds, 6),
            update_skipped=update_skipped or ("not finite" if not_finite else ""),
            spike=self._spikes.score(loss) if math.isfinite(loss) else None,
            grad_square=shortest(square) if math.isfinite(square) else None,
            grad_agreement=shortest(agreement) if math.isfinite(square) else None,
            grad_layers=(grad_layers or {}) if math.isfinite(square) else {},
            loss_after=shortest(loss_after) if math.isfinite(loss_after) else None,
            next_loss=shortest(next_loss) if math.isfinite(next_loss) else None,
            part=first.part,
            skipped=sample.skipped,
            gaps=sample.gaps,
            documents=first.documents,
            samples=self._samples(together, losses, correct) if sample.together else [],
        )
        if self._ledger is not None:
            self._unwritten.append((row, nats[0] if len(nats) == 1 else np.concatenate(nats)))
            record = self._drain() or dict(vars(row))
            self._watch(record)
            for listener in tuple(self.listeners):
                listener(record)

    def _samples(self, together: list[Sample], losses: list[float], correct: list[float]) -> list[dict[str, Any]]:
        return [
            {
                "rank": place % self._world_size,
                "shard": each.document.shard,
                "row": each.document.row,
                "text_sha1": each.document.sha1,
                "domain": each.document.domain,
                "part": each.part,
                "tokens": len(each.input_ids),
                "text_bytes": each.text_bytes,
                "tokens_cut": each.tokens_cut,
                "loss": shortest(losses[place]),
                "accuracy": correct[place] / each.predicted,
                "documents": each.documents,
            }
            for place, each in enumerate(together)
        ]

    def _watch(self, row: dict[str, Any]) -> None:
        if row["update_skipped"] == "not finite":
            self.not_finite.append(row)
        else:
            self.not_finite.clear()

    def _drain(self) -> dict[str, Any] | None:
        """Write what is unwritten, in order; the last row as written, or None while the disk takes nothing."""
        record = None
        assert self._ledger is not None
        before = len(self._unwritten)
        while self._unwritten:
            row, nats = self._unwritten[0]
            try:
                if self._surprisals is not None:
                    self._surprisals.write(nats)
                record = self._ledger.append(row)
            except OSError as error:
                if len(self._unwritten) % 100 == 1:
                    self.trouble(
                        f"not saved: {len(self._unwritten):,} rows of {self._ledger.path} ({error.strerror}); "
                        "training goes on, and every step tries again"
                    )
                return None
            self._unwritten.popleft()
            if self._surprisals is not None:
                self._surprisals.advance(len(nats))
        if before > 1:
            self.trouble(f"{self._ledger.path} is whole again: {before:,} rows were written")
        return record

    def sync(self) -> None:
        """Write and force to the disk what a checkpoint counts on. Raises OSError when the disk does not take it."""
        self.flush()
        if self._ledger is not None:
            self._drain()
            if self._unwritten:
                raise OSError(28, f"{len(self._unwritten):,} rows of the ledger are not on the disk")
            if self._surprisals is not None:
                self._surprisals.sync()
            self._ledger.sync()

    def close(self) -> None:
        """Write what can be written and close the file."""
        self.flush()
        if self._ledger is not None:
            self._drain()
            self._ledger.close()
            if self._surprisals is not None:
                self._surprisals.close()


class AfterEachStep(TrainerCallback):
    """Hands the finished step to the recorder before any other callback sees it."""

    def __init__(
        self,
        clock: TrainingClock,
        begin: Callable[[], None],
        record: Callable[[], bool],
        end: Callable[[], None],
        update: Callable[[bool], None],
    ) -> None:
        self._clock = clock
        self._begin, self._record, self._end, self._update = begin, record, end, update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()
        self._clock.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(True)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer counts it from the start of the session (ignore_data_skip); a resume must not show.
        state.epoch = state.global_step / state.max_steps
        if not self._record():
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()
