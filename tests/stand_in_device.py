"""A device that is neither a CPU nor CUDA, with values: its tensors are a CPU's in a wrapper that no operator of ours
may mix with others, read without it being counted, or take for a CPU's.

It registers PyTorch's backend for devices of others, once in a process and for good: it is for processes of its own
(tests/on_stand_in_device.py). Inside `StandIn()`:
- tensors of two devices in one operator are refused, but for numbers without a dimension, as CUDA does;
- what makes the host wait is counted, with the line of ours that did it: reading a number, a shape that hangs on
  values, a copy that is not from or to pinned memory;
- a copy to pinned memory is not there (NaN) before its event was waited for; one from pinned memory reads it only when
  the device comes to it: a buffer that is used again too early shows;
- `Recording` records operators, fills all that they made with NaN and runs them again for a replay, into the same
  tensors, whatever Python has done meanwhile; what waits while it records is refused as a driver refuses it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from slimpajama_hf.model import optimization

NAME = "stand_in"

#: Operators that need the values of a device's tensor on the host.
READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "is_nonzero", "equal", "masked_select", "bincount"}
_COPIES = {"copy_", "_to_copy"}


class OnDevice(torch.Tensor):
    """A tensor of the device; `inner` is the CPU's that holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _State:
    """What the device is doing."""

    waits: ClassVar[collections.Counter[str]] = collections.Counter()
    """Times that the host has waited, by the line of ours."""
    late: ClassVar[list[Callable[[], None]]] = []
    """Copies from pinned memory that the device has not come to."""
    arriving: ClassVar[list[Callable[[], None]]] = []
    """Copies to pinned memory that nobody has waited for."""
    pinned: ClassVar[set[int]] = set()
    tape: list[tuple[Any, Any, Any, Any]] | None = None
    synchronized = 0
    inside = False


def _line() -> str:
    ours = [frame for frame in traceback.extract_stack() if "/slimpajama_hf/" in frame.filename]
    return f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno} {ours[-1].line}" if ours else "not ours"


def _wait(why: str) -> None:
    if _State.tape is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing ({why}, {_line()})")
    _State.waits[f"{why}: {_line()}"] += 1


def _catch_up() -> None:
    while _State.late:
        _State.late.pop(0)()


