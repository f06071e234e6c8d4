"""Matrix products of the step, each by the library that is fastest at it, with weights in that library's layout.

`torch.mm` leaves float32 to MKL, which has half the speed of oneDNN on an AMD processor with AVX-512 (docs/speed.md).
Each product also rearranges the matrix on the right for the processor. A weight that many products use can be kept in
that layout. Both are done by the operators that torch's own compiler emits for a linear layer on a CPU
(torch/_inductor/mkldnn_ir.py). They are not documented, so tests/model/test_products.py compares them with `torch.mm`.
If they are missing, `torch.mm` is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch

from slimpajama_hf import devices

#: Rows of a gradient that a CPU computes at once. They are still in its cache when they are copied, which halves the
#: time of the head's gradient.
ROWS_AT_ONCE = 4096

#: The library behind `torch.mm` in float32, in words.
MM = "MKL (slower only on AMD)" if torch.backends.mkl.is_available() else "torch.mm (this torch has no MKL)"


@functools.cache
def _onednn(dtype: torch.dtype) -> bool:
    """Whether this processor should multiply matrices of `dtype` by oneDNN's own operators.

    The choice does not depend on timing: a resumed run must round as before.
    """
    if dtype == torch.float32 and not devices.is_amd():
        # On an Intel processor MKL is a tenth faster, whether or not data are in the caches (docs/speed.md). MKL itself
        # chooses by the maker's name too.
        return False
    one = torch.ones(2, 2, dtype=dtype)
    try:
        return bool((_by_onednn(one, _packed(one, 2)) == 2).all() and (_by_onednn(one, one) == 2).all())
    except (AttributeError, RuntimeError):
        return False


def library(device: torch.device, dtype: torch.dtype) -> str:
    """The library that makes the products of the written-out step, and why, in words."""
    if device.type != "cpu":
        return f"torch's own library for {device.type}"
    if not _onednn(dtype):
        missing = dtype != torch.float32 or devices.is_amd()
        return "torch.mm (this torch lacks oneDNN's operators)" if missing else MM
    return "oneDNN (MKL is slower on AMD)" if dtype == torch.float32 else "oneDNN (weights packed for it)"


def _by_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`inputs @ weight.T + bias`; `weight` as it is, or packed."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _packed(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`weight` in oneDNN's layout for inputs of `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _slow_by_mm(values: torch.Tensor) -> bool:
    """Whether `torch.mm` would use MKL where oneDNN is faster. In bfloat16 `torch.mm` uses oneDNN itself."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and _onednn(values.dtype)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(M, K) @ (K, N)."""
    if _slow_by_mm(left):
        return _by_onednn(left, right.t())
    return torch.mm(left, right)


def product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """Writes (M, K) @ (K, N) into `out` (M, N), which may be of higher precision. On a CPU returns the squared L2 norm
    of `out`, (), taken while its rows are in the cache; elsewhere None."""
    if out.device.type != "cpu":
        if out.dtype == left.dtype:
            torch.mm(left, right, out=out)
        else:
            out.copy_(torch.mm(left, right))
        return None
    squares = []
    for first in range(0, len(out), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        if out.dtype == left.dtype and not _slow_by_mm(left):
            written = torch.mm(left[rows], right, out=out[rows])
        else:
            written = out[rows].copy_(product(left[rows], right))
        squares.append(square(written))
    return squares[0] if len(squares) == 1 else torch.stack(squares).sum()


def square(values: torch.Tensor) -> torch.Tensor:
    """Squared L2 norm of all elements, (), of a contiguous tensor."""
    return torch.dot(values.view(-1), values.view(-1))


class Weights:
    """The parameters of a model for products in `low` precision; if that is None, the float32 parameters themselves.

    `refresh` before each step updates them. Parameters in `seldom_changed` are updated only after a change, so nothing
    may change them behind autograd's back (`.data`). On a CPU their matrices are kept packed for `linear` and
    `linear_backward`, in place of a copy: 4 bytes per parameter. `rows`: the usual number of rows of inputs. `padded`:
    by place, how many rows the copy of a matrix has; the added ones are 0 (there is no copy in float32). A place is an
    index into `parameters`.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        low: torch.dtype | None,
        seldom_changed: Iterable[torch.nn.Parameter],
        rows: int,
        padded: Mapping[int, int] | None = None,
    ) -> None:
        self._weights = [parameter.detach() for parameter in parameters]
        self._low, self._rows = low, rows
        seldom = {id(parameter) for parameter in seldom_changed}
        # The version of each parameter at its last copy; None: copied before every step.
        self._versions: list[int | None] = [-1 if id(parameter) in seldom else None for parameter in parameters]
        packs = low is not None and self._weights[0].device.type == "cpu" and _onednn(low)
        self._packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Matrix W (in, out), packed for `inputs @ W` and for `gradient @ W.T`."""
        self._to_pack = {
            place for place, weight in enumerate(self._weights) if packs and id(parameters[place]) in seldom
            and weight.ndim == 2
        }  # fmt: skip
        self._copies = self._weights
        if low is not None:
            self._copies = [
                torch.empty(0) if place in self._to_pack else torch.empty_like(weight, dtype=low)
                for place, weight in enumerate(self._weights)
            ]
        self._padded: dict[int, torch.Tensor] = {}
        for place, length in (padded or {}).items():
            weight = self._weights[place]
            if low is not None and length > len(weight):
                self._padded[place] = weight.new_zeros((length, *weight.shape[1:]), dtype=low)
                self._copies[place] = self._padded[place][: len(weight)]

    def refresh(self) -> list[int]:
        """Copy or pack what has changed; returns its places."""
        if self._low is None:
            return []
        versions = [
            None if known is None else weight._version
            for known, weight in zip(self._versions, self._weights, strict=True)
        ]
        changed = [
            place
            for place, (known, now) in enumerate(zip(self._versions, versions, strict=True))
            if now is None or now != known
        ]
        plain = [place for place in changed if place not in self._to_pack]
        torch._foreach_copy_([self._copies[place] for place in plain], [self._weights[place] for place in plain])
        for place in changed:
            if place in self._to_pack:
                self._pack(place)
        self._versions = versions
        return changed

    def _pack(self, place: int) -> None:
        low = self._weights[place].to(self._low)
        for_linear, for_backward = _packed(low.t(), self._rows), _packed(low, self._rows)
        if place in self._packed:
            # Into the old memory: freeing one matrix at a time would fragment the heap.
            self._packed[place][0].copy_(for_linear)
            self._packed[place][1].copy_(for_backward)
        else:
            self._packed[place] = for_linear, for_backward

    def __getitem__(self, place: int) -> torch.Tensor:
        """A parameter that is not packed, as of the last `refresh`."""
        return self._copies[place]

    def padded(self, place: int) -> torch.Tensor:
        """The same with the added rows that were asked for."""
        return self._padded.get(place, self._copies[place])

    def linear(self, inputs: torch.Tensor, weight: int, bias: int) -> torch.Tensor:
        """`inputs @ W + b`, (T, in) -> (T, out)."""
        if weight in self._packed:
            return _by_onednn(inputs, self._packed[weight][0], self._copies[bias])
        if _slow_by_mm(inputs):
            return _by_onednn(inputs, self._copies[weight].t(), self._copies[bias])
        return torch.addmm(self._copies[bias], inputs, self._copies[weight])

    def linear_backward(self, gradient: torch.Tensor, weight: int) -> torch.Tensor:
        """`gradient @ W.T`, (T, out) -> (T, in)."""
        if weight in self._packed:
            return _by_onednn(gradient, self._packed[weight][1])
        return product(gradient, self._copies[weight].t())
