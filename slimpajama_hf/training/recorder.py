"""Takes the numbers of each step from the device without making it wait, and writes them to the ledger in order."""

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
    from slimpajama_hf.training.step_numbers import Step


#: How many steps the ledger may be behind the device before it waits for the device.
MOST_BEHIND = 16


_NO_NATS = np.zeros(0, np.float32)


def shortest(value: float) -> float:
    """A float32 as the shortest decimal that reads back as the same float32: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(value))) if math.isfinite(value) else value


def _known(value: float) -> float | None:
    return shortest(value) if math.isfinite(value) else None


class StepRecorder:
    """Turns finished steps into ledger rows, in order, and calls the listeners.

    `tokens - 1` tokens of a sample are predicted; the first costs ln(vocabulary) nats. If the disk does not take a row,
    it is kept and tried again at every later step. `remembered`: rows before a resume. `surprisals`: where the loss of
    every token is kept, if it is. With several processes, only the first has a ledger.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        vocab_size: int,
        remembered: Sequence[dict[str, Any]] = (),
        surprisals: Surprisals | None = None,
    ) -> None:
        self._ledger = ledger
        self._surprisals = surprisals
        self._uniform_nats = math.log(vocab_size)
        self._waiting: deque[tuple[Step, Reading]] = deque()
        self._unwritten: deque[tuple[Row, np.ndarray]] = deque()
        self._spikes = LossSpikes(row["loss"] for row in remembered if row["loss"] is not None)
        self.not_finite: list[dict[str, Any]] = []
        """The rows at the end of the ledger, in a row, whose loss or gradient was not finite."""
        for row in remembered:
            self._watch(row)
        self.layers: list[str] = []
        """The layer of each parameter of the model, if noise is measured (`noise.layer_of`)."""
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    @property
    def chain(self) -> str:
        """Hash chain of the ledger up to the last row written."""
        return self._ledger.chain if self._ledger is not None else ""

    @property
    def unwritten(self) -> int:
        """How many rows the disk has not taken."""
        return len(self._unwritten)

    def add(self, step: Step, values: torch.Tensor) -> None:
        """Add a finished step of one sample. Its numbers (`step_numbers.pack`) are on the device and not waited for."""
        self._waiting.append((step, Reading(values)))
        while self._waiting and (self._waiting[0][1].here() or len(self._waiting) > MOST_BEHIND):
            self._write(*self._waiting.popleft())

    def flush(self) -> None:
        """Write every step that was added; waits for the device."""
        while self._waiting:
            self._write(*self._waiting.popleft())

    def _write(self, step: Step, reading: Reading) -> None:
        self.record(step.unpacked(reading.values().numpy()))

    def record(self, step: Step) -> None:
        """Record a finished step, whose numbers and samples are all known on the host."""
        sample, numbers, seconds = step.sample, step.numbers, step.seconds
        losses, correct = [each.loss for each in step.samples], [each.correct for each in step.samples]
        nats = [each.nats for each in step.samples]
        square, agreement = _known(numbers.grad_square), _known(numbers.grad_agreement)
        layers = noise.of_layers(self.layers, *step.by_parameter) if step.by_parameter is not None else {}
        together = sample.together or [sample]
        predicted = [each.predicted for each in together]
        if step.mean is not None:
            loss, accuracy = step.mean
        else:
            loss, accuracy = losses[0], sum(correct) / sum(predicted)
            if len(together) > 1:
                loss = sum(each * count for each, count in zip(losses, predicted, strict=True)) / sum(predicted)
        loss = shortest(loss)
        tokens = sum(predicted) + len(together)
        first = together[0]
        row = Row(
            step=step.step,
            loss=loss,
            accuracy=accuracy,
            tokens=tokens,
            text_bytes=sum(each.text_bytes for each in together),
            throughput=round(tokens / seconds, 2),
            learning_rate=step.learning_rate,
            grad_norm=shortest(numbers.grad_norm),
            mirror=first.document.mirror,
            shard=first.document.shard,
            row=first.document.row,
            text_sha1=first.document.sha1,
            domain=first.document.domain,
            tokens_cut=sum(each.tokens_cut for each in together),
            tokens_cut_exact=all(each.tokens_cut_exact for each in together),
            code_bits=(loss * sum(predicted) + len(together) * self._uniform_nats) / math.log(2),
            step_seconds=round(seconds, 6),
            update_skipped=step.update_skipped or ("not finite" if numbers.not_finite else ""),
            spike=self._spikes.score(loss) if math.isfinite(loss) else None,
            grad_square=square,
            grad_agreement=agreement if square is not None else None,
            grad_layers=layers if square is not None else {},
            loss_after=_known(numbers.loss_after),
            next_loss=_known(numbers.next_loss),
            part=first.part,
            skipped=sample.skipped,
            gaps=sample.gaps,
            documents=first.documents,
            samples=self._samples(step, together) if sample.together else [],
            added={name: shortest(value) for name, value in numbers.added().items()},
        )
        if self._ledger is not None:
            self._unwritten.append((row, nats[0] if len(nats) == 1 else np.concatenate([_NO_NATS, *nats])))
            record = self._drain() or row.as_dict()
            self._watch(record)
            for listener in tuple(self.listeners):
                listener(record)

    def _samples(self, step: Step, together: list[Sample]) -> list[dict[str, Any]]:
        found = []
        for place, each in enumerate(together):
            sample = {
                "rank": each.rank,
                "shard": each.document.shard,
                "row": each.document.row,
                "text_sha1": each.document.sha1,
                "domain": each.document.domain,
                "part": each.part,
                "tokens": each.tokens,
                "text_bytes": each.text_bytes,
                "tokens_cut": each.tokens_cut,
            }
            if step.mean is None:
                own = step.samples[place]
                sample |= {"loss": shortest(own.loss), "accuracy": own.correct / each.predicted}
            found.append(sample | {"documents": each.documents})
        return found

    def _watch(self, row: dict[str, Any]) -> None:
        if row["update_skipped"] == "not finite":
            self.not_finite.append(row)
        else:
            self.not_finite.clear()

    def _drain(self) -> dict[str, Any] | None:
        """Write waiting rows, in order. Returns the last row as written, or None if the disk does not take one."""
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
                    screen.say(
                        f"not saved: {len(self._unwritten):,} rows of {self._ledger.path} ({error.strerror}); "
                        "training goes on, and every step tries again"
                    )
                return None
            self._unwritten.popleft()
            if self._surprisals is not None:
                self._surprisals.advance(len(nats))
        if before > 1:
            screen.say(f"{self._ledger.path} is whole again: {before:,} rows were written")
        return record

    def write_all(self) -> None:
        """Write everything that a checkpoint refers to. Raises OSError if the disk does not take it."""
        self.flush()
        if self._ledger is not None:
            self._drain()
            if self._unwritten:
                raise OSError(28, f"{len(self._unwritten):,} rows of the ledger are not on the disk")

    def sync(self) -> None:
        """Flush written rows to the disk. Raises OSError if the disk does not take them."""
        if self._surprisals is not None:
            self._surprisals.sync()
        if self._ledger is not None:
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
    """Lets the recorder have each finished step before any other callback sees it."""

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
        # The Trainer counts epochs from the start of the session (ignore_data_skip), which would differ after a resume.
        state.epoch = state.global_step / state.max_steps
        if not self._record():
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()
