"""Matrices inside the blocks learn at a part of the rate."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from slimpajama_hf import model as models
from slimpajama_hf.optimization import hidden_matrices, slow_down_hidden_matrices
from slimpajama_hf.tokenizer import load_tokenizer
from tests.conftest import run_command, run_script

WIDE = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=64,n_head=2", "--tokenizer", "builtin"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin")


@pytest.mark.parametrize("tied", ["true", "false"])
def test_hidden_matrices_are_those_of_the_blocks(tokenizer, tied):
    model = models.build(models.model_config("tiny", f"n_layer=2,tie_word_embeddings={tied}", tokenizer, 64), 1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert [names[id(parameter)] for parameter in hidden_matrices(model)] == [
        f"transformer.h.{block}.{kind}.weight" for block in range(2) for kind in kinds
    ]


def test_groups_keep_their_options_and_every_parameter_stands_in_one(tokenizer):
    model = models.build(models.model_config("tiny", "n_layer=1", tokenizer, 64), 1)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3, betas=(0.8, 0.9)
    )
    slow_down_hidden_matrices(optimizer, model, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.25e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    placed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(placed) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize(("flags", "share"), [([], 0.1), (["--hidden_rate", "1"], 1.0)])
def test_the_first_update_of_a_real_run_moves_them_by_their_rate(tokenizer, shards, tmp_path, flags, share):
    """Adam's first update is the rate, whatever the gradient: at step 0 of 10 of warm-up 1e-3/10, and its share."""
    run = tmp_path / "run"
    done = run_script(*WIDE, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "1", "--warmup_steps", "10", "--seed", "3",
                      "--precision", "float32", "--output_dir", str(run), "--average_weights", "0", *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("matrices at 0.1 of it" in done.stderr) == (share < 1)
    begun = models.build(models.model_config("tiny", "n_layer=1,n_embd=64,n_head=2", tokenizer, 256), 3)
    after = load_file(run / "checkpoint-1/model.safetensors")
    moved = {name: (after[name] - weight.detach()).abs().max().item() for name, weight in begun.named_parameters()}
    for name, distance in moved.items():
        hidden = ".weight" in name and (".attn." in name or ".mlp." in name)
        assert distance == pytest.approx(1e-4 * (share if hidden else 1), rel=1e-2), name


def test_it_goes_on_exactly_and_cannot_change_by_accident(shards, tmp_path):
    flags = [*WIDE, "--dataset", f"{shards}/*.jsonl.zst", "--warmup_steps", "5", "--save_steps", "4", "--display_samples",
             "1000", "--precision", "float32"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run, steps in ((whole, "8"), (cut, "4")):
        done = run_script(*flags, "--max_steps", steps, "--output_dir", str(run))
        assert done.returncode == 0, done.stderr
    on = ["--resume_from_checkpoint", "true", "--output_dir", str(cut), "--max_steps", "8"]
    refused = run_script(*on, "--hidden_rate", "1")
    assert refused.returncode != 0 and "hidden_rate" in refused.stderr
    assert run_script(*on).returncode == 0
    same = run_command("verify", str(whole), str(cut))
    assert same.returncode == 0, same.stdout + same.stderr


def test_a_rate_that_is_none_is_one_sentence(shards, tmp_path):
    done = run_script(*WIDE, "--dataset", f"{shards}/*.jsonl.zst", "--hidden_rate", "0", "--output_dir", str(tmp_path / "r"))  # fmt: skip
    assert done.returncode == 2 and "--hidden_rate 0" in done.stderr and "Traceback" not in done.stderr
