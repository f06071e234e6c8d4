"""The numbers of a step: how they leave the device together, and who is who.

To add one, add a field to `StepNumbers`, made by `number`. It is then measured at every step and appears, under its
name, in the ledger, `metrics_history.json`, the experiment trackers, the report and `inspect`.
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
    """A field for a number of our own. `meaning`: in a few words with its unit, as the report shows it. `measure`: from
    the model after the step's update, () or (1,) on its device; what it costs is paid at every step."""
    return dataclasses.field(default=math.nan, metadata={"meaning": meaning, "measure": measure})


@dataclasses.dataclass
class StepNumbers:
    """Numbers of one step: tensors, (), on the device, or floats after `unpack`. NaN: not measured at this step."""

    grad_norm: Any = math.nan
    """L2 norm of the gradient before clipping."""
    not_finite: Any = math.nan
    """1.0 where the update was skipped because loss or gradient is no number."""
    grad_square: Any = math.nan
    """Mean square of the gradients of some documents (`record/noise.py`)."""
    grad_agreement: Any = math.nan
    """Mean product of two of them."""
    loss_after: Any = math.nan
    """Loss of the step's document after its update (`record/teaching.py`)."""
    next_loss: Any = math.nan
    """Loss of the next document before it."""

    def pack(self) -> torch.Tensor:
        """All of them in the order of the fields, (fields,) float32, on the device of the norm."""
        like = self.grad_norm
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return torch.stack(
            [
                value.to(like.device, torch.float32).reshape(())
                if isinstance(value, torch.Tensor)
                # Filled there, not sent there: nothing waits.
                else torch.full((), value, dtype=torch.float32, device=like.device)
                for value in values
            ]
        )

    @classmethod
    def unpack(cls, values: np.ndarray) -> StepNumbers:
        """From what `pack` has made, (fields,)."""
        return cls(*values.tolist())

    def added(self) -> dict[str, float]:
        """The numbers that were made by `number`, by name."""
        return {field.name: getattr(self, field.name) for field in _added(type(self))}

    def measure(self, model: Any) -> None:
        """Take the numbers that were made by `number` from the model as it is now."""
        with torch.no_grad():
            for field in _added(type(self)):
                setattr(self, field.name, field.metadata["measure"](model))

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What each number that was made by `number` means, by its name."""
        return {field.name: field.metadata["meaning"] for field in _added(cls)}


def _added(numbers: type[StepNumbers]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(numbers) if "measure" in field.metadata]


@dataclasses.dataclass
class SampleNumbers:
    """What one sample of a step gave, on the host."""

    loss: float
    """Mean over its predicted tokens, nats."""
    correct: float
    """Predicted tokens that were right."""
    nats: np.ndarray
    """Surprisal of each predicted token, (predicted,) float32."""

    @staticmethod
    def pack(loss: torch.Tensor, correct: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
        """The three of them in one, (2 + predicted,) float32, on their device."""
        return torch.cat([torch.stack([loss.detach().float(), correct.float()]), nats])

    @classmethod
    def unpack(cls, values: np.ndarray) -> SampleNumbers:
        """From what `pack` has made."""
        loss, correct = values[:2].tolist()
        return cls(loss, correct, values[2:])


@dataclasses.dataclass
class Step:
    """A finished step. Its numbers travel beside it in one tensor (`pack`) until `unpacked` gives it them."""

    step: int
    sample: Sample
    learning_rate: float
    seconds: float
    """Training time."""
    update_skipped: str = ""
    """Why the update was skipped, where that is known before the numbers are."""
    numbers: StepNumbers = dataclasses.field(default_factory=StepNumbers)
    samples: list[SampleNumbers] = dataclasses.field(default_factory=list)
    """Of all its samples, in the order of the stream."""
    by_parameter: np.ndarray | None = None
    """Where noise was measured, mean squares and mean products by parameter, (2, parameters)."""
    mean: tuple[float, float] | None = None
    """Loss and accuracy of a step of another trainer, of whose samples no one knows them one by one."""

    def unpacked(self, values: np.ndarray) -> Step:
        """The same step of one sample with its numbers, from what `pack` has made of them."""
        numbers, rest = split(values)
        sample, by_parameter = np.split(rest, [2 + self.sample.predicted])
        return dataclasses.replace(
            self, numbers=numbers, samples=[SampleNumbers.unpack(sample)], by_parameter=by_parameter.reshape(2, -1)
        )


def pack(numbers: StepNumbers, samples: list[torch.Tensor], by_parameter: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers of a step in one float32 tensor on the device: its own, then those of its samples (packed), then the
    noise by parameter."""
    parts = [numbers.pack(), *samples]
    if by_parameter is not None:
        parts.append(by_parameter.view(-1))
    return torch.cat(parts)


def split(values: np.ndarray) -> tuple[StepNumbers, np.ndarray]:
    """What `pack` has put first, and the rest."""
    count = len(dataclasses.fields(StepNumbers))
    return StepNumbers.unpack(values[:count]), values[count:]
