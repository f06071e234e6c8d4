"""The learning rate of a step, and the optimizer's options after a resume."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

#: Entries of a parameter group that are state or follow from the schedule; flags choose all others.
_NOT_CHOSEN = ("params", "steps", "lr")


def get_learning_rate(step: int, learning_rate: float, warmup_steps: int) -> float:
    """`learning_rate * min(1, (step + 1) / warmup_steps)`: linear warm-up, then constant."""
    return learning_rate * min(1.0, (step + 1) / max(warmup_steps, 1))


def chosen(scheduler: LambdaLR) -> list[dict[str, Any]]:
    """The options of each group of a new optimizer: rates before the schedule, decay, betas."""
    groups = scheduler.optimizer.param_groups
    return [{name: value for name, value in group.items() if name not in _NOT_CHOSEN} for group in groups]


def choose_again(scheduler: LambdaLR, options: list[dict[str, Any]]) -> None:
    """Set these options again. Loading a checkpoint has replaced them by its own, and changes that `--allow_changes`
    permits would have no effect."""
    scheduler.base_lrs = [group["initial_lr"] for group in options]
    for group, own, multiply in zip(scheduler.optimizer.param_groups, options, scheduler.lr_lambdas, strict=True):
        group.update(own, lr=own["initial_lr"] * multiply(scheduler.last_epoch))
