"""Averaged weights: the right average, exactly resumed, scored and saved beside the raw ones, and none of it in training."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from slimpajama_hf.model.averaging import WeightAverage
from tests.conftest import NANO, read_ledger, run_command, run_script


def flags_of(shards: Path, run: Path, steps: int, *more: str) -> list[str]:
    return [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", str(steps), "--output_dir", str(run),
            "--precision", "float32", "--display_samples", "0", "--viz_interval", "0", "--warmup_steps", "5",
            "--save_steps", "1", "--average_weights", "20", *more]  # fmt: skip


def run_of(*flags: str) -> subprocess.CompletedProcess[str]:
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def every_step(shards, tmp_path_factory) -> Path:
    """30 steps with a checkpoint of each, held-out documents scored at two of them."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run_of(*flags_of(shards, run, 30, "--eval_steps", "15", "--eval_dataset", f"{shards}/example_train_2.jsonl.zst"))
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_is_the_average_of_the_weights_that_were(every_step):
    """By hand, in float64, from the weights of the checkpoints at every second step."""
    mean: dict[str, torch.Tensor] = {}
    share = 1 - 0.5 ** (2 / 20)
    for touch, step in enumerate(range(2, 31, 2), start=1):
        for name, weight in weights(every_step / f"checkpoint-{step}").items():
            before = mean.get(name, weight.double())
            mean[name] = before + max(share, 1 / touch) * (weight.double() - before)
    averaged = weights(every_step / "checkpoint-30/averaged")
    assert averaged.keys() == mean.keys()
    for name, weight in averaged.items():
        torch.testing.assert_close(weight.double(), mean[name], rtol=1e-5, atol=1e-7)
    assert not (every_step / "checkpoint-1/averaged").exists(), "nothing had been averaged yet"


def test_it_is_the_average_of_torch_once_it_is_old_enough():
    """`torch.optim.swa_utils` as oracle; young, ours is the plain mean, which `get_swa_multi_avg_fn` makes."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Linear(5, 3)
    average = WeightAverage(model, 20.0)
    decay = 0.5 ** (average.steps_between / 20)
    mean = AveragedModel(model)
    moving = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    draw, touches, old = torch.Generator().manual_seed(0), 0, False
    for step in range(1, 201):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        average.step(step)
        if step % average.steps_between:
            continue
        touches += 1
        if not old and 1 / touches > 1 - decay:
            mean.update_parameters(model)
            expected = mean.module
        else:
            if not old:
                moving.load_state_dict(mean.state_dict())
                old = True
            moving.update_parameters(model)
            expected = moving.module
        for ours, theirs in zip(average._average, expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert old and touches > 50


def test_a_share_of_the_run_grows_with_it():
    """By hand: after t steps a half-life of t/5 steps, touched at every tenth."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.2)
    expected = 0.0
    for step in range(1, 301):
        with torch.no_grad():
            model.weight.fill_(step**0.5)
        average.step(step)
        if step % 10 == 0:
            share = max(1 - 0.5 ** (10 / (0.2 * step)), 10 / step)
            expected += share * (step**0.5 - expected)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == pytest.approx(300**0.5)


@pytest.mark.long
def test_it_loads_with_no_code_of_ours_and_is_what_was_scored(every_step):
    lines = [json.loads(line) for line in (every_step / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [15, 30]
    raw, averaged = (lines[-1][name]["all"]["loss"] for name in ("scores", "averaged"))
    assert raw != averaged
    done = run_command("evaluate", str(every_step), "--dataset", f"{_shards(every_step)}/example_train_2.jsonl.zst",
                       "--split", "train", "--documents", "200", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["scores"]["all"]["loss"] == pytest.approx(raw, rel=1e-6)
    assert answer["averaged"]["all"]["loss"] == pytest.approx(averaged, rel=1e-6)
    folder = every_step / "checkpoint-30/averaged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=3).shape[1] > 1


def _shards(run: Path) -> Path:
    return Path(json.loads((run / "run.json").read_text())["corpus"]["files"][0][1]).parent


def test_training_does_not_know_of_it(shards, every_step, tmp_path):
    run = tmp_path / "run"
    run_of(*flags_of(shards, run, 30, "--average_weights", "0", "--save_steps", "30"))
    assert [row["chain"] for row in read_ledger(run)] == [row["chain"] for row in read_ledger(every_step)]
    left, right = (weights(each / "checkpoint-30") for each in (run, every_step))
    assert all(torch.equal(weight, right[name]) for name, weight in left.items())
    assert not (run / "checkpoint-30/averaged").exists()


@pytest.mark.slow
def test_it_goes_on_exactly(shards, every_step, tmp_path):
    run = tmp_path / "run"
    run_of(*flags_of(shards, run, 13, "--save_steps", "13"))
    run_of(*flags_of(shards, run, 30, "--save_steps", "30", "--resume_from_checkpoint", "true"))
    left, right = (weights(each / "checkpoint-30/averaged") for each in (run, every_step))
    assert all(torch.equal(weight, right[name]) for name, weight in left.items())


@pytest.mark.slow
def test_a_run_without_an_average_begins_one_and_says_so(shards, tmp_path):
    run = tmp_path / "run"
    run_of(*flags_of(shards, run, 6, "--save_steps", "6", "--average_weights", "0"))
    said = run_of(*flags_of(shards, run, 12, "--save_steps", "6", "--resume_from_checkpoint", "true")).stderr
    assert "has no averaged weights: their average begins here" in said
    assert (run / "checkpoint-12/averaged/model.safetensors").is_file()


def test_a_half_life_that_is_none_is_one_sentence(shards, tmp_path):
    done = run_script(*flags_of(shards, tmp_path / "run", 3, "--average_weights", "-1"))
    assert done.returncode == 2
    assert (
        "--average_weights -1.0: expected a half-life in steps, a share of the run so far (below 1), or 0 for none"
        in done.stderr
    )


def test_a_step_weighs_half_after_a_half_life():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=4))
    average = WeightAverage(model, 30)
    with torch.no_grad():
        for finished in range(1, 300):
            for parameter in model.parameters():
                parameter.fill_(1.0 if finished <= 240 else 0.0)
            average.step(finished)
            if finished == 270:
                with average.applied():
                    assert model.lm_head.weight.mean().item() == pytest.approx(0.5, abs=1e-3)
                assert model.lm_head.weight.mean().item() == 0.0
