"""A model as GGUF: what the file says, read back by the `gguf` package. `make test-clients` runs it in llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import gguf_file
from slimpajama_hf.samples.tokenizer_training import train_tokenizer
from slimpajama_hf.training import saved_model
from tests.conftest import make_text, run_command

gguf = pytest.importorskip("gguf")


def fields(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: tensor.data for tensor in reader.tensors
    }


def test_a_checkpoint_as_gguf_has_its_weights_and_its_vocabulary(finished, tmp_path):
    target = tmp_path / "model.gguf"
    done = run_command("export", str(finished), "--to", "gguf", "--output", str(target))
    assert done.returncode == 0, done.stderr
    assert "checkpoint-40" in done.stdout and "4,096 tokens" in done.stdout and "averaged" in done.stdout
    about, tensors = fields(target)
    assert about["general.architecture"] == "gpt2" and about["gpt2.context_length"] == 1024
    assert (about["gpt2.block_count"], about["gpt2.embedding_length"], about["gpt2.attention.head_count"]) == (1, 32, 2)
    assert (about["tokenizer.ggml.model"], about["tokenizer.ggml.eos_token_id"]) == ("llama", 2)
    assert not about["tokenizer.ggml.add_bos_token"] and not about["tokenizer.ggml.add_space_prefix"]
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(finished / "checkpoint-40" / "tokenizer.model"))
    assert about["tokenizer.ggml.tokens"] == [processor.id_to_piece(index) for index in range(4096)]
    assert about["tokenizer.ggml.scores"] == [processor.get_score(index) for index in range(4096)]
    assert about["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    weights = load_file(finished / "checkpoint-40" / "model.safetensors")
    np.testing.assert_array_equal(tensors["blk.0.attn_qkv.weight"], weights["transformer.h.0.attn.c_attn.weight"].T)
    np.testing.assert_array_equal(tensors["token_embd.weight"], weights["transformer.wte.weight"])
    assert sum(tensor.size for tensor in tensors.values()) == sum(weight.size for weight in weights.values())


def model_with(kind: str, finished: Path, folder: Path, **config: Any) -> Path:
    """A saved model with another tokenizer, its embedding larger than its vocabulary."""
    made = train_tokenizer([make_text(seed, 400) for seed in range(60)], kind, 420, folder / "tokenizer")
    shutil.copytree(made, folder / "model")
    values = json.loads((finished / "checkpoint-40" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(values | {"vocab_size": 4096} | config))
    shutil.copyfile(finished / "checkpoint-40" / "model.safetensors", folder / "model" / "model.safetensors")
    saved_model.complete(folder / "model")
    return folder / "model"


def test_byte_level_bpe_has_its_merges(finished, tmp_path):
    folder = model_with("byte-bpe", finished, tmp_path)
    assert gguf_file.write(folder, tmp_path / "m.gguf").tokens == 420
    about, _ = fields(tmp_path / "m.gguf")
    assert (about["tokenizer.ggml.model"], about["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert about["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert len(about["tokenizer.ggml.tokens"]) == 4096 and about["tokenizer.ggml.token_type"][0] == 3
    assert all(about["tokenizer.ggml.tokens"][index] == token for token, index in tokenizer["model"]["vocab"].items())


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("sentencepiece-unigram", {}, "no exact form"),
        ("byte-bpe", {"activation_function": "relu"}, "its activation is relu"),
        ("byte-bpe", {"model_type": "llama"}, "it is a llama"),
        ("byte-bpe", {"scale_attn_by_inverse_layer_idx": True}, "attention is scaled"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(finished, tmp_path, kind, config, said):
    folder = model_with(kind, finished, tmp_path, **config)
    with pytest.raises(UserError, match=said):
        gguf_file.write(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_tokenizer_that_splits_otherwise_is_refused(finished, tmp_path):
    folder = model_with("byte-bpe", finished, tmp_path)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="does not split text as GPT-2's does"):
        gguf_file.write(folder, tmp_path / "m.gguf")
