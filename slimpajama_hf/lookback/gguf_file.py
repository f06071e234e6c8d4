"""Writes a saved GPT-2 as one GGUF file for llama.cpp and programs that use it: same weights, same vocabulary.

llama.cpp tokenizes by itself. A tokenizer that it would apply differently is refused, because a model is useless with
other ids. The `gguf` package, which knows the format, is needed only here.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from slimpajama_hf import files
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples import portable_tokenizer
from slimpajama_hf.samples.tokenizer import AS_TRAINED

#: Weights that transformers stores as (in, out), and GGUF as (out, in).
_TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

#: Names of the activation that llama.cpp's GPT-2 computes.
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclasses.dataclass(frozen=True)
class Written:
    """A summary of the written file."""

    parameters: int
    tokens: int


def write(folder: Path, target: Path) -> Written:
    """Write the model in `folder` (a checkpoint, or its `averaged`) to `target`.

    Raises UserError if the `gguf` package is missing, or for a model or tokenizer that llama.cpp does not support.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "export --to gguf writes with the gguf package, which is not installed; type: python -m pip install gguf"
        ) from None
    config = files.read_json(folder / "config.json")
    _refuse_another_model(folder, config)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(temporary, "gpt2")
    try:
        writer.add_name(target.stem)
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        tokens = _add_vocabulary(writer, folder, config)
        parameters = _add_weights(writer, folder, config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return Written(parameters, tokens)


def _refuse_another_model(folder: Path, config: dict[str, Any]) -> None:
    wrong = None
    if config.get("model_type") != "gpt2":
        wrong = f"it is a {config.get('model_type')}; expected a gpt2 (llama.cpp's own converter knows others)"
    elif config["activation_function"] not in _ACTIVATIONS:
        wrong = f"its activation is {config['activation_function']}; llama.cpp's GPT-2 has {_ACTIVATIONS[0]} alone"
    elif not config.get("scale_attn_weights", True) or config.get("scale_attn_by_inverse_layer_idx"):
        wrong = "its attention is scaled in a way that llama.cpp's GPT-2 has not got"
    if wrong is not None:
        raise UserError(f"{folder}: {wrong}; it is not exported")


# ---- weights -------------------------------------------------------------------------------------------------------


def _add_weights(writer: Any, folder: Path, config: dict[str, Any]) -> int:
    """Add all weights as float32; returns the number of their elements."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no .safetensors file in it; expected a saved model")
    count = 0
    for path in paths:
        with safe_open(path, framework="numpy") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no dictionary
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise UserError(f"{path}: {key} is no weight of a GPT-2 that llama.cpp knows; it is not exported")
                weight = weights.get_tensor(key)
                weight = weight.T if key.endswith(_TURNED) else weight
                writer.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))
                count += weight.size
    return count


# ---- vocabulary ----------------------------------------------------------------------------------------------------


def _add_vocabulary(writer: Any, folder: Path, config: dict[str, Any]) -> int:
    """Add tokens with scores or merges; returns how many there are, without those that only pad the embedding."""
    # A checkpoint of an older version is read as this version would have saved it.
    made = portable_tokenizer.files_for(folder, config["n_positions"])
    tokenizer_config = json.loads(_content(made, folder, "tokenizer_config.json"))
    if (why := portable_tokenizer.why_not_everywhere(tokenizer_config)) is not None:
        raise UserError(f"{folder}: {why}, and llama.cpp would read other tokens; it is not exported")
    if tokenizer_config.get(AS_TRAINED, {}).get("tokenizer_class") == "SentencePieceBackend":
        tokens, ids = _add_sentencepiece(writer, folder / "tokenizer.model", config["vocab_size"])
    else:
        tokens, ids = _add_byte_bpe(writer, folder, json.loads(_content(made, folder, "tokenizer.json")), config)
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        if (token := tokenizer_config.get(name)) is not None:
            add(ids[token["content"] if isinstance(token, dict) else token])
    # Training itself adds nothing before or after a text.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    return tokens


def _content(made: dict[str, bytes], folder: Path, name: str) -> bytes:
    if name not in made and not (folder / name).is_file():
        raise UserError(f"{folder}: no {name} in it; expected the tokenizer that was saved with a model")
    return made[name] if name in made else (folder / name).read_bytes()


def _add_sentencepiece(writer: Any, model: Path, rows: int) -> tuple[int, dict[str, int]]:
    from gguf import TokenType
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    size = processor.get_piece_size()
    kinds = [
        TokenType.UNKNOWN if processor.is_unknown(index)
        else TokenType.CONTROL if processor.is_control(index)
        else TokenType.UNUSED if processor.is_unused(index)
        else TokenType.BYTE if processor.is_byte(index)
        else TokenType.NORMAL
        for index in range(size)
    ]  # fmt: skip
    pieces = [processor.id_to_piece(index) for index in range(size)]
    filling = _filling(rows - size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces + filling)
    writer.add_token_scores([processor.get_score(index) for index in range(size)] + [-1e9] * len(filling))
    writer.add_token_types(kinds + [TokenType.UNUSED] * len(filling))
    # Tokenizers with an exact counterpart here take text as it is.
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    return size, {piece: index for index, piece in enumerate(pieces)}


def _add_byte_bpe(
    writer: Any, folder: Path, tokenizer: dict[str, Any], config: dict[str, Any]
) -> tuple[int, dict[str, int]]:
    from gguf import TokenType

    model, split = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    is_gpt2 = (
        model.get("type") == "BPE"
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split.get("add_prefix_space")
        and tokenizer.get("normalizer") is None
        and not model.get("ignore_merges")
        and not model.get("byte_fallback")
    )
    if not is_gpt2:
        raise UserError(
            f"{folder}: its tokenizer does not split text as GPT-2's does, and llama.cpp might read other tokens; "
            "it is not exported"
        )
    added = {each["id"]: each for each in tokenizer.get("added_tokens", ())}
    ids = {**model["vocab"], **{each["content"]: index for index, each in added.items()}}
    by_id = {index: token for token, index in ids.items()}
    rows, tokens, kinds = config["vocab_size"], [], []
    for index in range(rows):
        tokens.append(by_id.get(index, f"[unused {index}]"))
        if index in added:
            kinds.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL if index in by_id else TokenType.UNUSED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    return len(by_id), ids


def _filling(count: int) -> list[str]:
    """Names for rows of an embedding that belong to no token."""
    return [f"[unused {number}]" for number in range(count)]
