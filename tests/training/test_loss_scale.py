"""float16: products in it, the scale of the loss, what is skipped, and a run that goes on to the bit."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimpajama_hf.model.gpt2_step import GPT2Step
from slimpajama_hf.training import loss_scale, stopping
from slimpajama_hf.training.loss_scale import LossScale
from slimpajama_hf.training.update import Update
from tests.conftest import ROOT, environment, read_ledger
from tests.model.test_gpt2_step import (
    build,
    ids_of,
    reference,
    tokenizer,  # noqa: F401
)

FLOAT16 = ["--precision", "float16"]
SMALLEST = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=32,n_head=2,n_positions=64", "--max_seq_length", "64",
            "--tokenizer", "builtin", "--viz_interval", "1000", "--display_samples", "1000", "--warmup_steps", "5"]  # fmt: skip


def scale_of(value: float) -> torch.Tensor:
    return torch.full((), value)


def together(gradients) -> torch.Tensor:
    return torch.cat([each.flatten() for each in gradients])


@pytest.mark.parametrize("length", [64, 23, 2])
def test_the_step_in_float16_is_autocast_to_its_rounding(tokenizer, length):  # noqa: F811
    """Both scaled by 1,024, and compared after that is taken out again."""
    model = build(tokenizer)
    ids = ids_of(length, len(tokenizer))
    exact = together(reference(model, ids)[1])
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
    (loss * 1024).backward()
    autocast = together(p.grad for p in model.parameters()) / 1024
    step = GPT2Step(model, "float16", 64, scale=scale_of(1024.0))
    result = step(ids)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-3)
    ours = step.gradients / 1024
    assert (ours - exact).norm() < 1.5 * (autocast - exact).norm() < 0.02 * exact.norm()
    assert step.squared_norms().sum().item() == pytest.approx(ours.square().sum().item(), rel=1e-4)
    assert step.loss_alone(ids).item() == result.loss.item()


def test_what_float16_cannot_hold_unscaled_is_there_scaled(tokenizer):  # noqa: F811
    """Of a long sample most gradients of logits are below 6e-8."""
    model = build(tokenizer)
    ids = ids_of(64, len(tokenizer))
    exact = together(reference(model, ids)[1])

    def error(scale: float) -> float:
        step = GPT2Step(model, "float16", 64, scale=scale_of(scale))
        step(ids)
        return ((step.gradients / scale - exact).norm() / exact.norm()).item()

    assert error(2.0**12) < 0.01 < 0.03 < error(2.0**-8)
    assert not math.isfinite(error(2.0**40))


def test_the_scale_is_halved_doubled_and_kept_as_gradscaler_does():
    ours, theirs = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    scale = LossScale(ours, torch.device("cpu"))
    theirs.scale(torch.ones(()))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    factor = scale.factor
    for step in range(2100):
        bad = step in (0, 1, 7)
        weight.grad = torch.full((2,), math.inf if bad else 1.0)
        theirs.step(optimizer)
        theirs.update()
        scale.learn(scale_of(float(bad)))
        assert ours.state_dict() == theirs.state_dict()
    assert factor is scale.factor and factor.item() == 2.0**16 / 8 * 2
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(ours.state_dict())
    assert LossScale(again, torch.device("cpu")).factor.item() == factor.item()
    assert again.state_dict() == ours.state_dict()


def test_a_step_without_a_gradient_changes_no_scale_and_lets_the_next_be_unscaled():
    scaler = loss_scale.for_a_cpu()
    scale = LossScale(scaler, torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for given in (None, scale_of(0.0), None):
        weight.grad = torch.ones(2)
        scaler.unscale_(optimizer)
        scale.learn(given)
    assert scale.factor.item() == 2.0**16


#: The program with measurements often enough for a short run.
PROGRAM = """import sys
from slimpajama_hf.record import noise; from slimpajama_hf.record import teaching
noise.STEPS_BETWEEN, teaching.STEPS_BETWEEN = 9, 7
import run_clm_slimpajama
raise SystemExit(run_clm_slimpajama.main(sys.argv[1:]))"""


def run(folder: Path, *flags: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--output_dir", str(folder), *flags],
        capture_output=True, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return read_ledger(folder)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """The same 24 steps in float32, in float16 written out, and in float16 by autograd: folder and ledger."""
    flags = [*SMALLEST, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "24", "--save_steps", "12", "--max_grad_norm",
             "0.5"]  # fmt: skip
    found = {}
    for name, more in (
        ("float32", ["--precision", "float32"]),
        ("auto", FLOAT16),
        ("autograd", [*FLOAT16, "--backward", "autograd"]),
    ):
        folder = tmp_path_factory.mktemp("runs") / name
        found[name] = folder, run(folder, *flags, *more)
    return found


@pytest.mark.parametrize("backward", ["auto", "autograd"])
@pytest.mark.long
def test_a_run_in_float16_learns_as_in_float32_and_what_it_skips_is_counted(runs, backward):
    """What the first scale is too high for is skipped, and the run goes on at the rate of its step."""
    low, exact = runs[backward][1], runs["float32"][1]
    skipped = [row["step"] for row in low if row["update_skipped"]]
    assert {row["update_skipped"] for row in low} <= {"", "not finite"} and skipped == list(range(len(skipped)))
    assert all(row["loss"] is not None for row in low)
    for mine, theirs in zip(low, exact, strict=True):
        assert mine["text_sha1"] == theirs["text_sha1"] and mine["learning_rate"] == theirs["learning_rate"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        if not mine["update_skipped"]:
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    assert any(mine["loss"] != theirs["loss"] for mine, theirs in zip(low, exact, strict=True))
    assert low[-1]["loss"] < low[0]["loss"] - 0.2


@pytest.mark.long
def test_noise_and_teaching_are_those_of_unscaled_gradients(runs):
    low, exact = runs["auto"][1], runs["float32"][1]
    for mine, theirs in zip(low, exact, strict=True):
        for name in ("grad_square", "grad_agreement", "loss_after", "next_loss"):
            assert (mine[name] is None) == (theirs[name] is None), name
            if mine[name] is not None:
                assert mine[name] == pytest.approx(theirs[name], rel=0.1)
    assert sum(row["grad_square"] is not None for row in low) == 2
    assert sum(row["loss_after"] is not None for row in low) == 3


@pytest.mark.first(1)
@pytest.mark.parametrize("backward", ["auto", "autograd"])
@pytest.mark.long
def test_it_goes_on_to_the_bit_with_its_scale(runs, tmp_path, backward):
    whole, rows = runs[backward]
    kept = torch.load(whole / "checkpoint-12/scaler.pt", weights_only=True)
    assert kept["_growth_tracker"] == 12 - sum(row["update_skipped"] != "" for row in rows[:12])
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-24")
    again = run(cut, "--resume_from_checkpoint", "true")
    times = ("throughput", "step_seconds", "chain")
    assert [{k: v for k, v in row.items() if k not in times} for row in again] == [
        {k: v for k, v in row.items() if k not in times} for row in rows
    ]
    first, second = (torch.load(each / "checkpoint-24/scaler.pt", weights_only=True) for each in (whole, cut))
    assert first == second and first["_growth_tracker"] == kept["_growth_tracker"] + 12
    first, second = (load_file(each / "checkpoint-24/model.safetensors") for each in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def failing(losses, scale) -> str | None:
    """What stops a run whose latest rows, all skipped, had these losses."""
    rows = [
        {"loss": loss, "shard": "a", "row": step, "step": step, "update_skipped": "not finite"}
        for step, loss in enumerate(losses)
    ]
    failure = stopping.weights_are_lost(rows, lambda: Path("nowhere"), scale)
    return str(failure) if failure else None


def test_a_scale_that_comes_down_ends_no_run_and_lost_weights_do():
    scaler = loss_scale.for_a_cpu()
    scale = LossScale(scaler, torch.device("cpu"))
    assert "10 steps in a row" in failing([2.0] * 10, None)
    assert failing([2.0] * 20, scale) is None, "there is room below 65,536"
    assert "10 steps in a row" in failing([2.0] * 3 + [None] * 10, scale), "a smaller scale mends no loss"
    for _ in range(26):
        scale.learn(scale_of(1.0))
    assert "--precision float32" in failing([2.0] * 26, scale)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_gradients_are_divided_by_the_scale_that_they_were_made_with(tokenizer, fused, limit):  # noqa: F811
    """Clipped or not, by the optimizer or before it; a scale that is halved in the same step is the next one's."""
    model = build(tokenizer)
    ids = ids_of(40, len(tokenizer))
    exact = together(reference(model, ids)[1])
    scale = LossScale(loss_scale.for_a_cpu(), torch.device("cpu"))
    step = GPT2Step(model, "float32", 64, scale=scale.factor)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    update = Update(optimizer, step, scale)

    def norm_of(loss):
        norm = update.clip(limit) if limit else update.leave_unclipped()
        update.decide(norm, loss, loss_decides=True, was_computed=True)
        return norm

    loss = step(ids).loss
    before = step.gradients.clone()
    norm = norm_of(loss)
    assert norm.item() == pytest.approx(exact.norm().item(), rel=1e-4)
    by = 2.0**16 * max(norm.item() / limit if limit else 1.0, 1.0)
    if fused:
        assert optimizer.grad_scale.item() == pytest.approx(by, rel=1e-4)
        assert torch.equal(step.gradients, before), "no pass over them"
    else:
        assert (step.gradients - exact / (by / 2.0**16)).norm() < 1e-4 * exact.norm()
    loss = step(ids).loss
    step.gradients[0] = math.inf
    norm_of(loss)
    assert scale.factor.item() == 2.0**15 and update.not_finite.item() == 1.0
    if fused and not limit:
        assert optimizer.grad_scale.item() == 2.0**16
    assert all(parameter.grad is None for parameter in model.parameters())
