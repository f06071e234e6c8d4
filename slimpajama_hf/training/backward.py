"""Whether the step is written out (`gpt2_step.py`) or left to autograd."""

from __future__ import annotations

from typing import Any

from slimpajama_hf import devices
from slimpajama_hf.model.gpt2_step import unsupported


def why_autograd(args: Any, model: Any, backward: str) -> str | None:
    """Why the step of `model` is left to autograd, in words; None where it is written out (`gpt2_step.py`).

    `args`: the training arguments. `backward`: what `--backward` is.
    """
    if backward == "autograd":
        return "--backward autograd"
    if args.world_size > 1 or devices.is_sharded():
        return "several processes, whose gradients meet while autograd still works on the others"
    if args.gradient_accumulation_steps > 1 or args.gradient_checkpointing:
        return "gradient accumulation or checkpointing"
    if args.torch_compile or devices.launcher_compiles():
        return "torch.compile"
    if args.neftune_noise_alpha is not None:
        return "NEFTune noise"
    return unsupported(model)
