"""When it is looked at what a step teaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimpajama_hf.record import teaching

if TYPE_CHECKING:
    from slimpajama_hf.samples.sample import Sample


def is_due(step: int) -> bool:
    """Whether it is looked at what `step` teaches."""
    return step % teaching.STEPS_BETWEEN == teaching.STEPS_BETWEEN - 1


def is_new(sample: Sample) -> bool:
    """Whether the sample that comes next is of another document than the one before it, and in its first pass."""
    return sample.part == 0 and sample.after.epoch == 0
