"""Memory: what a run will need, what the device has left, and a one-sentence error when memory runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from slimpajama_hf.settings.update_rules import UpdateRules

from slimpajama_hf.errors import UserError
from slimpajama_hf.screen import format_bytes

#: What allocators without an exception of their own say: the CPU's (c10/core/impl/alloc_cpu.cpp) and that of MPS.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out(error: BaseException | None) -> bool:
    """Whether `error`, or an error that caused it, says that a device or the machine is out of memory."""
    import torch

    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        error, seen = error.__cause__, seen + 1
    return False


def in_words(error: BaseException) -> str:
    """An error in half a line; out of memory without the allocator's advice."""
    return "out of memory" if is_out(error) else f"{type(error).__name__}: {error}"


def give_back() -> None:
    """Return memory that is held but not used to the device. What an exception still refers to is not freed."""
    import torch

    from slimpajama_hf.model import transfers

    gc.collect()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        transfers.release_cached(device)


@contextlib.contextmanager
def said(what: str, cure: str = "close what else uses the device, or start with a smaller --model") -> Iterator[None]:
    """Context that turns a lack of memory inside into a UserError: "out of memory while `what`; `cure`"."""
    out = False
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out(error):
            raise
        # Raised outside of this block: only then is what the exception refers to freed.
        out = True
    if out:
        give_back()
        raise UserError(f"out of memory while {what}; {cure}")


# ---- what a run needs ----


@dataclasses.dataclass
class Needs:
    """What a run needs on its device, in bytes."""

    parameters: int
    state_bytes: int
    """Weights, their average, gradients and the optimizer's state, float32."""
    activation_bytes: int
    """Of one step: activations and weights cast to a lower precision; an estimate."""
    beside_bytes: int = 0
    """The largest need of anything besides the steps: a second set of gradients (`noise.py`), or a passport."""

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + self.beside_bytes


def needs(
    model: PreTrainedModel,
    max_length: int,
    precision: str,
    averaged: bool,
    rules: UpdateRules,
    *,
    written_out: bool = False,
    measures_noise: bool = False,
    device: str | None = None,
    processes: int = 1,
    sharded: bool = False,
) -> Needs:
    """Memory of a run whose steps are one sample of `max_length` tokens each.

    `averaged`: the run keeps an average of the weights. `written_out`: the step is that of `gpt2_step.py`.
    `measures_noise`: gradients are sometimes compared (`noise.py`). `device`: a type, by default that of the model.
    `processes`: how many compute a step together; each has a copy of the model, or (`sharded`) a part of it. What the
    libraries and the driver need for themselves is not counted.
    """
    from slimpajama_hf.model import optimization

    config: Any = model.config.get_text_config(decoder=True)
    device = device or model.device.type
    parameters = model.num_parameters()
    low = precision != "float32"
    muon = optimization.elements_by_muon(model, rules)
    state = (12 if averaged else 8) * parameters + optimization.moments_bytes(model, rules)
    if processes > 1:
        # DDP's buckets hold the gradients once more. A sharded model and its state are divided among the processes.
        state = state // processes if sharded else state + 4 * parameters
    step = _written_out(config, max_length, low, device) if written_out else _by_autograd(config, max_length, low)
    # Autocast keeps cast weights between forward and backward; the written-out step keeps them for the whole run.
    casts = 2 * parameters if low else 0
    if low and written_out and device == "cpu":
        # Packed in two layouts (products.py).
        casts += 2 * muon
    # A passport needs logits and their softmax, float32, between steps.
    passport = 2 * 4 * max_length * config.vocab_size
    if measures_noise:
        beside = max(4 * parameters, passport if device == "cuda" else passport - step)
    else:
        # A captured step never frees its memory for the passport.
        beside = passport if written_out and device == "cuda" else max(0, passport - step)
    return Needs(parameters, state, step + casts, beside)


