"""Memory: what a run will need, what the device has left, and the word that stands for a traceback when it is out."""

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

from slimpajama_hf.errors import UserError
from slimpajama_hf.screen import format_bytes

#: What the allocators that have no exception of their own say: that of a CPU (c10/core/impl/alloc_cpu.cpp), of MPS.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, is a device or a machine that has no memory left."""
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
    """An error in half a line; a lack of memory without the allocator's advice."""
    return "out of memory" if is_out(error) else f"{type(error).__name__}: {error}"


def give_back() -> None:
    """Hand what is held but not used back to the device. What an exception still refers to is used."""
    import torch

    from slimpajama_hf.model import transfers

    gc.collect()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        transfers.release_cached(device)


@contextlib.contextmanager
def said(what: str, cure: str = "close what else uses the device, or start with a smaller --model") -> Iterator[None]:
    """A lack of memory inside becomes a sentence: "out of memory while `what`; `cure`"."""
    out = False
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out(error):
            raise
        # Said outside: what the exception refers to is freed first.
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
    """Weights, their average, gradients and what the optimizer keeps, float32."""
    activation_bytes: int
    """Of one step: weights cast to a lower precision, what lies between forward and backward; an estimate."""
    beside_bytes: int = 0
    """The most that anything beside the steps takes at a time: a second set of gradients (`noise.py`), a passport."""

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + self.beside_bytes


def needs(
    model: PreTrainedModel,
    max_length: int,
    precision: str,
    averaged: bool = False,
    hidden_optim: str = "adamw",
    *,
    written_out: bool = False,
    measures_noise: bool = False,
    device: str | None = None,
    processes: int = 1,
    sharded: bool = False,
) -> Needs:
    """Memory of a run whose steps are of one sample of `max_length` tokens.

    `averaged`: with an average of the weights; `written_out`: the step is that of `gpt2_step.py`; `measures_noise`:
    gradients are compared now and then (`noise.py`); `device`: its type, by default that of the model; `processes`:
    those that compute a step together, and have a model each or (`sharded`) a part of one. What the libraries and the
    driver take by themselves is not counted.
    """
    from slimpajama_hf.model import optimization

    config: Any = model.config.get_text_config(decoder=True)
    device = device or model.device.type
    parameters = model.num_parameters()
    low = precision != "float32"
    muon = optimization.learn_by_muon(model, hidden_optim)
    state = (12 if averaged else 8) * parameters + optimization.moments_bytes(model, hidden_optim)
    if processes > 1:
        # Gradients on their way to the others (DDP's buckets); of a sharded model each has its part of everything.
        state = state // processes if sharded else state + 4 * parameters
    step = _written_out(config, max_length, low, device) if written_out else _by_autograd(config, max_length, low)
    # Autocast keeps a cast copy of the weights between forward and backward, the written-out step for good.
    casts = 2 * parameters if low else 0
    if low and written_out and device == "cpu":
        # Packed twice (products.py).
        casts += 2 * muon
    # A passport: logits and their softmax, float32, while no step is on.
    passport = 2 * 4 * max_length * config.vocab_size
    if measures_noise:
        beside = max(4 * parameters, passport if device == "cuda" else passport - step)
    else:
        # A captured step keeps its memory to itself.
        beside = passport if written_out and device == "cuda" else max(0, passport - step)
    return Needs(parameters, state, step + casts, beside)


def _written_out(config: Any, length: int, low: bool, device: str) -> int:
    """Most bytes that are alive in a step of `gpt2_step.py`, beside weights and gradients."""
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    inner = getattr(config, "n_inner", None) or 4 * hidden
    width = 2 if low else 4
    # The residual stream before attention and before the MLP, float32.
    kept = 2 * 4 * hidden
    # In the precision of products: two norms, queries, keys and values, what was attended, both sides of the GELU.
    kept += width * (2 * hidden + 3 * hidden + hidden + 2 * inner)
    if device != "cpu":
        # The fused kernel's own copy of its output.
        kept += width * hidden
    else:
        if low:
            # GELU's slope stays in float32; queries, keys and values lie together a second time.
            kept += (4 - width) * inner + width * 3 * hidden
        if length <= 512:
            # Attention weights, about three quarters of which causality leaves in blocks; in low precision all, twice.
            kept += heads * length * ((4 + 2) if low else 3)
    logits = 4 * length * config.vocab_size
    head = logits
    if low:
        # The gradient of the logits, and that of the head, cast.
        rows = config.vocab_size if device != "cpu" else min(4096, config.vocab_size)
        head += 2 * length * config.vocab_size + 2 * rows * hidden
    elif device == "cpu":
        head += 4 * min(4096, config.vocab_size) * hidden
    return layers * length * kept + head


def _by_autograd(config: Any, length: int, low: bool) -> int:
    width = 2 if low else 4
    # About 17 values of the hidden size are kept per token and layer (two norms, q k v, attention out, 4x twice, ...).
    per_token = getattr(config, "num_hidden_layers", 0) * 17 * getattr(config, "hidden_size", 0) * width
    # Logits in the working precision, once more in float32 for the loss, and their gradient.
    return int(length * (per_token + config.vocab_size * (width + 4 + 4)))


# ---- what there is ----


def free_bytes(device: torch.device) -> int | None:
    """Bytes of `device` that nobody holds (of a CPU: that the machine can give); None where nobody can say."""
    import torch

    if device.type == "cpu":
        return _free_of_machine()
    asked = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    try:
        return int(asked(device)[0]) if asked is not None else None
    except (RuntimeError, ValueError):
        return None


def held_bytes(model: Any, device: torch.device) -> int:
    """What this process holds of `device` already, with a model of float32 weights on it."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return 4 * int(model.num_parameters())


def _free_of_machine() -> int | None:
    """What the kernel says is available, and no more than a container may take."""
    found = []
    with contextlib.suppress(ImportError, OSError):
        import psutil

        found.append(int(psutil.virtual_memory().available))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        # "max" where there is no limit: no number.
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        taken = int((group / "memory.current").read_text(encoding="utf-8"))
        found.append(max(0, limit - taken))
    return min(found) if found else None


def warning(model: Any, device: torch.device, needed: Needs, settings: Any, processes: int = 1) -> str | None:
    """One sentence where a run needs more than `device` has left, with what to type; None where it fits, or nobody can
    say. `processes`: those that share it."""
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
    """Processes of this run on this machine, as a launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
