"""Tests with one forward of a few tokens whether a model is causal; works for every architecture."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: A model sees ahead if the last token changes the logits of earlier positions by more than this share of the change
#: of its own logits. Models that see ahead had 0.002 or more; one that only rounds differently (experts) had 4e-7.
_SEEN_AHEAD = 1e-4


def in_one_line(error: BaseException, longest: int = 300) -> str:
    """The message of an error, in one line of at most `longest` characters."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, ValueError) or not text else f"{type(error).__name__}: {text}"
    text = text or type(error).__name__
    return text if len(text) <= longest else text[: longest - 1] + "…"


def refuse_what_sees_ahead(model: PreTrainedModel) -> None:
    """Raise UserError for a model that cannot compute logits, or whose logits depend on later tokens.

    The configuration is not trusted: some architectures are decoders by their configuration and look ahead all the same
    (transformers#48745).
    """
    kind = model.config.model_type
    try:
        ahead, behind = seen(model)
        if behind == 0.0:
            # Fresh weights of this model pass nothing between tokens, such as zeros that training will fill.
            ahead, behind = seen(_shaken(model))
    except Exception as error:
        raise UserError(
            f"--model: a {kind} model with this configuration cannot compute the logits of a text "
            f"({in_one_line(error)}); choose another --model or other --config_overrides"
        ) from None
    if not math.isfinite(ahead) or not behind > 0:
        raise UserError(
            f"--model: the logits of this {kind} model are no finite numbers, or do not depend on the tokens before; "
            "choose other --config_overrides"
        )
    if ahead > _SEEN_AHEAD:
        cures = [name for name in ("is_decoder", "causal") if _is_causal_with(model.config, name)]
        raise UserError(
            f"--model: {kind} as configured sees the future: its logits change with the tokens that come after them, "
            "so that it would learn to copy, not to predict; "
            + (f"add --config_overrides {cures[0]}=true" if cures else "choose another model, such as gpt2 or llama")
        )


def _is_causal_with(config: PreTrainedConfig, name: str) -> bool:
    """Whether a model would not see ahead if `name` were true in its configuration."""
    from transformers import AutoModelForCausalLM

    if getattr(config, name, True) is not False:
        return False
    changed = copy.deepcopy(config)
    setattr(changed, name, True)
    try:
        ahead, behind = seen(AutoModelForCausalLM.from_config(changed))
    except Exception:
        return False
    return ahead <= _SEEN_AHEAD and behind > 0


def _shaken(model: Any) -> Any:
    """A copy of the model with noise added to all weights."""
    import torch

    noise = torch.Generator().manual_seed(0)
    shaken = copy.deepcopy(model)
    with torch.no_grad():
        for weight in shaken.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise), alpha=0.02)
    return shaken


def seen(model: Any) -> tuple[float, float]:
    """How far the model sees ahead and behind, both as a share of the change of the last token's own logits.

    The first number is the largest change of earlier logits when the last token changes; the second that of later
    logits when the first token changes. Both are NaN if the last token's own logits do not change or are not finite.
    The mode of the model and the random generator are left as they were.
    """
    import torch

    rows = model.config.get_text_config(decoder=True).vocab_size
    # Token ids without a random generator: far from each other, and from both ends, where special tokens are.
    tokens = 8
    ids = torch.tensor([[(place + 1) * rows // (tokens + 3) for place in range(tokens)]] * 3)  # (3, T)
    ids[1, -1] = (tokens + 1) * rows // (tokens + 3)
    ids[2, 0] = (tokens + 2) * rows // (tokens + 3)
    # Some architectures draw random numbers in evaluation mode too.
    drawn, training = torch.get_rng_state(), model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.double()  # (3, T, V)
    finally:
        model.train(training)
        torch.set_rng_state(drawn)
    if logits.shape != (3, tokens, rows):
        raise ValueError(f"they are of shape {tuple(logits.shape)}, expected {(3, tokens, rows)}")
    with_last, with_first = (logits[1:] - logits[0]).abs().amax(2)  # (T,) each
    own = float(with_last[-1])
    if not bool(logits.isfinite().all()) or own == 0.0:
        return math.nan, math.nan
    return float(with_last[:-1].max()) / own, float(with_first[1:].max()) / own
