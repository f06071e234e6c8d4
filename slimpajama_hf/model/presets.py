"""The model: presets, overrides, and a check that it does not see the tokens that it is to predict.

To add a preset, add a row to `PRESETS`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slimpajama_hf.settings.update_rules import UpdateRules

from slimpajama_hf import files, screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.model import causality, memory

#: Sizes of GPT-2 (Radford et al. 2019, table 2), and one that learns visibly on a CPU. The comments give the number of
#: parameters with GPT-2's vocabulary of 50,257; `tiny`: with the 4,096 of the builtin tokenizer.
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
        if name in overrides:
            raise UserError(f"--config_overrides {text}: {name} is given twice; leave one of them out")
        try:
            overrides[name] = json.loads(value)
        except ValueError:
            overrides[name] = {"True": True, "False": False}.get(value, value)
    return overrides


#: Sizes that must be at least 1, by the names that `PreTrainedConfig.attribute_map` maps from.
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "intermediate_size", "n_inner", "head_dim",
)  # fmt: skip
#: Names of counts, which cannot be negative.
_COUNTED = re.compile(r"^(n|num|max)_|_(size|dim|heads|layers)$")

#: Fields of a configuration that have no effect on training, and why.
WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        ("architectures", "id2label", "label2id", "num_labels", "problem_type", "transformers_version"),
        "it only describes a model",
    ),
    **dict.fromkeys(
        ("output_hidden_states", "output_attentions", "return_dict"), "it is about what a forward gives back"
    ),
    **dict.fromkeys(
        ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        "it is about models that classify texts",
    ),
    "chunk_size_feed_forward": "it is about memory alone, and changes no number",
    "is_encoder_decoder": "what is trained is a decoder alone",
    "add_cross_attention": "there is no encoder to attend to",
    "reorder_and_upcast_attn": "PyTorch's attention does not look at it",
    "use_cache": "training has no use for a cache, and what is saved generates with one",
}

#: An override that is not a field but has an effect: `eager`, `sdpa`, ...
_ATTENTION = "_attn_implementation"


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows an embedding needs for the ids of a tokenizer; some tokenizers have gaps in their ids."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def model_config(
    model: str, overrides: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreTrainedConfig:
    """The configuration that `--model` and `--config_overrides` name, sized for a tokenizer.

    Weights are float32 whatever a file says of `dtype`; `--precision` chooses what is computed in. Raises UserError for
    an unknown preset, a file that is not a configuration, an override that is unknown, has no effect or contradicts the
    tokenizer, and a context shorter than `max_length`.
    """
    import torch

    name = model.removeprefix("gpt2-") if model.startswith("gpt2-") else model
    if name in PRESETS:
        # The same function as GPT-2's `gelu_new`, in one kernel instead of six.
        values: dict[str, Any] = {"activation_function": "gelu_pytorch_tanh", **NO_DROPOUT, **PRESETS[name]}
        kind = "gpt2"
    elif model.endswith(".json"):
        values, kind = _read(model)
        if kind == "gpt2":
            # No dropout, unless the file asks for it.
            values = NO_DROPOUT | values
    else:
        # Such a name is in the record of a run whose script built the model (`TrainingRun`).
        own = "; a run whose model its own script built goes on with that script" if model[:1].isupper() else ""
        raise UserError(f"--model {model}: unknown; expected {', '.join(PRESETS)} or a config.json{own}")
    try:
        config = _of_values(kind, values)
    except Exception as error:
        # Every architecture has checks of its own, with exceptions of its own.
        raise UserError(f"--model {model}: not a model configuration ({causality.in_one_line(error)})") from None
    _refuse_what_is_not_trained(model, config)
    for size in map(config.attribute_map.get, SIZES, SIZES):
        if isinstance(getattr(config, size, None), int) and getattr(config, size) < 1:
            raise UserError(f"--model {model}: {size} is {getattr(config, size)}; expected 1 or more")
    changes = parse_overrides(overrides)
    if changes:
        changes = _checked(changes, config, tokenizer)
        try:
            # Built anew, so that dependent values (such as the size of a head) follow from the new ones.
            built_with = {name: value for name, value in changes.items() if name != _ATTENTION}
            config = _of_values(kind, _by_own_names(kind, values) | built_with)
            if _ATTENTION in changes:
                setattr(config, _ATTENTION, changes[_ATTENTION])
        except Exception as error:
            raise UserError(f"--config_overrides {overrides}: {causality.in_one_line(error)}") from None
    needed = vocabulary(tokenizer)
    own_size = values.get(vocab := _own_name(config, "vocab_size"), values.get("vocab_size"))
    if own_size not in (None, needed) and vocab not in changes:
        keep = f"; --config_overrides vocab_size={own_size} keeps it" if own_size > needed else ""
        screen.say(f"{model}: vocab_size is {needed:,} here, the tokenizer's, not {own_size:,}{keep}")
    for part in _parts(config):
        # An override may ask for more rows than the tokenizer has ids, such as a multiple of 64 for speed.
        part.vocab_size = changes.get(vocab, needed)
        part.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        part.eos_token_id = tokenizer.eos_token_id
        # Without a pad token, transformers' `warn_if_padding_and_no_attention_mask` does not look for padding in each
        # forward, which would wait for the device.
        part.pad_token_id = changes.get("pad_token_id")
    for part in _with_those_inside(config):
        if part.dtype is not None:
            # Nearly every file on the Hub says bfloat16, because its weights were published so.
            part.dtype = torch.float32
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise UserError(
            f"--max_seq_length {max_length}: longer than the model's {positions} positions; "
            f"add --config_overrides {_own_name(config, 'max_position_embeddings')}={max_length}"
        )
    return config


def _read(path: str) -> tuple[dict[str, Any], str]:
    """The values of a config.json, and its `model_type`."""
    from transformers import CONFIG_MAPPING

    if not Path(path).is_file():
        raise UserError(f"--model {path}: no such file; expected a config.json or one of {', '.join(PRESETS)}")
    try:
        values = files.read_json(Path(path))
        kind = values.pop("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"transformers knows no model_type {kind!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--model {path}: not a model configuration ({causality.in_one_line(error)})") from None
    return values, kind


def _of_values(kind: str, values: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with these values, under the architecture's names or the common ones."""
    from transformers import CONFIG_MAPPING

    # Copied, because some configurations keep and change what they are given.
    config: PreTrainedConfig = CONFIG_MAPPING[kind](**copy.deepcopy(_by_own_names(kind, values)))
    return config


