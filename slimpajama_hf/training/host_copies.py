"""Copies of a model's tensors in the memory of the host, which a checkpoint is written from while training goes on."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import threading
from typing import Any

import numpy as np
import torch

#: Where a copy begins in the memory for all, bytes: what vector units read at once.
_ALIGNED = 64


class HostCopies:
    """Memory for the copies of a checkpoint, which the next one takes again.

    A page that is touched for the first time costs more than what is copied into it: a second for 1.6 GB, four on some
    virtual machines, where the copies alone take 0.35. So it is touched once, by a thread, while the first steps run.
    `size`: bytes of the tensors of a checkpoint; what is more gets memory of its own.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self._size, self._pinned, self._used = size, pinned, 0
        self._memory: np.ndarray | None = None
        self._touching = threading.Thread(target=self._touch, name="host-copies", daemon=True)
        self._touching.start()

    def _touch(self) -> None:
        # Where there is not so much in one piece, each copy gets memory of its own.
        with contextlib.suppress(RuntimeError, MemoryError):
            # A tenth more: what is aligned, and the small states beside the moments.
            memory = torch.empty(self._size + self._size // 10, dtype=torch.uint8, pin_memory=self._pinned)
            if not self._pinned:
                ctypes.memset(memory.data_ptr(), 0, memory.nbytes)
            self._memory = memory.numpy()

    def begin(self) -> None:
        """A new checkpoint: the copies of the last one are no longer needed."""
        self._touching.join()
        self._used = 0

    def of(self, state: Any) -> Any:
        """A copy of a state with all its tensors in the memory of the host."""
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
        # Not a view: `torch.save` would write all that a view is a part of.
        flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
        return flat.view(tensor.shape)
