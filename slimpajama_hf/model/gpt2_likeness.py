"""Tells which models the written-out code of GPT-2 can compute (`gpt2_step.py`, `gpt2_writing.py`)."""

from __future__ import annotations

from typing import Any

import torch


def unlike_gpt2(model: Any) -> str | None:
    """Why the written-out code of GPT-2 does not compute `model`, in words; None if it does."""
    from transformers import GPT2LMHeadModel

    if type(model) is not GPT2LMHeadModel:
        return f"it is a {type(model).__name__}, not GPT-2"
    config = model.config
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"its activation is {config.activation_function}"
    if config.add_cross_attention or config.reorder_and_upcast_attn:
        return "its attention is not GPT-2's usual one"
    return None


def unsupported(model: Any) -> str | None:
    """Why `gpt2_step.py` cannot train `model`, in words; None if it can."""
    reason = unlike_gpt2(model)
    if reason is not None:
        return reason
    config = model.config
    if config.resid_pdrop or config.embd_pdrop or config.attn_pdrop:
        return "it has dropout"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing is on"
    if any(not p.requires_grad or p.dtype != torch.float32 for p in model.parameters()):
        return "not all of its weights are trained in float32"
    return None
