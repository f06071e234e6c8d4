"""Copies between host and device. If the device has streams and events, neither side waits; else they are plain copies.

CUDA and XPU copy from and to pinned memory while the program goes on, and an event tells when the copy is complete. MPS
has events but no streams, and a CPU needs neither: there a copy is complete when the call returns.
"""

from __future__ import annotations

from typing import Any

import torch


def streams(device: torch.device) -> Any | None:
    """The module with the streams and events of a device (`torch.cuda`, `torch.xpu`); None if it has none."""
    if device.type == "cpu":
        return None
    module = getattr(torch, device.type, None)
    return module if all(hasattr(module, name) for name in ("Event", "current_stream", "synchronize")) else None


def wait_for(device: torch.device) -> None:
    """Wait until `device` has done everything that was asked of it."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize()


def release_cached(device: torch.device) -> None:
    """Return memory that PyTorch keeps for later to `device`."""
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`; not copied if they are there already."""
    if values.device == device:
        return values
    source, waits = _source(values, device)
    return source.to(device, non_blocking=not waits)


def into(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values` into a tensor on a device."""
    source, waits = _source(values, target.device)
    target.copy_(source, non_blocking=not waits)


def _source(values: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, bool]:
    """The tensor to copy from so that `values` come to `device`, and whether that copy waits."""
    if values.device.type != "cpu" or streams(device) is None:
        return values, True
    # Pinned for this copy alone: torch reuses the memory only after the device has read it.
    return values.pin_memory(), False


class Reading:
    """Numbers on their way from a device to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        self._event: Any = None
        module = streams(values.device)
        if module is None:
            self._values = values.to("cpu")
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = module.Event()
        self._event.record()

    def here(self) -> bool:
        """Whether `values` would return at once."""
        return self._event is None or self._event.query()

    def values(self) -> torch.Tensor:
        """The numbers on the host, in the shape they had on the device; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
