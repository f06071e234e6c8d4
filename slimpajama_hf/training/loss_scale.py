"""The scale of the loss in float16, whose range ends where many gradients begin: below 6e-8 all is 0.

The gradient of the loss is multiplied by it where it begins, and divided by it where it is used. It is halved when a
gradient goes beyond float16's other end, 65,504 (that update is skipped), and doubled after 2,000 updates that did not.
The number, its rules and its file `scaler.pt` are those of `torch.amp.GradScaler`, which accelerate makes. What that
does around `optimizer.step` is done by the trainer instead: it reads the device with optimizers that are not fused,
skips the schedule's step with theirs, and knows nothing of a loss that is no number.
"""

from __future__ import annotations

import torch

#: Above 1 ten times in a row may a smaller scale still help: the largest gradients are then beyond 65,504 unscaled.
LEAST = 2.0**-10


class LossScale:
    """The scale that lies on `device`, kept by `scaler`, which accelerate scales the loss by where autograd works."""

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self._scaler = scaler
        # Makes its tensors, which a checkpoint may have given their values.
        scaler.scale(torch.ones((), device=device))

    @property
    def factor(self) -> torch.Tensor:
        """What the loss is multiplied by, (); always the same tensor, changed in place."""
        factor = self._scaler._scale
        assert factor is not None
        return factor

    def learn(self, not_finite: torch.Tensor | None) -> None:
        """After each gradient: 1.0 where it was no number, else 0.0; (), on the device, which is not waited for. None:
        there was none."""
        scaler, finite_so_far = self._scaler, self._scaler._growth_tracker
        if not_finite is not None:
            assert finite_so_far is not None
            torch._amp_update_scale_(
                self.factor, finite_so_far, not_finite,
                scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval(),
            )  # fmt: skip
        # What `unscale_` has noted of this step, so that it may be called in the next.
        scaler._per_optimizer_states.clear()

    def may_be_too_large(self) -> bool:
        """Whether a smaller scale could still make a gradient finite; waits for the device."""
        return self._scaler.get_scale() > LEAST


def for_a_cpu() -> torch.amp.GradScaler:
    """accelerate makes none for a CPU (accelerator.py: `self.device.type != "cpu"`)."""
    return torch.amp.GradScaler("cpu")
