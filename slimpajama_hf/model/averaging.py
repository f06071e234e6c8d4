"""Averaged weights: what a constant learning rate gives away by jumping about, an average of its steps gets back.

At batch size 1 every update is mostly noise. A decaying rate would average it out at the end; an exponential average of
the weights does so at every moment of the run, and the rate can stay constant (Polyak and Juditsky 1992). Training does
not know of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slimpajama_hf import screen
from slimpajama_hf.model import memory

#: Folder inside a checkpoint: a model of its own, that `from_pretrained` loads.
FOLDER = "averaged"
_STATE = "averaging.json"
#: An average is touched every so many steps, or more often where its half-life is short.
MOST_STEPS_BETWEEN = 10
#: Elements that change places with their average at once.
_PIECE = 2**22


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of a weight, as one row, of at most `_PIECE` elements each; one that does not lie in one piece as it is."""
    return weight.view(-1).split(_PIECE) if weight.is_contiguous() else (weight,)


class WeightAverage:
    """The exponential average of a model's weights: after `half_life` steps what they were counts half.

    `half_life` below 1 (and above 0): so large a share of the steps so far, for the longer a run the longer the average
    that suits it (as Shamir and Zhang 2013, arXiv 1212.1824). Until it is as old as its half-life it is the plain mean
    of what it has seen. `steps_between`: the steps from one touch to the next. Costs 4 bytes a parameter, and per touch
    one pass over the weights.
    """

    def __init__(self, model: Any, half_life: float) -> None:
        self._model = model
        self._half_life = half_life
        self.steps_between = MOST_STEPS_BETWEEN
        if half_life >= 1:
            self.steps_between = max(1, min(MOST_STEPS_BETWEEN, int(half_life / 10)))
        self._touches = 0
        # Its memory is there before the first step, not in the middle of a run; what it holds counts from a touch on.
        self._average = [weight.clone() for weight in self._weights]

    @property
    def _weights(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self._model.parameters()]

    @property
    def is_there(self) -> bool:
        """Whether anything has been averaged yet."""
        return self._touches > 0

    def step(self, finished: int) -> None:
        """After `finished` optimizer steps of the run: take the weights in, where it is time."""
        if finished % self.steps_between:
            return
        self._touches += 1
        half_life = self._half_life if self._half_life >= 1 else self._half_life * self._touches * self.steps_between
        share = 1 - 0.5 ** (self.steps_between / half_life)
        torch._foreach_lerp_(self._average, self._weights, max(share, 1 / self._touches))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again, bit for bit, outside."""
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
        # Piece by piece, for a third set of weights need not fit the device. Taken before anything is changed: a lack
        # of memory on the way would leave weights of which some are averaged and some are not.
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
        """What `load` needs beside the weights, into their folder."""
        (folder / _STATE).write_text(json.dumps({"touches": self._touches}) + "\n", encoding="utf-8")

    def save(self, checkpoint: Path, tokenizer: Any) -> None:
        """Into the folder `averaged` of a checkpoint: model, configuration, tokenizer, and how old it is."""
        folder = checkpoint / FOLDER
        config = self._model.config
        # Loaded elsewhere, it shall generate with a cache.
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
        """Go on with the average of a checkpoint; False where it has none, and a new one begins."""
        folder = checkpoint / FOLDER
        if not (folder / _STATE).is_file():
            return False
        saved = load_file(folder / "model.safetensors")
        # Tied weights are saved under one of their names.
        self._average = [
            saved[name].to(parameter.device, parameter.dtype).clone()
            for name, parameter in self._model.named_parameters()
        ]
        self._touches = json.loads((folder / _STATE).read_text(encoding="utf-8"))["touches"]
        return True


def begin(model: Any, half_life: float, checkpoint: Path | None) -> WeightAverage:
    """The average of a model's weights, which goes on with that of a checkpoint; one that has none is said."""
    with memory.said("the average of the weights was made", "--average_weights 0 trains without it"):
        average = WeightAverage(model, half_life)
        loaded = checkpoint is not None and average.load(checkpoint)
    if checkpoint is not None and not loaded:
        screen.say(f"{checkpoint} has no averaged weights: their average begins here")
    return average
