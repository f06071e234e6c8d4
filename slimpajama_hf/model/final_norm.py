"""The last norm before the output head, in any model, and how strong it begins.

If head and embeddings are one matrix, a token whose embedding begins long predicts itself first of all. With a smaller
weight of the last norm all begin nearly as likely as each other, however long their embeddings are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def begin_at(model: Any, factor: float) -> bool:
    """Multiply the weight of the last norm of a fresh model, and so its logits, by `factor`. Returns False, and changes
    nothing, if head and embeddings are two matrices, or if no norm alone makes what the head reads."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        return False
    norm, before = _last_norm(model, head)
    if norm is None:
        return False
    with torch.no_grad():
        norm.weight.mul_(factor)
        _, after = _last_norm(model, head)
        # Not so for a norm with a bias that is not 0, or one that adds 1 to its weight.
        if torch.allclose(after, factor * before, rtol=1e-3, atol=1e-6):
            return True
        norm.weight.div_(factor)
    return False


def _last_norm(model: Any, head: Any) -> tuple[Any, torch.Tensor]:
    """The module whose output the head reads, if its weight is a vector, else None; and what the head reads."""
    made: list[tuple[nn.Module, torch.Tensor]] = []
    read: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            made.append((module, output))

    vectors = [each for each in model.modules() if getattr(getattr(each, "weight", None), "ndim", 0) == 1]
    hooks = [each.register_forward_hook(note) for each in vectors]
    hooks.append(head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0])))
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=head.weight.device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    # Outputs are kept, so no other tensor has their place in memory.
    found = [module for module, output in made if output.data_ptr() == read[0].data_ptr()]
    return (found[-1] if found else None), read[0].clone()
