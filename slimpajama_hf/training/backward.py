"""Chooses between the written-out step (`gpt2_step.py`) and autograd, and makes the written-out step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slimpajama_hf import devices, screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.model import memory, optimization
from slimpajama_hf.model.gpt2_likeness import unsupported
from slimpajama_hf.model.gpt2_step import GPT2Step
from slimpajama_hf.training.shared_gradient import SharedGradient, begin_equal
from slimpajama_hf.training.shared_rows import open_rows

if TYPE_CHECKING:
    from slimpajama_hf.training.loss_scale import LossScale


def why_autograd(args: Any, model: Any, backward: str) -> str | None:
    """Why autograd computes the step of `model`, in words; None if the step is written out (`gpt2_step.py`).

    `args`: the training arguments. `backward`: the value of `--backward`.
    """
    if backward == "autograd":
        return "--backward autograd"
    if devices.is_sharded():
        return "a sharded model"
    if args.gradient_accumulation_steps > 1 or args.gradient_checkpointing:
        return "gradient accumulation or checkpointing"
    if args.torch_compile or devices.launcher_compiles():
        return "torch.compile"
    if args.neftune_noise_alpha is not None:
        return "NEFTune noise"
    return unsupported(model)


def refuse_reduce_dtype(args: Any, why: str | None, reduce_dtype: str) -> None:
    """Raise UserError if `--reduce_dtype` would have no effect. `why`: the result of `why_autograd`."""
    if reduce_dtype == "float32" or (args.world_size > 1 and why is None):
        return
    reason = f"the step is autograd's ({why})" if args.world_size > 1 else "one process sends no gradients"
    raise UserError(f"--reduce_dtype {reduce_dtype}: {reason}; leave it out (float32)")


def write_out(
    model: Any, args: Any, max_length: int, optimizer: Any, loss_scale: LossScale | None, reduce_dtype: str
) -> tuple[GPT2Step, SharedGradient | None]:
    """The written-out step of `model`, and with several processes the object that sums their gradients, else None.
    `max_length`: tokens of the longest sample. Raises UserError if memory is short."""
    several = args.world_size > 1
    weight = torch.ones((), device=args.device) if several else None
    with memory.said("the buffer of the gradients was made"):
        in_memory = several and args.device.type == "cpu" and reduce_dtype == "float32"
        rows = open_rows([each.numel() for each in model.parameters()]) if in_memory else None
        step = GPT2Step(
            model,
            "float16" if args.fp16 else "bfloat16" if args.bf16 else "float32",
            max_length,
            screen.say,
            optimizer.matrices if isinstance(optimizer, optimization.AdamWWithMuon) else (),
            loss_scale.factor if loss_scale is not None else None,
            weight,
            rows.own if rows is not None else None,
        )
        if weight is None:
            return step, None
        begin_equal(model)
        return step, SharedGradient(step, weight, reduce_dtype, rows)
