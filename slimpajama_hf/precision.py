"""The precision of a step: what flags, environment and launcher ask for, and what was seen in the model.

The flag is `--precision`. transformers' `--bf16` and `--fp16` and a launcher's `mixed_precision` mean the same. They
are obeyed where all agree, and refused where two contradict each other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from slimpajama_hf import devices
from slimpajama_hf.errors import UsageError, UserError

#: accelerate's names of the precisions.
ACCELERATE = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}

#: Variable that a launcher sets (`accelerate launch --mixed_precision`, or its config file). Its default is `no`.
LAUNCHER = "ACCELERATE_MIXED_PRECISION"


def asked(precision: str, flags: Mapping[str, bool], environment: Mapping[str, str] = os.environ) -> str:
    """The precision that was asked for, or `auto` if none was. `flags`: `bf16` and `fp16`, where they were given.

    Raises UsageError if two of them contradict each other, or for a precision that this program does not have.
    """
    wishes = [] if precision == "auto" else [(f"--precision {precision}", precision)]
    for flag, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if flag in flags:
            value = flags[flag]
            wishes.append((f"--{flag} {str(value).lower()}", name if value else f"not {name}"))
    launcher = environment.get(LAUNCHER, "no").lower()
    if launcher not in ACCELERATE.values():
        raise UsageError(
            f"the launcher asks for the precision {launcher} ({LAUNCHER}); expected one of "
            f"{', '.join(ACCELERATE.values())}: start it with --mixed_precision no and add --precision here"
        )
    if launcher != "no":
        name = next(name for name, short in ACCELERATE.items() if short == launcher)
        wishes.append((f"the launcher's mixed_precision {launcher}", name))
    named = [wish for wish in wishes if not wish[1].startswith("not ")]
    refused = {name.removeprefix("not "): words for words, name in wishes if name.startswith("not ")}
    chosen = named[0] if named else None
    for words, name in named:
        other = chosen if chosen and name != chosen[1] else (refused[name], "") if name in refused else None
        if other is not None:
            raise UsageError(f"{other[0]} and {words} contradict each other; leave one of them out")
    if chosen is not None:
        return chosen[1]
    # `--bf16 false` alone means float32.
    return "float32" if "bfloat16" in refused else "auto"


def choose(asked: str, device: torch.device) -> str:
    """Return `float32`, `bfloat16` or `float16` for what `--precision` asks for. `auto` depends on the device."""
    import torch

    if asked != "auto":
        return asked
    # Emulated bfloat16 (GPUs before Ampere, processors without it) is slower than float32.
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float16" if has_fast_float16(torch.cuda.get_device_properties(device)) else "float32"
    return "bfloat16" if device.type == "cpu" and devices.has_fast_bfloat16() else "float32"


def has_fast_float16(card: Any) -> bool:
    """Whether a CUDA card multiplies float16 in tensor cores: from Volta (7.0) on, except the GTX 16 series (7.5)."""
    return (card.major, card.minor) >= (7, 0) and "GTX 16" not in card.name


def emulated(precision: str, device: torch.device) -> bool:
    """Whether the device can compute this precision only by converting to another one, which is slow."""
    import torch

    if device.type == "cpu":
        return precision == "float16" or (precision == "bfloat16" and not devices.has_fast_bfloat16())
    if device.type == "cuda" and precision == "bfloat16":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return False


def settle(training: Any, precision: str) -> None:
    """Set the precision in the training arguments. A Trainer reads these three fields once, when it is made."""
    training.bf16, training.fp16 = precision == "bfloat16", precision == "float16"
    training.mixed_precision = ACCELERATE[precision]


def seen_by_a_hook(model: Any, forward: Any) -> str:
    """The precision in which the linear layers of `model` compute while `forward()` runs, seen by forward hooks.

    Several are named together, as `bfloat16 and float32`. Without a linear layer it is `unknown`.
    """
    found: dict[str, None] = {}

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if hasattr(output, "dtype"):
            found[str(output.dtype).removeprefix("torch.")] = None

    handles = [module.register_forward_hook(hook) for module in _linear_layers(model)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return " and ".join(sorted(found)) or "unknown"


def seen_in(model: Any, tokens: int, device: torch.device) -> str:
    """Run `model` on a few tokens and return the precision that it computes in. Its mode (train or eval) is kept."""
    import torch

    input_ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return seen_by_a_hook(model, lambda: model(input_ids=input_ids, use_cache=False))
    finally:
        model.train(training)


def refuse_another(short: str, seen: str) -> None:
    """Raise UserError if the precision asked for (`short`, accelerate's name) is not among those that were seen."""
    asked = next(name for name, its_short in ACCELERATE.items() if its_short == short)
    if seen != "unknown" and asked not in seen.split(" and "):
        raise UserError(
            f"--precision {asked}: this model computes in {seen} here; type --precision {seen.split(' and ')[0]}"
        )


def _linear_layers(model: Any) -> list[Any]:
    import torch
    from transformers.pytorch_utils import Conv1D

    return [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]


@contextlib.contextmanager
def of_the_weights(model: Any) -> Iterator[Any]:
    """Give the model without accelerate's autocast around `forward`: it computes in float32, as its weights are.

    Samples, passports, prompts and the held-out loss are computed this way, whatever precision training has.
    """
    wrapped = model.__dict__.get("forward")
    if wrapped is None or "_original_forward" not in model.__dict__:
        yield model
        return
    model.forward = model._original_forward
    try:
        yield model
    finally:
        model.forward = wrapped
