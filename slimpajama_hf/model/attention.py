"""Attention and GELU written out: each function returns its output and a function for the backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

#: Up to this many tokens a CPU computes the (heads, T, T) attention weights; beyond, it uses torch's fused kernel.
LONGEST_EXPLICIT_ATTENTION = 512


#: Queries that are multiplied with the same keys at once. Small blocks skip most of the masked scores. In low precision
#: a product is cheap, so fewer and larger blocks are faster.
ATTENTION_BLOCK, LOW_ATTENTION_BLOCK = 128, 256

#: Constants of the tanh approximation of GELU (Hendrycks & Gimpel 2016): x * sigmoid(x * (C1 + C2 * x^2)).
_C1 = 2.0 * math.sqrt(2.0 / math.pi)


_C2 = _C1 * 0.044715


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """GELU (tanh approximation) of x, and a function from the gradient of the output to that of x."""
    if x.device.type != "cpu":
        # One fused kernel each for forward and backward, exact inside.
        return F.gelu(x, approximate="tanh"), lambda d: torch.ops.aten.gelu_backward(d, x, approximate="tanh")
    # Output x * s, slope s + x * s * (1 - s) * (C1 + 3 C2 x^2). A CPU's tanh costs more than all of this.
    first, exact = torch.tensor(_C1), x.float()
    square = exact * exact
    scratch = torch.add(first, square, alpha=_C2).mul_(exact)
    s = torch.sigmoid(scratch)
    active = exact * s
    torch.addcmul(active, active, s, value=-1.0, out=scratch)
    torch.add(first, square, alpha=3.0 * _C2, out=square)
    slope = s.addcmul_(scratch, square)
    return active.to(x.dtype), lambda d: d.float().mul_(slope).to(d.dtype)


def fused_attention(
    qkv: torch.Tensor, scaling: float, heads: int
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Causal attention by torch's fused kernels, (T, 3D) -> (T, D), and its backward, which is autograd's."""
    length, width = qkv.shape[0], qkv.shape[1] // 3
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        query, key, value = leaf.view(1, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # (1, H, T, d) each
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        attended = attended.transpose(1, 2).reshape(length, width)

    def back(gradient: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(attended, leaf, gradient)[0]

    return attended.detach(), back