def _by_own_names(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    names = CONFIG_MAPPING[kind].attribute_map
    return {names.get(name, name): value for name, value in values.items()}


def _own_name(config: PreTrainedConfig, name: str) -> str:
    """The architecture's own name for the common `name`."""
    return str(config.attribute_map.get(name, name))


def _with_those_inside(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and all configurations inside it."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _with_those_inside(getattr(config, name))


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration, and that of its text model if that is another one."""
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def _refuse_what_is_not_trained(model: str, config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model {model}: transformers has no causal language model of the type {config.model_type}; "
            "expected one that writes text, such as gpt2, llama or qwen3"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"--model {model}: it says quantization_config, and weights that are trained are float32; "
            "take that entry out of the file"
        )


def _checked(changes: dict[str, Any], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Overrides under the architecture's own names. Raises UserError for one that is unknown, of the wrong type,
    without effect, or at odds with the tokenizer."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    checked: dict[str, Any] = {}
    for key, value in changes.items():
        asked = f"--config_overrides {key}={json.dumps(value) if isinstance(value, bool | None) else value}"
        name = _own_name(config, key)
        if name in ("dtype", "torch_dtype"):
            raise UserError(f"{asked}: weights are float32 always; type --precision for what is computed in")
        if name not in fields and name != _ATTENTION:
            raise UserError(f"{asked}: a {config.model_type} configuration has no {key}")
        if name in checked:
            raise UserError(f"{asked}: {name} is given twice; leave one of them out")
        if key in WITHOUT_EFFECT and value != getattr(config, name):
            raise UserError(f"{asked}: without effect ({WITHOUT_EFFECT[key]}); leave it out")
        if name in fields:
            value = _of_its_type(asked, value, fields[name], config)
        _refuse_no_size(asked, name, value, config)
        if name == "initializer_range" and not value > 0:
            raise UserError(f"{asked}: expected a number above 0, because weights of 0 never learn")
        _refuse_unknown_activation(asked, name, value, config)
        if name == _own_name(config, "vocab_size") and value < vocabulary(tokenizer):
            raise UserError(
                f"{asked}: the tokenizer has {vocabulary(tokenizer)} tokens; expected as many or more, or leave it out"
            )
        _refuse_what_the_tokenizer_contradicts(asked, key, value, tokenizer)
        checked[name] = value
    return checked


#: The types of a field, in words.
_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def _of_its_type(asked: str, value: Any, field: dataclasses.Field, config: PreTrainedConfig) -> Any:
    """`value`, converted to the type of the field. Raises UserError if that does not fit."""
    kinds = typing.get_args(field.type) or (field.type,)
    words = " or ".join(_TYPES[kind] for kind in kinds if kind in _TYPES) or f"{field.type}"
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    try:
        # Configurations check the types of their values.
        setattr(copy.copy(config), field.name, value)
    except Exception:
        raise UserError(f"{asked}: expected {words}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{asked}: expected a number that is finite")
    return value


def _refuse_no_size(asked: str, name: str, value: Any, config: PreTrainedConfig) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        return
    if value < 1 and name in {_own_name(config, size) for size in SIZES}:
        raise UserError(f"{asked}: expected 1 or more")
    if value < 0 and _COUNTED.search(name):
        raise UserError(f"{asked}: expected 0 or more")


def _refuse_unknown_activation(asked: str, name: str, value: Any, config: PreTrainedConfig) -> None:
    from transformers.activations import ACT2FN

    if "act" in name and getattr(config, name, None) in ACT2FN and value not in ACT2FN:
        raise UserError(f"{asked}: no such activation; expected one of {', '.join(sorted(ACT2FN))}")


def _refuse_what_the_tokenizer_contradicts(
    asked: str, key: str, value: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    own = {
        "bos_token_id": (tokenizer.bos_token_id, tokenizer.eos_token_id),
        "eos_token_id": (tokenizer.eos_token_id,),
        "pad_token_id": (tokenizer.pad_token_id, None),
    }
    if key not in own:
        return
    # A tokenizer without a beginning-of-text token uses its end-of-text token.
    expected = own[key][1] if key == "bos_token_id" and own[key][0] is None else own[key][0]
    if value != expected and not (key == "pad_token_id" and value is None):
        has = "none" if expected is None else str(expected)
        raise UserError(f"{asked}: the tokenizer's is {has}; leave it out, or change the tokenizer")


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with fresh float32 weights, drawn from `seed`.

    Raises UserError for sizes that do not fit together, and for a model that sees the tokens that it is to predict.
    """
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    try:
        return prepare(AutoModelForCausalLM.from_config(config))
    except UserError:
        raise
    except Exception as error:
        # Sizes that do not fit together fail in some layer, with any exception.
        if memory.is_out(error):
            raise UserError(
                "out of memory while the model was built; take a smaller --model, or smaller --config_overrides"
            ) from None
        raise UserError(
            f"--model, --config_overrides: the model cannot be built ({causality.in_one_line(error)})"
        ) from None


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model that anybody built ready to be trained, and return it. Raises UserError for a model that sees the
    tokens that it is to predict."""
    import torch

    if any(weight.is_floating_point() and weight.dtype != torch.float32 for weight in model.parameters()):
        model.float()
    causality.refuse_what_sees_ahead(model)
    # For GPT-2's loss the Trainer divides by L although L-1 tokens are predicted, unless the loss has this name
    # (`_get_num_items_in_batch` and `get_batch_samples` of its trainer.py).
    model.loss_type = "ForCausalLM"
    return model


def checkpoint_bytes(model: PreTrainedModel, averaged: bool, rules: UpdateRules) -> int:
    """Bytes of a checkpoint: weights, their average if there is one, and the optimizer's state."""
    from slimpajama_hf.model import optimization

    weights = 4 * model.num_parameters()
    return (2 if averaged else 1) * weights + optimization.moments_bytes(model, rules)
