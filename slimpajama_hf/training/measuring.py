"""Measures the noise of gradients and what a step teaches, while the training clock is paused.

`Measuring` is called three times per step: before its documents are taken (`look_ahead`), to compute its gradient
(`gradient`), and after its update (`after`).
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from slimpajama_hf import screen
from slimpajama_hf.model import memory, transfers
from slimpajama_hf.record import noise, teaching
from slimpajama_hf.training.step_numbers import StepNumbers

if TYPE_CHECKING:
    from slimpajama_hf.model.gpt2_step import GPT2Step, Result
    from slimpajama_hf.samples.sample import Sample
    from slimpajama_hf.training.clock import TrainingClock
    from slimpajama_hf.training.loss_scale import LossScale

#: What can be left out for lack of memory, in words.
MEASURED = {
    "noise": "the gradients of other documents (the noise scale)",
    "teaching": "the loss of a document before or after another's update (what documents teach)",
    "evaluation": "scores on held-out documents",
}
_Found = TypeVar("_Found")


def is_due(step: int) -> bool:
    """Whether it is measured what `step` teaches."""
    return step % teaching.STEPS_BETWEEN == teaching.STEPS_BETWEEN - 1


def is_new(sample: Sample) -> bool:
    """Whether the next sample begins another document than the one before, in the first pass over the corpus."""
    return sample.part == 0 and sample.after.epoch == 0


class Measuring:
    """Measures at the weights of a written-out step (`gpt2_step.py`); before `begin` it measures nothing.

    If the device has no memory for a measurement, it is left out, counted and reported, and training goes on.
    """

    def __init__(self, clock: TrainingClock) -> None:
        self._clock = clock
        self._step: GPT2Step | None = None
        self._unmeasured = torch.tensor(math.nan)
        self.ahead: deque[dict[str, Any]] = deque()
        """Batches that were read before their step, for a measurement at the weights of an earlier step."""
        self.seconds = 0.0
        """Seconds that measuring took in this session."""
        self.left_out: Counter[str] = Counter()
        """How often each kind of measurement was left out in this session for lack of memory."""
        self.forget()

    def forget(self) -> None:
        """Forget the numbers of the last step."""
        none = self._unmeasured
        self.numbers = StepNumbers(grad_square=none, grad_agreement=none, loss_after=none, next_loss=none)
        """The numbers of the current step."""
        self.noise_by_parameter: torch.Tensor | None = None
        """`grad_square` and `grad_agreement` of each parameter's part, (2, parameters); None if not measured."""

    def on(self, device: torch.device) -> None:
        """Tell on which device training computes."""
        self._unmeasured = torch.full((), math.nan, device=device)
        self.forget()

    def begin(
        self, step: GPT2Step, max_grad_norm: float, loss_scale: LossScale | None, documents_are_whole: bool
    ) -> None:
        """Measure from now on with `step`. `max_grad_norm`: the clipping norm, 0 for no clipping.
        `documents_are_whole`: each sample is of one document, so it can be measured what it teaches."""
        self._step, self._limit, self._loss_scale = step, max_grad_norm or math.inf, loss_scale
        self._teaches = documents_are_whole

    def _is_noise_due(self, number: int) -> bool:
        return self._step is not None and number % noise.STEPS_BETWEEN == noise.STEPS_BETWEEN - 1

    def _is_teaching_due(self, number: int) -> bool:
        return self._step is not None and self._teaches and is_due(number)

    def look_ahead(self, number: int, batches: Iterator) -> None:
        """Read the further documents that a measurement needs in advance; each still gets its own step."""
        needed = 2 if self._is_teaching_due(number) else 0
        if self._is_noise_due(number):
            needed = noise.DOCUMENTS
        if needed:
            with self._clock.paused():
                while len(self.ahead) < needed and (batch := next(batches, None)) is not None:
                    self.ahead.append(batch)

    def gradient(self, number: int, input_ids: torch.Tensor) -> Result:
        """Loss and gradient of step `number` on its sample, (T,) on the host; measures at its weights if it is due."""
        step = self._step
        assert step is not None
        if self._is_teaching_due(number):
            following = self._measured(number, "teaching", self._next_loss)
            self.numbers.next_loss = self._unmeasured if following is None else following
        others = self._measured(number, "noise", self._other_gradients) if self._is_noise_due(number) else None
        result = None
        try:
            result = step(input_ids)
        except Exception as error:
            if others is None or not memory.is_out(error):
                raise
        if result is None:
            # Memory was short because of the others' gradients. The step is made again without them, as a whole.
            others = None
            self._leave_out(number, "noise")
            result = step(input_ids)
        if others is not None:
            compared = self._measured(number, "noise", functools.partial(self._compare, *others))
            if compared is not None:
                (self.numbers.grad_square, self.numbers.grad_agreement), self.noise_by_parameter = compared
        return result

    def after(self, number: int, sample: Sample, not_finite: torch.Tensor) -> None:
        """Measure after the update of step `number`. `not_finite`: 1.0 if the update was skipped, (), on the device."""
        if self._is_teaching_due(number):
            taught = self._measured(number, "teaching", functools.partial(self._look_back, sample, not_finite))
            self.numbers.loss_after, self.numbers.next_loss = taught or (self._unmeasured, self._unmeasured)

    # ---- within time and memory ----

    def _measured(self, number: int, kind: str, measure: Callable[[], _Found]) -> _Found | None:
        """As `unless_out_of_memory`, with the training clock paused and the time counted. It waits for the device
        before and after, which is acceptable because it is rare."""
        device = self._unmeasured.device
        transfers.wait_for(device)
        began = time.perf_counter()
        with self._clock.paused():
            found = self.unless_out_of_memory(number, kind, measure)
            transfers.wait_for(device)
        self.seconds += time.perf_counter() - began
        return found

    def unless_out_of_memory(self, number: int, kind: str, measure: Callable[[], _Found]) -> _Found | None:
        """The result of `measure`; None if the device has no memory for it. `kind`: one of `MEASURED`."""
        try:
            return measure()
        except Exception as error:
            if not memory.is_out(error):
                raise
        self._leave_out(number, kind)
        return None

    def _leave_out(self, number: int, kind: str) -> None:
        """Count what is not measured for lack of memory, and say so the first time."""
        memory.give_back()
        self.left_out[kind] += 1
        if self.left_out[kind] == 1:
            screen.say(
                f"step {number}: out of memory for {MEASURED[kind]}, which is left out; training goes on, and the next "
                "time it is tried again"
            )

    # ---- noise ----

    def _other_gradients(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """The next documents at the weights of this step: the sum of their clipped gradients, the summed squared norms
        of each parameter's part, (parameters,), and how many they are. None if there are none."""
        assert self._step is not None
        others = list(self.ahead)[: noise.DOCUMENTS - 1]
        if not others:
            return None
        total = torch.zeros_like(self._step.gradients)
        squares: torch.Tensor | None = None
        for batch in others:
            self._step(batch["input_ids"][0])
            added = self._add_clipped(total)
            squares = added if squares is None else squares + added
        assert squares is not None
        return total, squares, len(others)

    def _add_clipped(self, total: torch.Tensor) -> torch.Tensor:
        """Add the gradient in the buffer to `total` as the optimizer would see it. Returns the squared norm of each
        parameter's part, (parameters,)."""
        assert self._step is not None
        squares = self._step.squared_norms()
        share = (self._limit / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
        scaled = share if self._loss_scale is None else share / self._loss_scale.factor
        total.addcmul_(self._step.gradients, scaled)
        return squares * share * share

    def _compare(
        self, total: torch.Tensor, squares: torch.Tensor, others: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Mean square of the step's and the others' gradients, and mean product of any two: of the whole gradient, ()
        each, and of each parameter's part, (2, parameters)."""
        assert self._step is not None
        squares = squares + self._add_clipped(total)
        count = others + 1
        products = (self._step.squared_norms(total) - squares) / (count * others)
        return (squares.sum() / count, products.sum()), torch.stack([squares / count, products])

    # ---- teaching ----

    def _next_loss(self) -> torch.Tensor | None:
        """Loss of the next document at these weights; None if the next sample does not begin a new document."""
        assert self._step is not None
        if not self.ahead or not is_new(self.ahead[0]["sample"]):
            return None
        return self._step.loss_alone(self.ahead[0]["input_ids"][0])

    def _look_back(self, sample: Sample, not_finite: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the step's document after its update, and of the next document before it; NaN if the update was
        skipped."""
        assert self._step is not None
        losses = self._step.loss_alone(torch.tensor(sample.input_ids)), self.numbers.next_loss
        # Chosen on the device, so that nothing waits.
        after, following = (torch.where(not_finite > 0, self._unmeasured, loss) for loss in losses)
        return after, following
