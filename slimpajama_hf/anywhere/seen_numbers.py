"""The numbers of a step of another trainer: its loss, how many tokens were right, and the norm of its gradient.

They are observed, not computed again: a hook on the model takes the loss that it returns and reads its logits, and the
norm is the one that the trainer clips by. Nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimpajama_hf import screen
from slimpajama_hf.anywhere.exact_stream import IGNORED
from slimpajama_hf.training.step_numbers import Step

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclasses.dataclass
class SeenStep(Step):
    """A step of which only means are known."""

    listens: Any = None
    """Called with the number of tokens that the step predicted, and the number that its samples have to predict."""

    def unpacked(self, values: np.ndarray) -> Step:
        """This step with its numbers, from the result of `SeenNumbers.of_step`: nats, predicted, right, norm."""
        nats, predicted, right, norm = values.tolist()
        mean = (nats / predicted, right / predicted) if predicted else (math.nan, math.nan)
        if self.listens is not None and predicted:
            self.listens(int(predicted), sum(each.predicted for each in self.sample.together or [self.sample]))
        numbers = dataclasses.replace(self.numbers, grad_norm=norm, not_finite=0.0)
        return dataclasses.replace(self, numbers=numbers, mean=mean)


class SeenNumbers:
    """Observes the current step. Call `begin` with the model, and `end` when training is over."""

    def __init__(self) -> None:
        self._passes: list[torch.Tensor] = []
        self._norm: Any = None
        self._hook: RemovableHandle | None = None
        self._clip: Any = None
        self._said: set[str] = set()

    def begin(self, model: torch.nn.Module) -> None:
        """Observe what `model` returns in training, and the norm by which gradients are clipped."""
        self.end()
        self._hook = model.register_forward_hook(self._see, with_kwargs=True)
        utils: Any = torch.nn.utils
        clip = self._clip = utils.clip_grad_norm_

        @functools.wraps(clip)
        def seen(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip(*args, **kwargs)
            return self._norm

        utils.clip_grad_norm_ = seen

    def end(self) -> None:
        """Stop observing."""
        if self._hook is not None:
            self._hook.remove()
            torch.nn.utils.clip_grad_norm_ = self._clip
        self._hook = None

    @torch.no_grad()
    def _see(self, module: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        if not module.training:
            return
        loss, logits = (_of(outputs, name) for name in ("loss", "logits"))
        labels = kwargs.get("labels")
        if loss is None or labels is None:
            self._say(
                "loss",
                "the model returns no loss (or is given no labels), as with label smoothing or a loss function of your "
                "own: the ledger has no losses",
            )
            return
        targets = labels[..., 1:]
        predicted = targets != IGNORED
        count = predicted.sum()
        items = kwargs.get("num_items_in_batch")
        nats = loss.detach().float().mean() * (count if items is None else items)
        right = torch.full((), math.nan, device=nats.device)
        if logits is not None and logits.shape[:-1] == labels.shape:
            scores = logits.detach()[..., :-1, :]
            best = scores.amax(-1)
            own = scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            right = ((own == best) & predicted).sum()
        else:
            self._say("logits", "the model returns no logits: the ledger has no accuracy")
        self._passes.append(torch.stack([nats, count.to(nats), right.to(nats)]))

    def _say(self, of: str, what: str) -> None:
        if of not in self._said:
            self._said.add(of)
            screen.say(what)

    def say_if_another(self, predicted: int, of_stream: int) -> None:
        """Say once if a collator or a mask removes tokens of the stream or adds some."""
        if predicted != of_stream:
            self._say(
                "tokens",
                f"a step predicted {predicted:,} tokens where its samples have {of_stream:,} to predict (a mask, or a "
                "collator that cuts): losses are means of the former, tokens and bytes of the ledger are the samples'",
            )

    def of_step(self, device: torch.device, together: bool) -> torch.Tensor:
        """Nats, predicted, right and norm of the step, (4,) float32, on their device; of all processes `together`."""
        none = torch.tensor([math.nan, 0.0, math.nan], device=device)
        seen = torch.stack(self._passes).sum(0) if self._passes else none
        norm = self._norm if self._norm is not None else math.nan
        self._passes, self._norm = [], None
        if together:
            torch.distributed.all_reduce(seen)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=seen.device).reshape(1)
        return torch.cat([seen, norm])


def _of(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
