"""Embeddings of tokens learn with one second moment a token (`--embedding_moment`)."""

from __future__ import annotations

import pytest
import torch

from slimpajama_hf.anywhere.turned_muon import TurnedMuon
from slimpajama_hf.errors import UsageError
from slimpajama_hf.model import optimization
from slimpajama_hf.model import presets as models
from slimpajama_hf.model.optimization import AdamWWithMuon, token_embeddings
from slimpajama_hf.samples.tokenizer import load_tokenizer
from slimpajama_hf.settings.update_rules import UpdateRules
from slimpajama_hf.settings.yaml_file import read_config
from tests.conftest import run_command, run_script, without_sum

SMALL = "n_layer=1,n_embd=64,n_head=2"


def network(tied: str, seed: int = 1) -> torch.nn.Module:
    config = models.model_config("tiny", f"{SMALL},tie_word_embeddings={tied}", load_tokenizer("builtin"), 64)
    return models.build(config, seed)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_each_row_moves_by_its_average_over_the_root_of_its_second_moment(tied, fused):
    """By the formula, in float64; positions learn as with AdamW alone."""
    ours, alone = network(tied), network(tied)
    rows = {name for name, each in ours.named_parameters() if name.endswith(("wte.weight", "lm_head.weight"))}
    assert len(token_embeddings(ours)) == len(rows) == (1 if tied == "true" else 2)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1, "fused": fused}
    optimizer = AdamWWithMuon.of(torch.optim.AdamW(ours.parameters(), **options), ours, 0.5, torch.float32, by_row=True)
    adamw = torch.optim.AdamW([alone.transformer.wpe.weight], **options)
    expected = {name: each.detach().double() for name, each in ours.named_parameters() if name in rows}
    average = {name: torch.zeros_like(each) for name, each in expected.items()}
    moment = {name: torch.zeros(each.shape[0], 1, dtype=torch.float64) for name, each in expected.items()}
    scale = 4.0 if fused else 1.0
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 13):
        for name, each in ours.named_parameters():
            # A third of the rows have no gradient; the others of very different lengths.
            gradient = torch.randn(each.shape, generator=generator)
            if name in rows:
                lengths = torch.randn(each.shape[0], 1, generator=generator).mul(2).exp()
                gradient *= lengths * (torch.rand(each.shape[0], 1, generator=generator) > 0.3)
                own = gradient.double()
                average[name] = 0.8 * average[name] + 0.2 * own
                moment[name] = 0.95 * moment[name] + 0.05 * own.square().mean(1, keepdim=True)
                of_row, of_all = moment[name] / (1 - 0.95**step), moment[name].mean() / (1 - 0.95**step)
                second = of_row**0.75 * of_all**0.25
                expected[name] *= 1 - 1e-2 * 0.1
                expected[name] -= 1e-2 * average[name] / (1 - 0.8**step) / (second.sqrt() + 1e-8)
            if name.endswith("wpe.weight"):
                alone.transformer.wpe.weight.grad = gradient * scale
            each.grad = gradient * scale
        for each in (optimizer, adamw):
            each.grad_scale = torch.tensor(scale) if fused else None
            each.step()
    for name, each in ours.named_parameters():
        if name in rows:
            torch.testing.assert_close(each.detach().double(), expected[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(ours.transformer.wpe.weight, alone.transformer.wpe.weight)
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert 4 * kept == optimization.moments_bytes(ours, UpdateRules())
    assert 4 * kept < optimization.moments_bytes(ours, UpdateRules(embedding_moment="element"))


def test_a_token_without_a_gradient_so_far_stays_as_it_is():
    model = network("true")
    optimizer = AdamWWithMuon.of(
        torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True), model, 0.5, torch.float32, by_row=True
    )
    before = model.transformer.wte.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.transformer.wte.weight.grad[7:] = 0
    optimizer.step()
    moved = (model.transformer.wte.weight != before).any(1)
    assert moved[:7].all() and not moved[7:].any()


@pytest.mark.parametrize(
    ("asked", "rules"),
    [
        (("adamw_torch_fused", "muon", None, "auto"), UpdateRules("muon", 0.2, "row")),
        (("adamw_torch", "muon", 0.3, "element"), UpdateRules("muon", 0.3, "element")),
        (("adamw_torch", "adamw", None, "auto"), UpdateRules("adamw", 0.1, "element")),
        (("sgd", "muon", None, "auto"), UpdateRules("sgd", 1.0, "element")),
        (("sgd", "muon", 0.3, "auto"), UpdateRules("sgd", 0.3, "element")),
    ],
)
def test_what_is_asked_for_becomes_rules(asked, rules):
    assert UpdateRules.of(*asked) == rules


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--embedding_moment", "row", "--hidden_optim", "adamw"], "--embedding_moment row"),
        (["--embedding_moment", "row", "--optim", "sgd"], "--embedding_moment row"),
    ],
)
def test_a_flag_without_an_effect_is_refused(flags, found):
    done = run_script("--test", *flags)
    assert done.returncode == 2 and found in done.stderr and "leave one out" in done.stderr
    assert "Traceback" not in done.stderr


def test_turned_muon_says_what_a_state_of_the_other_kind_needs():
    model = network("true")
    old, new = TurnedMuon(model, embedding_moment="element"), TurnedMuon(model)
    with pytest.raises(UsageError, match="embedding_moment='element' to go on"):
        new.load_state_dict(old.state_dict())
    with pytest.raises(UsageError, match="expected 'row' or 'element'"):
        TurnedMuon(model, embedding_moment="rows")
    old.load_state_dict(TurnedMuon(model, embedding_moment="element").state_dict())


@pytest.mark.long
def test_a_run_of_before_goes_on_by_element_and_cannot_change(shards, tmp_path):
    flags = ["--model", "tiny", "--config_overrides", SMALL, "--tokenizer", "builtin", "--dataset",
             f"{shards}/*.jsonl.zst", "--warmup_steps", "2", "--save_steps", "4", "--display_samples", "0",
             "--viz_interval", "0"]  # fmt: skip
    by_row, whole, cut = tmp_path / "rows", tmp_path / "whole", tmp_path / "cut"
    done = run_script(*flags, "--max_steps", "4", "--output_dir", str(by_row))
    assert done.returncode == 0 and "one second moment a token" in done.stderr, done.stderr
    element = ["--embedding_moment", "element"]
    for run, steps in ((whole, "8"), (cut, "4")):
        done = run_script(*flags, *element, "--max_steps", steps, "--output_dir", str(run))
        assert done.returncode == 0 and "second moment" not in done.stderr, done.stderr
    config = cut / "run_config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("embedding_moment")))
    without_sum(cut)
    on = ["--resume_from_checkpoint", "true", "--output_dir"]
    # Without the sum it is not known as a run of this user, so its files are named again.
    done = run_script(*on, str(cut), "--max_steps", "8", "--dataset", f"{shards}/*.jsonl.zst")
    assert done.returncode == 0 and read_config(str(config))["embedding_moment"] == "element", done.stderr
    assert run_command("verify", str(whole), str(cut)).returncode == 0
    done = run_script(*on, str(by_row), "--max_steps", "8", *element, "--allow_changes", "embedding_moment")
    assert done.returncode == 1 and "--embedding_moment element: this run was begun with row" in done.stderr
    # The same, typed out.
    done = run_script(*on, str(by_row), "--max_steps", "8", "--embedding_moment", "row")
    assert done.returncode == 0, done.stderr
