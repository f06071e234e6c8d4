"""`noise_scale`: how noisy the gradient of a batch is, at the weights of any model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from slimpajama_hf.errors import UserError
from slimpajama_hf.record import noise
from slimpajama_hf.record.noise import NoiseScale


def noise_scale(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, measurements: int = 10, at_once: int = noise.DOCUMENTS
) -> NoiseScale | None:
    """The gradient noise scale B = tr(S) / |G|^2 at the weights of `model`, in batches of the given kind.

        found = noise_scale(model, DataLoader(stream, batch_size=1, collate_fn=stream.collate))
        print(found and f"{found.value:.0f} documents ({found.low:.0f} to {found.high})")

    Far below it, a batch twice as large is worth twice the steps (McCandlish et al. 2018, arXiv 1812.06162). Takes
    `measurements` times `at_once` batches; `model(**batch)` must return a `loss`. There is one backward per batch.
    Gradients of the model are restored afterwards, and no weight is changed. None: no significant signal, or too few
    batches. Raises UserError if the model returns no loss.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    before = [each.grad for each in parameters]
    device = parameters[0].device
    squares, agreements, rest = [], [], iter(batches)
    try:
        for _ in range(measurements):
            taken = list(itertools.islice(rest, at_once))
            if len(taken) < 2:
                break
            square, agreement = _measured(model, parameters, taken, device)
            squares.append(square)
            agreements.append(agreement)
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    return noise.estimate(np.array(squares), np.array(agreements))


def _measured(
    model: nn.Module, parameters: list[nn.Parameter], batches: list[Mapping[str, Any]], device: torch.device
) -> tuple[float, float]:
    """Mean square of the gradients of some batches, and the mean product of two of them."""
    total = [torch.zeros_like(each) for each in parameters]
    squares = torch.zeros((), device=device)
    for batch in batches:
        for parameter in parameters:
            parameter.grad = None
        on_device = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
        outputs = model(**on_device)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None:
            raise UserError("noise_scale: the model returns no loss; give batches that have labels")
        loss.backward()
        for place, parameter in enumerate(parameters):
            if parameter.grad is not None:
                total[place] += parameter.grad
                squares += parameter.grad.square().sum()
    count = len(batches)
    of_sum = sum((each.square().sum() for each in total), torch.zeros((), device=device))
    return (squares / count).item(), ((of_sum - squares) / (count * (count - 1))).item()
