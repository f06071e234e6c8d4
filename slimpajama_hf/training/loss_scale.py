"""The loss scale in float16, where gradients below 6e-8 become 0.

The loss is multiplied by the scale before the backward, and gradients are divided by it where they are used. The scale
is halved when a gradient exceeds float16's maximum, 65,504 (that update is skipped), and doubled after 2,000 updates
without that. The number, its rules and its file `scaler.pt` are those of `torch.amp.GradScaler`, which accelerate
makes. The trainer itself does what GradScaler does around `optimizer.step`: GradScaler reads the device if the
optimizer is not fused, skips the schedule's step along with the optimizer's, and does not look at a loss that is not
finite.
"""

from __future__ import annotations

import torch

#: Above this a smaller scale may still help. Ten halvings below 1: there gradients exceed 65,504 even unscaled.
LEAST = 2.0**-10


class LossScale:
    """The scale, on `device`. `scaler` keeps it; with autograd, accelerate multiplies the loss by it."""

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self._scaler = scaler
        # Creates the scaler's tensors, with values from a checkpoint if one was loaded.
        scaler.scale(torch.ones((), device=device))

    @property
    def factor(self) -> torch.Tensor:
        """What the loss is multiplied by, (); always the same tensor, changed in place."""
        factor = self._scaler._scale
        assert factor is not None
        return factor

    def learn(self, not_finite: torch.Tensor | None) -> None:
        """Adjust the scale after a gradient. `not_finite`: 1.0 if it was not finite, else 0.0; (), on the device, which
        is not waited for. None: there was no gradient."""
        scaler, finite_so_far = self._scaler, self._scaler._growth_tracker
        if not_finite is not None:
            assert finite_so_far is not None
            torch._amp_update_scale_(
                self.factor, finite_so_far, not_finite,
                scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval(),
            )  # fmt: skip
        # Forget what `unscale_` noted in this step, so that it can be called in the next one.
        scaler._per_optimizer_states.clear()

    def may_be_too_large(self) -> bool:
        """Whether a smaller scale could still make a gradient finite; waits for the device."""
        return self._scaler.get_scale() > LEAST


def for_a_cpu() -> torch.amp.GradScaler:
    """A scaler for a CPU: accelerate makes none there (accelerator.py: `self.device.type != "cpu"`)."""
    return torch.amp.GradScaler("cpu")
