"""The learning rate of a step."""

from __future__ import annotations


def get_learning_rate(step: int, learning_rate: float, warmup_steps: int) -> float:
    """The rate that optimizer step `step` (from 0) trains at: `lr * min(1, (step + 1) / warmup)`, never 0."""
    return learning_rate * min(1.0, (step + 1) / max(warmup_steps, 1))
