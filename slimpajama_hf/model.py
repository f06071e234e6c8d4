"""The model: presets, overrides, and what a run of it needs.

To add a preset: a row in `PRESETS`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: Sizes of GPT-2 (Radford et al. 2019, table 2), and one that learns visibly on a CPU. Parameters with GPT-2's
#: vocabulary of 50,257 (`tiny`: with the builtin tokenizer's 4,096).
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 5, "n_head": 4, "n_embd": 256},  # 5.3M
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
}

#: One pass over the data needs no dropout: nothing is seen twice, so nothing can be learned by heart.
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`n_layer=6,n_embd=384` -> {"n_layer": 6, "n_embd": 384}. Raises UserError for anything else."""
    overrides = {}
    for pair in (text or "").split(","):
        if not pair.strip():
            continue
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(
                f"--config_overrides {text}: {pair!r} is not name=value; expected e.g. n_layer=6,n_embd=384"
            )
        try:
            overrides[name] = json.loads(value)
        except ValueError:
            overrides[name] = {"True": True, "False": False}.get(value, value)
    return overrides


def model_config(
    model: str, overrides: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreTrainedConfig:
    """The configuration that `--model` and `--config_overrides` name, sized for a tokenizer.

    Raises UserError for an unknown preset, a file that is no configuration, an unknown override, or a context that
    is shorter than `max_length`.
    """
    from transformers import AutoConfig, GPT2Config

    name = model.removeprefix("gpt2-") if model.startswith("gpt2-") else model
    config: PreTrainedConfig
    if name in PRESETS:
        # GPT-2's `gelu_new` is six elementwise kernels; this is the same function in one.
        config = GPT2Config(**PRESETS[name], **NO_DROPOUT, activation_function="gelu_pytorch_tanh")  # type: ignore[arg-type]
    elif model.endswith(".json"):
        if not Path(model).is_file():
            raise UserError(f"--model {model}: no such file; expected a config.json or one of {', '.join(PRESETS)}")
        try:
            values = json.loads(Path(model).read_text(encoding="utf-8"))
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--model {model}: not a model configuration ({' '.join(str(error).split())})") from None
        if config.model_type == "gpt2":
            for dropout in NO_DROPOUT:
                # A file that says nothing of dropout gets none; one that does is obeyed.
                if dropout not in values:
                    setattr(config, dropout, 0.0)
    else:
        raise UserError(f"--model {model}: unknown; expected {', '.join(PRESETS)} or a config.json")
    for key, value in parse_overrides(overrides).items():
        if not hasattr(config, key):
            raise UserError(f"--config_overrides {key}={value}: a {config.model_type} configuration has no {key}")
        if isinstance(getattr(config, key), int) and not isinstance(value, int):
            raise UserError(f"--config_overrides {key}={value}: expected a whole number")
        setattr(config, key, value)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    # Without a pad token no forward looks for padding (transformers modeling_utils.py, 5.23, line 4692: a device read).
    config.pad_token_id = None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise UserError(
            f"--max_seq_length {max_length}: longer than the model's {positions} positions; "
            f"add --config_overrides n_positions={max_length}"
        )
    return config


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with fresh weights, drawn from `seed`. Raises UserError for sizes that do not fit together."""
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(f"--model, --config_overrides: {' '.join(str(error).split())}") from None
    # The Trainer divides GPT-2's loss by L where L-1 tokens are predicted, unless the loss has this name
    # (transformers trainer.py, 5.23, lines 543 and 2327).
    model.loss_type = "ForCausalLM"
    return model


@dataclasses.dataclass
class Needs:
    """What a run needs, in bytes."""

    parameters: int
    state_bytes: int
    """Weights, their average, gradients and what the optimizer keeps, float32."""
    activation_bytes: int
    """Kept between forward and backward of one sample; an estimate."""

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def needs(
    model: PreTrainedModel, max_length: int, precision: str, averaged: bool = False, hidden_optim: str = "adamw"
) -> Needs:
    """Memory of a step of one sample of `max_length` tokens; `averaged`: with an average of the weights beside them."""
    from slimpajama_hf import optimization

    config: GPT2Config | Any = model.config
    parameters = model.num_parameters()
    width = 2 if precision == "bfloat16" else 4
    layers = getattr(config, "num_hidden_layers", 0)
    hidden = getattr(config, "hidden_size", 0)
    # About 17 values of the hidden size are kept per token and layer (two norms, q k v, attention out, 4x twice, ...).
    per_token = layers * 17 * hidden * width
    # Logits in the working precision, once more in float32 for the loss, and their gradient.
    logits = config.vocab_size * (width + 4 + 4)
    # bfloat16 autocast keeps a cast copy of the weights between forward and backward.
    casts = 2 * parameters if precision == "bfloat16" else 0
    if casts and model.device.type == "cpu":
        # Packed twice (products.py).
        casts += 2 * optimization.learn_by_muon(model, hidden_optim)
    state = 4 * parameters + checkpoint_bytes(model, averaged, hidden_optim)
    return Needs(parameters, state, max_length * (per_token + logits) + casts)


def checkpoint_bytes(model: PreTrainedModel, averaged: bool, hidden_optim: str) -> int:
    """Bytes of what a checkpoint is made of: weights, their average if there is one, what the optimizer keeps."""
    from slimpajama_hf import optimization

    weights = 4 * model.num_parameters()
    return (2 if averaged else 1) * weights + optimization.moments_bytes(model, hidden_optim)


def format_bytes(size: int) -> str:
    """`1.9 GB`, `84 MB` (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