def _written_out(config: Any, length: int, low: bool, device: str) -> int:
    """Peak bytes of a step of `gpt2_step.py`, without weights and gradients."""
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    inner = getattr(config, "n_inner", None) or 4 * hidden
    width = 2 if low else 4
    # The residual stream before attention and before the MLP, float32.
    kept = 2 * 4 * hidden
    # In the dtype of products: two norms, queries, keys and values, output of attention, input and output of the GELU.
    kept += width * (2 * hidden + 3 * hidden + hidden + 2 * inner)
    if device != "cpu":
        # The fused kernel's own copy of its output.
        kept += width * hidden
    else:
        if low:
            # GELU's slope stays in float32; queries, keys and values are copied to be contiguous.
            kept += (4 - width) * inner + width * 3 * hidden
        if length <= 512:
            # Attention weights. In blocks causality leaves about three quarters; in low precision all, in two dtypes.
            kept += heads * length * ((4 + 2) if low else 3)
    logits = 4 * length * config.vocab_size
    head = logits
    if low:
        # The gradient of the logits, and the cast gradient of the head.
        rows = config.vocab_size if device != "cpu" else min(4096, config.vocab_size)
        head += 2 * length * config.vocab_size + 2 * rows * hidden
    elif device == "cpu":
        head += 4 * min(4096, config.vocab_size) * hidden
    return layers * length * kept + head


def _by_autograd(config: Any, length: int, low: bool) -> int:
    width = 2 if low else 4
    # About 17 values of the hidden size are kept per token and layer (two norms, q k v, attention out, 4x twice, ...).
    per_token = getattr(config, "num_hidden_layers", 0) * 17 * getattr(config, "hidden_size", 0) * width
    # Logits in the working precision, their float32 copy for the loss, and their gradient.
    return int(length * (per_token + config.vocab_size * (width + 4 + 4)))


# ---- what there is ----


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of `device`; for a CPU, what the machine can give. None if that is unknown."""
    import torch

    if device.type == "cpu":
        return _free_of_machine()
    asked = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    try:
        return int(asked(device)[0]) if asked is not None else None
    except (RuntimeError, ValueError):
        return None


def held_bytes(model: Any, device: torch.device) -> int:
    """Bytes of `device` that this process already holds, with a model of float32 weights on it."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return 4 * int(model.num_parameters())


def _free_of_machine() -> int | None:
    """The memory that the kernel calls available, or what the container may still take if that is less."""
    found = []
    with contextlib.suppress(ImportError, OSError):
        import psutil

        found.append(int(psutil.virtual_memory().available))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        # Without a limit the file says "max", which is no number.
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        taken = int((group / "memory.current").read_text(encoding="utf-8"))
        found.append(max(0, limit - taken))
    return min(found) if found else None


def warning(model: Any, device: torch.device, needed: Needs, settings: Any, processes: int = 1) -> str | None:
    """A sentence with what to type if a run needs more memory than `device` has left. None if it fits, or if the free
    memory is unknown. `processes`: how many share the device."""
    free = free_bytes(device)
    if free is None:
        return None
    there = free + held_bytes(model, device) * processes
    wanted = needed.total_bytes * processes
    if wanted <= there:
        return None
    cures = []
    if settings.model.average_weights > 0:
        cures.append(f"--average_weights 0 (saves {format_bytes(4 * needed.parameters * processes)})")
    if settings.data.max_seq_length > 128:
        cures.append(f"--max_seq_length {settings.data.max_seq_length // 2}")
    cures.append("a smaller --model")
    whose = "the machine" if device.type == "cpu" else f"{device}"
    return (
        f"this run needs about {format_bytes(wanted)} of memory and {whose} has {format_bytes(there)} left for it: "
        f"close what else uses it, or type {', '.join(cures[:-1])}{' or ' if len(cures) > 1 else ''}{cures[-1]}"
    )


def processes_here() -> int:
    """How many processes of this run are on this machine, according to the launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
