"""The floating-point operations of a step, and how fast this machine multiplies matrices; MFU is computed from both."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

#: For how many seconds the rate is measured, after one product that is not counted.
MEASURED_SECONDS = 0.25

#: Sides of the matrices. The first whose product takes `_LEAST_SECONDS` is used: GPUs are at their best at large sizes.
_SIDES = (1024, 2048, 4096, 8192)
_LEAST_SECONDS = 0.01


def of_step(model: Any) -> tuple[float, float]:
    """`(a, b)`: a step on T tokens takes about a T + b T^2 operations, forward and backward.

    Counted as PaLM does for model FLOPs utilization (arXiv 2204.02311, appendix B): 6 per token and weight of a linear
    layer, 12 per layer, channel and pair of tokens. Recomputation and the optimizer do not count.
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D))
    config = model.config
    return 6.0 * linear, 12.0 * config.num_hidden_layers * config.hidden_size


def measured_rate(device: torch.device, precision: str) -> float:
    """Operations per second of large square matrix products in `precision`, by the fastest one within
    `MEASURED_SECONDS`. A product of side n counts as 2 n^3 operations."""
    dtype = getattr(torch, precision)
    with torch.no_grad():
        for side in _SIDES:
            left = torch.ones(side, side, device=device, dtype=dtype)
            _seconds(left, device)
            best = _seconds(left, device)
            if best >= _LEAST_SECONDS:
                break
        end = time.perf_counter() + MEASURED_SECONDS
        while time.perf_counter() < end:
            best = min(best, _seconds(left, device))
    return 2.0 * side**3 / best if best > 0 else math.nan


def _seconds(left: torch.Tensor, device: torch.device) -> float:
    start = time.perf_counter()
    torch.mm(left, left)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
