"""At which rate a parameter learns: matrices inside the blocks at a share of `--learning_rate` (`--hidden_rate`).

Adam moves every weight by about the rate, whatever its gradient; what a matrix adds to its output grows with the number
of its inputs that move together. So hidden matrices want a smaller rate than embeddings, norms and biases (Yang et al.
2022, arXiv 2203.03466, table 3: by 1/width; here a tenth was right at widths 128 and 256). At one document a step this
is most of what a recipe can give: docs/recipe.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of two dimensions or more that are neither an embedding nor the output head."""
    outside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside |= {id(parameter) for parameter in head.parameters()}
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2 and id(parameter) not in outside]


def slow_down_hidden_matrices(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Move hidden matrices into groups of their own, behind the others, that learn at `rate` times the others' rate."""
    hidden = {id(parameter) for parameter in hidden_matrices(model)}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in hidden]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in hidden]
            options: dict[str, Any] = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group(options | {"params": moved, "lr": group["lr"] * rate})
