"""The numbers of a step, and how they travel from the device together.

To add a number, add a field to `StepNumbers` by `number`. It is measured at every step and appears under its name in
the ledger, `metrics_history.json`, the experiment trackers, the report and `inspect`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from slimpajama_hf.samples.sample import Sample


def number(meaning: str, measure: Callable[[Any], torch.Tensor]) -> Any:
    """A field for a further number. `meaning`: a few words with the unit, for the report. `measure`: from the model
    after the update to () or (1,) on its device; every step pays for it."""
    return dataclasses.field(default=math.nan, metadata={"meaning": meaning, "measure": measure})


@dataclasses.dataclass
class StepNumbers:
    """Numbers of one step: tensors, (), on the device, or floats after `unpack`. NaN: not measured at this step."""

    grad_norm: Any = math.nan
    """L2 norm of the gradient before clipping."""
    not_finite: Any = math.nan
    """1.0 if the update was skipped because loss or gradient is not finite."""
    grad_square: Any = math.nan
    """Mean square of the gradients of several documents (`record/noise.py`)."""
    grad_agreement: Any = math.nan
    """Mean product of two of these gradients."""
    loss_after: Any = math.nan
    """Loss of the step's document after its update (`record/teaching.py`)."""
    next_loss: Any = math.nan
    """Loss of the next document before this update."""

    def pack(self) -> torch.Tensor:
        """All numbers in the order of the fields, (fields,) float32, on the device of the norm."""
        like = self.grad_norm
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return torch.stack(
            [
                value.to(like.device, torch.float32).reshape(())
                if isinstance(value, torch.Tensor)
                # Filled on the device: sending it there would wait.
                else torch.full((), value, dtype=torch.float32, device=like.device)
                for value in values
            ]
        )

    @classmethod
    def unpack(cls, values: np.ndarray) -> StepNumbers:
        """The numbers from the result of `pack`, (fields,)."""
        return cls(*values.tolist())

    def added(self) -> dict[str, float]:
        """The numbers that were made by `number`, by name."""
        return {field.name: getattr(self, field.name) for field in _added(type(self))}

    def measure(self, model: Any) -> None:
        """Measure the numbers that were made by `number`, from the model as it is now."""
        with torch.no_grad():
            for field in _added(type(self)):
                setattr(self, field.name, field.metadata["measure"](model))

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """The meaning of each number that was made by `number`, by name."""
        return {field.name: field.metadata["meaning"] for field in _added(cls)}


def _added(numbers: type[StepNumbers]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(numbers) if "measure" in field.metadata]


@dataclasses.dataclass
class SampleNumbers:
    """The numbers of one sample of a step, on the host."""

    loss: float
    """Mean over its predicted tokens, nats."""
    correct: float
    """How many tokens were predicted right."""
    nats: np.ndarray
    """Surprisal of each predicted token, (predicted,) float32."""

    @staticmethod
    def pack(loss: torch.Tensor, correct: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
        """All three in one tensor, (2 + predicted,) float32, on their device."""
        return torch.cat([torch.stack([loss.detach().float(), correct.float()]), nats])

    @classmethod
    def unpack(cls, values: np.ndarray) -> SampleNumbers:
        """The numbers from the result of `pack`."""
        loss, correct = values[:2].tolist()
        return cls(loss, correct, values[2:])


@dataclasses.dataclass
class Step:
    """A finished step. Until `unpacked` adds them, its numbers travel beside it in one tensor (`pack`)."""

    step: int
    sample: Sample
    learning_rate: float
    seconds: float
    """Training time."""
    update_skipped: str = ""
    """Why the update was skipped, if that is known before the numbers are."""
    numbers: StepNumbers = dataclasses.field(default_factory=StepNumbers)
    samples: list[SampleNumbers] = dataclasses.field(default_factory=list)
    """One for each sample, in the order of the stream."""
    by_parameter: np.ndarray | None = None
    """Mean squares and mean products of gradients by parameter, (2, parameters); None if noise was not measured."""
    mean: tuple[float, float] | None = None
    """Loss and accuracy of a step of another trainer, which does not tell those of single samples."""

    def unpacked(self, values: np.ndarray) -> Step:
        """This step of one sample with its numbers, from the result of `pack`."""
        numbers, rest = split(values)
        sample, by_parameter = np.split(rest, [2 + self.sample.predicted])
        return dataclasses.replace(
            self, numbers=numbers, samples=[SampleNumbers.unpack(sample)], by_parameter=by_parameter.reshape(2, -1)
        )


def pack(numbers: StepNumbers, samples: list[torch.Tensor], by_parameter: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers of a step in one float32 tensor on the device: of the step, of its samples (packed), and the noise
    by parameter."""
    parts = [numbers.pack(), *samples]
    if by_parameter is not None:
        parts.append(by_parameter.view(-1))
    return torch.cat(parts)


def split(values: np.ndarray) -> tuple[StepNumbers, np.ndarray]:
    """The step's numbers from the result of `pack`, and the rest."""
    count = len(dataclasses.fields(StepNumbers))
    return StepNumbers.unpack(values[:count]), values[count:]
