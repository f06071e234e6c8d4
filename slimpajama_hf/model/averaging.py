"""Averaged weights: an exponential average of the weights over the steps.

At batch size 1 every update is mostly noise. A decaying learning rate would average the noise out at the end of a run.
An average of the weights does so at every moment, and the rate can stay constant (Polyak and Juditsky 1992). The
average does not influence training.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slimpajama_hf import files, screen
from slimpajama_hf.model import memory

#: Folder inside a checkpoint. It holds a complete model for `from_pretrained`.
FOLDER = "averaged"
_STATE = "averaging.json"
#: The average is updated after this many steps, or more often if its half-life is short.
MOST_STEPS_BETWEEN = 10
#: How many elements of weights and average are swapped at once.
_PIECE = 2**22


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Flat views of a contiguous weight, of at most `_PIECE` elements each; any other weight as it is."""
    return weight.view(-1).split(_PIECE) if weight.is_contiguous() else (weight,)


class WeightAverage:
    """The exponential average of a model's weights: a step counts half as much after `half_life` more steps.

    A `half_life` between 0 and 1 is a share of the steps so far, because the best half-life grows with the run (as in
    Shamir and Zhang 2013, arXiv 1212.1824). Until it is as old as its half-life, the average is the plain mean of what
    it has seen. It is updated every `steps_between` steps. It costs 4 bytes per parameter, and one pass over the
    weights per update.
    """

    def __init__(self, model: Any, half_life: float) -> None:
        self._model = model
        self._half_life = half_life
        self.steps_between = MOST_STEPS_BETWEEN
        if half_life >= 1:
            self.steps_between = max(1, min(MOST_STEPS_BETWEEN, int(half_life / 10)))
        self._touches = 0
        # Memory is allocated before the first step, not in the middle of a run. The values count from the first update.
        self._average = [weight.clone() for weight in self._weights]

    @property
    def _weights(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self._model.parameters()]

    @property
    def is_there(self) -> bool:
        """Whether the average has been updated at least once."""
        return self._touches > 0

    def step(self, finished: int) -> None:
        """Update the average if it is time; `finished`: optimizer steps of the run so far."""
        if finished % self.steps_between:
            return
        self._touches += 1
        half_life = self._half_life if self._half_life >= 1 else self._half_life * self._touches * self.steps_between
        share = 1 - 0.5 ** (self.steps_between / half_life)
        torch._foreach_lerp_(self._average, self._weights, max(share, 1 / self._touches))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights; afterwards it has its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        pairs = [
            pair
            for weight, average in zip(self._weights, self._average, strict=True)
            for pair in zip(_pieces(weight), _pieces(average), strict=True)
        ]
        # Swapped piece by piece, because a third set of weights may not fit on the device. The buffer is allocated
        # before the swap: if memory ran out in the middle, only some weights would be averaged.
        scratch = torch.empty(max((piece.numel() for piece, _ in pairs), default=0), device=self._average[0].device)
        for weight, average in pairs:
            own = scratch[: weight.numel()].view(weight.shape).copy_(weight)
            weight.copy_(average)
            average.copy_(own)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The averaged weights, in the order of the model's parameters."""
        return self._average

    def save_age(self, folder: Path) -> None:
        """Write the state that `load` needs besides the weights into `folder`."""
        (folder / _STATE).write_text(json.dumps({"touches": self._touches}) + "\n", encoding="utf-8")

    def save(self, checkpoint: Path, tokenizer: Any) -> None:
        """Save model, configuration, tokenizer and the state of the average into `averaged` of a checkpoint."""
        folder = checkpoint / FOLDER
        config = self._model.config
        # Whoever loads this model should generate with a cache.
        cache, config.use_cache = config.use_cache, True
        try:
            with self.applied():
                self._model.save_pretrained(str(folder))
        finally:
            config.use_cache = cache
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        self.save_age(folder)

    def load(self, checkpoint: Path) -> bool:
        """Load the average of a checkpoint. Returns False if it has none; then a new average begins."""
        folder = checkpoint / FOLDER
        if not (folder / _STATE).is_file():
            return False
        saved = load_file(folder / "model.safetensors")
        # Tied weights are saved under one of their names.
        self._average = [
            saved[name].to(parameter.device, parameter.dtype).clone()
            for name, parameter in self._model.named_parameters()
        ]
        self._touches = files.read_json(folder / _STATE)["touches"]
        return True


def begin(model: Any, half_life: float, checkpoint: Path | None) -> WeightAverage:
    """The average of a model's weights, loaded from `checkpoint` if there is one; says so if that has no average."""
    with memory.said("the average of the weights was made", "--average_weights 0 trains without it"):
        average = WeightAverage(model, half_life)
        loaded = checkpoint is not None and average.load(checkpoint)
    if checkpoint is not None and not loaded:
        screen.say(f"{checkpoint} has no averaged weights: their average begins here")
    return average
