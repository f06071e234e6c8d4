"""What a saved model has beside what transformers writes: every program shall load it as it lies there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimpajama_hf.record import checkpoints
from slimpajama_hf.samples.tokenizer import load_tokenizer
from slimpajama_hf.samples.tokenizer_training import train_tokenizer
from slimpajama_hf.training import saved_model
from tests.conftest import make_text

TEXTS = ("  two  spaces", "naïve\tdéjà vu\n", "The river", " x ", "日本 🎉")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=[".", "averaged"])
def saved(finished: Path, request: Any) -> Path:
    return finished / "checkpoint-20" / request.param


def test_every_saved_folder_says_what_other_programs_ask_for(saved):
    config, tokenizer = read(saved / "config.json"), read(saved / "tokenizer_config.json")
    assert config["n_ctx"] == config["n_positions"] == tokenizer["model_max_length"]
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    # The classes of 4.57, which has no SentencePieceBackend and no TokenizersBackend.
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and (saved / "tokenizer.json").is_file()
    assert tokenizer["pad_token"] == tokenizer["eos_token"]
    assert read(saved / "generation_config.json")["pad_token_id"] == config["eos_token_id"]
    assert saved_model.files_for(saved) == {}, "once is enough"


def test_the_manifest_is_of_the_files_as_they_lie_there(finished):
    folder = finished / "checkpoint-20"
    assert {"tokenizer.json", "averaged/tokenizer.json"} <= read(folder / "manifest.json")["files"].keys()
    assert checkpoints.problem(folder) is None


def test_ids_and_text_are_those_of_training(saved, encoder):
    theirs = AutoTokenizer.from_pretrained(str(saved))
    assert theirs("a</s>")["input_ids"][-1] == theirs.eos_token_id, "fine-tuning puts it behind a text, by its name"
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == encoder.encode(text)[0]
        assert theirs.decode(ids) == text


def test_a_run_that_goes_on_has_the_tokenizer_that_it_was_trained_with(saved):
    ours = load_tokenizer(str(saved))
    assert type(ours).__name__ == "SentencePieceBackend" and ours.sp_model_kwargs == {"emit_unk_piece": True}
    assert ours.pad_token is None and ours.get_vocab() == load_tokenizer("builtin").get_vocab()
    for text in (*TEXTS, "</s> <unk>"):
        assert ours.encode(text) == load_tokenizer("builtin").encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_a_padded_batch_has_the_numbers_of_its_texts_alone(saved):
    tokenizer = AutoTokenizer.from_pretrained(str(saved))
    model: Any = AutoModelForCausalLM.from_pretrained(str(saved)).eval()
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        padded = model(**batch).logits
        for row, text in enumerate(TEXTS):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(padded[row, : len(alone)], alone, rtol=0, atol=2e-6)


def test_the_model_s_own_config_json_is_the_same_model(finished, tmp_path):
    """`n_ctx` is no change of the configuration: a run that goes on elsewhere takes it from its checkpoint."""
    from slimpajama_hf.model import presets
    from slimpajama_hf.session.run_record import _config_sha256

    saved = read(finished / "checkpoint-20" / "config.json")
    sums = {}
    for name, values in {"with": saved, "without": {k: v for k, v in saved.items() if k != "n_ctx"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        config = presets.model_config(str(tmp_path / f"{name}.json"), None, load_tokenizer("builtin"), 64)
        model: Any = type("Model", (), {"config": config})
        sums[name] = _config_sha256(model, "n_ctx"), _config_sha256(model)
    # Without it the sum is the one that it always was; with it, an older run has the second.
    assert sums["with"][0] == sums["without"][0] == sums["without"][1] != sums["with"][1]


@pytest.mark.parametrize("kind", ["byte-bpe", "sentencepiece-unigram"])
def test_other_kinds_of_tokenizers(kind, finished, tmp_path):
    texts = [make_text(seed, 400) for seed in range(60)]
    made = train_tokenizer(texts, kind, 400 if kind == "byte-bpe" else 420, tmp_path / "made")
    tokenizer = load_tokenizer(str(made))
    folder = tmp_path / "saved"
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(finished / "checkpoint-20" / name, folder / name)
    why = saved_model.complete(folder)
    config = read(folder / "tokenizer_config.json")
    assert config["pad_token"] == tokenizer.eos_token and config["model_max_length"] == 1024
    again = load_tokenizer(str(folder))
    assert again.pad_token is None and type(again) is type(tokenizer)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    if kind == "byte-bpe":
        assert why is None and config["tokenizer_class"] == "PreTrainedTokenizerFast"
        theirs = AutoTokenizer.from_pretrained(str(folder))
        assert all(theirs.decode(theirs(text)["input_ids"]) == text for text in TEXTS)
    else:
        # Where two ways of cutting a text score the same, `tokenizers` may take the other one.
        assert why is not None and config["tokenizer_class"] == "SentencePieceBackend"