def _is_of_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = any(isinstance(each, OnDevice) for each in tensors)
    name = func.overloadpacket.__name__
    if not there and not _is_of_device(kwargs.get("device")):
        if kwargs.get("pin_memory"):
            made = func(*args, **kwargs | {"pin_memory": False})
            _State.pinned.add(made.data_ptr())
            return made
        return func(*args, **kwargs)
    if name in _COPIES and len({each.device for each in tensors} | {torch.device(kwargs.get("device") or tensors[0].device)}) > 1:  # fmt: skip
        return _copy(func, name, args, kwargs)
    strangers = [each for each in tensors if not isinstance(each, OnDevice) and each.ndim]
    if strangers:
        raise RuntimeError(f"{name}: expected all tensors on {NAME}, found one on {strangers[0].device}")
    _catch_up()
    if name in READS:
        _wait(name)
    plain_args, plain_kwargs = pytree.tree_map(_inner, (args, kwargs))
    if name.startswith("_fused_") and not Module.scales_in_kernel:
        plain_kwargs = plain_kwargs | {"grad_scale": None, "found_inf": None}
    if "device" in plain_kwargs:
        plain_kwargs["device"] = torch.device("cpu")
    out = func(*plain_args, **plain_kwargs)
    if _State.tape is not None:
        _State.tape.append((func, plain_args, plain_kwargs, out))
    if name == "_local_scalar_dense":
        return out
    known = {id(each.inner): each for each in tensors if isinstance(each, OnDevice)}

    def wrapped(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return known[id(each)] if id(each) in known else OnDevice(each)

    return pytree.tree_map(wrapped, out)


def _inner(each: Any) -> Any:
    return each.inner if isinstance(each, OnDevice) else each


def _copy(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """From the device or to it."""
    if name == "_to_copy":
        source, options = args[0], dict(kwargs)
        device, asynchronous = options.pop("device"), options.pop("non_blocking", False)
        dtype = options.get("dtype") or source.dtype
        if _is_of_device(device):
            target: Any = OnDevice(torch.empty(source.shape, dtype=dtype))
        else:
            # Ordinary memory: the copy waits.
            target, asynchronous = torch.empty(source.shape, dtype=dtype), False
    else:
        target, source = args[:2]
        asynchronous = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) or False
    host = source if isinstance(target, OnDevice) else target
    if host.ndim == 0 and isinstance(target, OnDevice):
        # A number is an argument of a kernel.
        asynchronous = True
    elif not (asynchronous and host.untyped_storage().data_ptr() in {*_State.pinned}):
        _wait("copy of ordinary memory")
        asynchronous = False
    _catch_up()
    if not asynchronous:
        _inner(target).copy_(_inner(source))
    elif isinstance(target, OnDevice):
        if _State.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing (copy, {_line()})")
        inner = target.inner
        _State.late.append(lambda: inner.copy_(source))
    else:
        values = source.inner.clone()
        if target.is_floating_point():
            target.fill_(float("nan"))
        _State.arriving.append(lambda: target.copy_(values))
    return target


def _arrive() -> None:
    _catch_up()
    while _State.arriving:
        _State.arriving.pop(0)()


class _Event:
    """Says no once when it is asked, as what has just been asked for is not done yet."""

    def __init__(self, **_: Any) -> None:
        self._asked = 0

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        self._asked += 1
        if self._asked > 1:
            _arrive()
        return self._asked > 1

    def synchronize(self) -> None:
        _arrive()


class Module(_DummyBackendModule):
    """`torch.stand_in`: what `torch.cuda` is to CUDA."""

    Event = _Event
    #: Whether its fused optimizers look at `grad_scale` and `found_inf`; those of MPS do not.
    scales_in_kernel = True

    @staticmethod
    def current_stream(device: Any = None) -> str:
        return "the only one"

    @staticmethod
    def synchronize(device: Any = None) -> None:
        _State.synchronized += 1
        _arrive()

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    get_rng_state_all = get_rng_state

    @staticmethod
    def set_rng_state_all(state: Any) -> None:
        pass


class StandIn(TorchDispatchMode):
    """Inside, there is the device. `waits`: how often the host waited for it, by line."""

    waits = _State.waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def synchronized(self) -> int:
        """Times that the host has waited for all of it on purpose."""
        return _State.synchronized


class Recording:
    """As `cuda_graph.Recording`, of this device."""

    made: ClassVar[list[Recording]] = []

    def __init__(self, work: Callable[[], Any]) -> None:
        work()
        self._tape: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        _catch_up()
        _State.tape = self._tape
        try:
            self.result = work()
        finally:
            _State.tape = None
        self._poison()
        self.made.append(self)

    def _poison(self) -> None:
        """NaN into all that was made, and into nothing that was there before."""
        before: set[int] = set()
        made: dict[int, torch.Tensor] = {}
        for _, args, kwargs, out in self._tape:
            for each in pytree.tree_leaves((args, kwargs)):
                if isinstance(each, torch.Tensor) and (where := each.untyped_storage().data_ptr()) not in made:
                    before.add(where)
            for each in pytree.tree_leaves(out):
                if isinstance(each, torch.Tensor):
                    made.setdefault(each.untyped_storage().data_ptr(), each)
        for where, each in made.items():
            if where not in before and each.is_floating_point():
                with torch.no_grad():
                    each.fill_(float("nan"))

    def replay(self) -> None:
        _catch_up()
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self._tape:
                again = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def like_mps() -> Iterator[None]:
    """Without streams, and with fused optimizers that take no notice of `grad_scale` and `found_inf`."""
    kept = Module.current_stream
    del Module.current_stream
    Module.scales_in_kernel = False
    try:
        yield
    finally:
        Module.current_stream = staticmethod(kept)  # type: ignore[method-assign, assignment]
        Module.scales_in_kernel = True


@contextlib.contextmanager
def like_cuda() -> Iterator[None]:
    """What the optimizers are told is obeyed in their kernels."""
    kept = optimization.SCALE_IN_KERNEL
    optimization.SCALE_IN_KERNEL = (*kept, NAME)
    try:
        yield
    finally:
        optimization.SCALE_IN_KERNEL = kept


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """`model` on the device, tied weights tied; call it inside `StandIn()`."""
    there: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, OnDevice):
                if id(parameter) not in there:
                    there[id(parameter)] = torch.nn.Parameter(OnDevice(parameter.detach().clone()))
                module._parameters[name] = there[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not isinstance(buffer, OnDevice):
                module._buffers[name] = OnDevice(buffer.clone())
    return model


@contextlib.contextmanager
def whole_programs() -> Iterator[StandIn]:
    """The program takes this device for its own. Its weights leave for files as a CPU's, and models are moved with
    their ties, which `Module.to` would cut between two kinds of tensors."""
    module = torch.nn.Module
    kept = (module.to, module.state_dict, torch.save)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = args[0] if args else kwargs.get("device")
        wanted = isinstance(device, str | torch.device) and _is_of_device(device)
        return moved(self) if wanted else kept[0](self, *args, **kwargs)

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = kept[1](self, *args, **kwargs)
        for name, value in found.items():
            found[name] = _inner(value)
        return found

    def save(what: Any, *args: Any, **kwargs: Any) -> None:
        kept[2](pytree.tree_map(_inner, what), *args, **kwargs)

    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    module.to, module.state_dict, torch.save = to, state_dict, save  # type: ignore[assignment, method-assign]
    try:
        with StandIn() as device:
            yield device
    finally:
        module.to, module.state_dict, torch.save = kept  # type: ignore[assignment, method-assign]
        del os.environ["ACCELERATE_TORCH_DEVICE"]


def _pin_memory(values: torch.Tensor, device: Any = None) -> torch.Tensor:
    copy = values.clone()
    _State.pinned.add(copy.untyped_storage().data_ptr())
    return copy


_tensor = torch.tensor


def _tensor_of(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor` makes its tensor past all that a mode sees, and then sends it."""
    return _tensor(data, **options).to(device) if _is_of_device(device) else _tensor(data, device=device, **options)


torch.tensor = _tensor_of  # type: ignore[assignment]
torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign]
_setup_privateuseone_for_python_backend(NAME, Module())
