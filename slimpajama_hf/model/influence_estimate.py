"""Estimates from gradients how much each of some documents changed the loss of a text.

The estimate is cheap. It chooses which documents are then really left out (`commands/influence.py`).

To first order, an update by a document's gradient g changes the text's loss by -rate * h · P g. h is the gradient of
the text, and P the preconditioner of the optimizer. Here P is computed from the documents themselves. Elementwise it is
the root of the mean squared gradient, as in AdamW, or one for each row of the embeddings. For hidden matrices that
learn by Muon it is the inverse root of the mean of g gᵀ, which makes an average of such gradients orthogonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slimpajama_hf.model.optimization import TOWARDS_ALL_TOKENS, UPDATE_RMS, hidden_matrices, token_embeddings
from slimpajama_hf.settings.update_rules import UpdateRules

#: Directions in which gradients hardly ever point count as if they had this share of the largest eigenvalue.
_FLOOR = 1e-3


def estimate(
    model: Any,
    text: list[int],
    documents: Sequence[list[int]],
    rules: UpdateRules,
    max_grad_norm: float,
    done: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """For each document (token ids), how much it lowered the loss of `text`. The numbers have no unit: only their order
    and signs mean something. `done` is called with the gradients computed so far, of 2 per document."""
    model.train(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_muon = {id(each) for each in hidden_matrices(model)} if rules.by_muon else set()
    by_row = {id(each) for each in token_embeddings(model)} if rules.by_row else set()

    def gradient(ids: list[int]) -> list[torch.Tensor]:
        tokens = torch.tensor([ids], device=model.device)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        found = torch.autograd.grad(loss, parameters)
        norm = torch.stack([each.norm() for each in found]).norm().item()
        # Clipped like the gradient of a step.
        scale = min(1.0, max_grad_norm / norm) if max_grad_norm and norm else 1.0
        return [each * scale for each in found]

    squares = [
        torch.zeros(each.shape[0], each.shape[0]) if id(each) in by_muon else torch.zeros_like(each, device="cpu")
        for each in parameters
    ]
    for number, ids in enumerate(documents, 1):
        for parameter, square, found in zip(parameters, squares, gradient(ids), strict=True):
            own = found.float().cpu()
            square += own @ own.T if id(parameter) in by_muon else own.square()
        done(number)
    steered = []
    for parameter, square, found in zip(parameters, squares, gradient(text), strict=True):
        own, mean = found.float().cpu(), square / len(documents)
        if id(parameter) in by_muon:
            values, vectors = torch.linalg.eigh(mean)
            root = (values.clamp(min=0) + _FLOOR * values.max() + 1e-20).rsqrt()
            # Elements of an orthogonal matrix of this shape have a root mean square of 1/sqrt(longer side).
            length = rules.hidden_rate * UPDATE_RMS * max(parameter.shape) ** 0.5
            steered.append(vectors @ (root[:, None] * (vectors.T @ own)) * length)
        elif id(parameter) in by_row:
            rows = mean.mean(1, keepdim=True)
            mixed = rows ** (1 - TOWARDS_ALL_TOKENS) * rows.mean() ** TOWARDS_ALL_TOKENS
            steered.append(own / (mixed.sqrt() + 1e-8))
        else:
            steered.append(own / (mean.sqrt() + 1e-8))
    estimates = []
    for number, ids in enumerate(documents, 1):
        pairs = zip(gradient(ids), steered, strict=True)
        estimates.append(sum(float((found.float().cpu() * each).sum()) for found, each in pairs))
        done(len(documents) + number)
    return estimates
