"""Copies tensors of a model to host memory; a checkpoint is written from the copies while training goes on."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import threading
from typing import Any

import numpy as np
import torch

#: Alignment of each copy in the shared block, in bytes; vector units read this much at once.
_ALIGNED = 64


class HostCopies:
    """Host memory for the copies of a checkpoint; every checkpoint reuses it.

    To touch a page for the first time costs more than to copy into it: for 1.6 GB a second, on some virtual machines
    four; the copies alone take 0.35. So a thread touches the memory once, while the first steps run. `size`: bytes of
    the tensors of a checkpoint. Tensors beyond that get memory of their own.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self._size, self._pinned, self._used = size, pinned, 0
        self._memory: np.ndarray | None = None
        self._touching = threading.Thread(target=self._touch, name="host-copies", daemon=True)
        self._touching.start()

    def _touch(self) -> None:
        # If there is no block of this size, each copy gets memory of its own.
        with contextlib.suppress(RuntimeError, MemoryError):
            # A tenth more, for alignment and for small optimizer states.
            memory = torch.empty(self._size + self._size // 10, dtype=torch.uint8, pin_memory=self._pinned)
            if not self._pinned:
                ctypes.memset(memory.data_ptr(), 0, memory.nbytes)
            self._memory = memory.numpy()

    def begin(self) -> None:
        """Begin a new checkpoint: the copies of the last one may be overwritten."""
        self._touching.join()
        self._used = 0

    def of(self, state: Any) -> Any:
        """A copy of a state, with all its tensors in host memory."""
        if isinstance(state, torch.Tensor):
            return self._place_for(state).copy_(state.detach())
        if isinstance(state, dict):
            return type(state)((name, self.of(value)) for name, value in state.items())
        if isinstance(state, list | tuple):
            return type(state)(self.of(value) for value in state)
        return copy.deepcopy(state)

    def _place_for(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        first = math.ceil(self._used / _ALIGNED) * _ALIGNED
        if not size or self._memory is None or first + size > self._memory.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        self._used = first + size
        # Not a view of the whole block: `torch.save` would write all of that.
        flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
        return flat.view(tensor.shape)
