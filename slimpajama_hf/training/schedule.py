"""The learning rate of a step, and what a resumed optimizer goes on with."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

#: What of a group of parameters is state, or follows from the schedule; all else was chosen by flags.
_NOT_CHOSEN = ("params", "steps", "lr")


def get_learning_rate(step: int, learning_rate: float, warmup_steps: int) -> float:
    """`learning_rate * min(1, (step + 1) / warmup_steps)`: linear warm-up, then constant."""
    return learning_rate * min(1.0, (step + 1) / max(warmup_steps, 1))


def chosen(scheduler: LambdaLR) -> list[dict[str, Any]]:
    """The options of each group of an optimizer that was just made: rates before the schedule, decay, betas."""
    groups = scheduler.optimizer.param_groups
    return [{name: value for name, value in group.items() if name not in _NOT_CHOSEN} for group in groups]


def choose_again(scheduler: LambdaLR, options: list[dict[str, Any]]) -> None:
    """Go on with these options. A checkpoint that was loaded has put its own in their place: what `--allow_changes`
    allowed would have no effect."""
    scheduler.base_lrs = [group["initial_lr"] for group in options]
    for group, own, multiply in zip(scheduler.optimizer.param_groups, options, scheduler.lr_lambdas, strict=True):
        group.update(own, lr=own["initial_lr"] * multiply(scheduler.last_epoch))
