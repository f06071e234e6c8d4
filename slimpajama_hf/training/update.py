"""The update of a step: the norm of its gradient, the clipping, and whether the update is made at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slimpajama_hf.model import optimization

if TYPE_CHECKING:
    from slimpajama_hf.model.gpt2_step import GPT2Step
    from slimpajama_hf.training.loss_scale import LossScale


class Update:
    """Decides between a step's gradient and the optimizer, without waiting for the device.

    `optimizer`: without accelerate's wrapper. `step`: the written-out step, if any. `loss_scale`: in float16.
    """

    def __init__(self, optimizer: Any, step: GPT2Step | None, loss_scale: LossScale | None) -> None:
        self._optimizer, self._step, self._loss_scale = optimizer, step, loss_scale
        self.grad_norm = torch.tensor(0.0)
        """L2 norm of the gradient before clipping, ()."""
        self.not_finite = torch.tensor(0.0)
        """1.0 if the update is skipped because loss or gradient is not finite, ()."""
        self.rate = 0.0
        """The learning rate of the current step."""

    def clip(self, longest: float) -> torch.Tensor:
        """Clip the written-out gradient; returns its norm before. The optimizer divides while it reads the gradient,
        which saves a pass over it."""
        norm = self._norm()
        too_long_by = ((norm + 1e-6) / longest).clamp(min=1.0)
        self._divide_gradients(too_long_by if self._loss_scale is None else too_long_by * self._loss_scale.factor)
        return norm

    def leave_unclipped(self) -> torch.Tensor:
        """The norm of the written-out gradient, which is not clipped."""
        norm = self._norm()
        if self._loss_scale is not None:
            # A copy: the scale is adjusted before the optimizer's step, for the next one.
            self._divide_gradients(self._loss_scale.factor.clone())
        return norm

    def _norm(self) -> torch.Tensor:
        assert self._step is not None
        return self._step.squared_norms().sum().sqrt()

    def _divide_gradients(self, by: torch.Tensor) -> None:
        assert self._step is not None
        if optimization.scales_in_kernel(self._optimizer, by.device):
            self._optimizer.grad_scale = by
        else:
            self._step.gradients.div_(by)

    def decide(self, norm: Any, loss: torch.Tensor, loss_decides: bool, was_computed: bool) -> None:
        """Skip the update if the gradient is not finite, or, with `loss_decides`, if the loss is not.

        Fused optimizers whose kernels support it get a flag on the device that was made for gradient scaling
        (`found_inf`, torch/optim/adam.py). For others, and on a CPU, the gradients are removed.
        """
        # Read before the update: afterwards the scheduler has moved on.
        self.rate = float(self._optimizer.param_groups[0]["lr"])
        norm = norm if isinstance(norm, torch.Tensor) else torch.tensor(float(norm))
        # The norm of a sharded model is a DTensor.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.grad_norm = norm.detach().to(loss.device)
        finite = torch.isfinite(self.grad_norm)
        if loss_decides:
            finite = finite & torch.isfinite(loss)
        self.not_finite = 1.0 - finite.float()
        device = self.not_finite.device
        if device.type != "cpu" and optimization.scales_in_kernel(self._optimizer, device):
            self._optimizer.found_inf = self.not_finite
        elif self.not_finite.item():
            self._optimizer.zero_grad(set_to_none=True)
        if self._loss_scale is not None:
            # After running out of memory there is no gradient.
            self._loss_scale.learn(self.not_finite if was_computed else None)
