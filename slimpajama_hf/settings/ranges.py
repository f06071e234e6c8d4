"""Refuse numbers of `TrainingArguments` that cannot work. Libraries answer some with a traceback, others not at all.

To add a check, add a row to `RANGES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_Range = tuple[Callable[[float], bool], str]

_ABOVE_0: _Range = (lambda value: 0 < value < math.inf, "a number above 0")
_0_OR_MORE: _Range = (lambda value: 0 <= value < math.inf, "a number, 0 or more")
_BETA: _Range = (lambda value: 0 <= value < 1, "a number from 0 to below 1")
_1_OR_MORE: _Range = (lambda value: value >= 1, "1 or more")

#: Flag -> (whether a value is right, what is expected in words). A flag that is None is not checked.
RANGES: dict[str, _Range] = {
    # NumPy's generator takes no other seed.
    "seed": (lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}"),
    "learning_rate": _ABOVE_0,
    "warmup_steps": (lambda value: 0 <= value < math.inf, "a number of steps, or below 1 a share of --max_steps"),
    "weight_decay": _0_OR_MORE,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _0_OR_MORE,
    "max_grad_norm": (lambda value: 0 <= value < math.inf, "the longest gradient, or 0 to clip none"),
    "neftune_noise_alpha": _0_OR_MORE,
    "max_steps": (lambda value: value >= 1, "the number of documents to learn, 1 or more"),
    "save_steps": (lambda value: 0 < value < math.inf, "a number of steps above 0, or --no-checkpoint"),
    "save_total_limit": (lambda value: value >= 1, "the number of checkpoints to keep, 1 or more, or --no-checkpoint"),
    "eval_steps": (lambda value: 0 < value < math.inf, "a number of steps above 0"),
    "eval_delay": _0_OR_MORE,
    "gradient_accumulation_steps": (
        lambda value: value >= 1, "how many documents each process puts into a step, 1 or more"
    ),
    "ddp_timeout": (lambda value: value >= 1, "seconds, 1 or more"),
    "ddp_bucket_cap_mb": _1_OR_MORE,
}  # fmt: skip


def refuse(arguments: Any) -> None:
    """Raise ValueError for the first field of `arguments` that is outside its range; the message names the flag."""
    for name, (is_right, expected) in RANGES.items():
        value = getattr(arguments, name, None)
        # NaN is outside every range.
        if value is not None and not is_right(value):
            said = f"{value:g}" if isinstance(value, float) else value
            raise ValueError(f"--{name} {said}: expected {expected}")
