"""Matrices inside the blocks learn by Muon, or by AdamW at a part of the rate."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from slimpajama_hf.model import optimization, shared_turns
from slimpajama_hf.model import presets as models
from slimpajama_hf.model.optimization import AdamWWithMuon, hidden_matrices, orthogonal, set_apart
from slimpajama_hf.samples.tokenizer import load_tokenizer
from slimpajama_hf.settings.update_rules import UpdateRules
from slimpajama_hf.settings.yaml_file import read_config
from tests.conftest import run_command, run_script, without_sum

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
    set_apart(optimizer, hidden_matrices(model), 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.25e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    placed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(placed) == sorted(map(id, model.parameters()))


def with_muon(model, rate=0.5, by_row=False, **adamw):
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter.ndim == 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in model.parameters() if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-3, fused=True, **adamw)
    return AdamWWithMuon.of(adamw, model, rate, torch.float32, by_row=by_row)


def tiny(tokenizer, seed=1):
    return models.build(models.model_config("tiny", "n_layer=2,n_embd=64,n_head=2", tokenizer, 64), seed)


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48)])
def test_orthogonal_has_the_same_singular_vectors_and_values_near_each_other(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    spectrum = torch.logspace(0, -1.5, min(shape))
    found = left.T @ orthogonal(3e-4 * left @ torch.diag(spectrum) @ right.T, dtype).float() @ right
    values = found.diagonal()
    assert values.min() > 0.5 and values.max() < 1.25
    assert (found - torch.diag(values)).abs().max() < tolerance


def test_what_is_no_hidden_matrix_learns_as_with_adamw_alone(tokenizer):
    ours, alone = tiny(tokenizer), tiny(tokenizer)
    optimizer = with_muon(ours)
    hidden = {name for name, each in ours.named_parameters() if any(each is matrix for matrix in hidden_matrices(ours))}
    others = [each for name, each in alone.named_parameters() if name not in hidden]
    adamw = torch.optim.AdamW(
        [{"params": [each for each in others if each.ndim == 2], "weight_decay": 0.1},
         {"params": [each for each in others if each.ndim == 1], "weight_decay": 0.0}], lr=1e-3, fused=True,
    )  # fmt: skip
    for step in range(optimization.DOCUMENTS_BETWEEN):
        set_gradients(ours, step)
        set_gradients(alone, step)
        for each in (optimizer, adamw):
            each.grad_scale = torch.tensor(2.0)
            each.step()
    theirs = dict(alone.named_parameters())
    assert {name for name, each in ours.named_parameters() if not torch.equal(each, theirs[name])} == hidden


def test_a_matrix_moves_by_the_orthogonal_average_of_its_gradients_when_it_is_its_turn(tokenizer, monkeypatch):
    monkeypatch.setattr(optimization, "DOCUMENTS_BETWEEN", 6)
    model = tiny(tokenizer)
    optimizer = with_muon(model)
    begun = [each.detach().clone() for each in hidden_matrices(model)]
    expected = [torch.zeros_like(each) for each in begun]
    moved_at: list[list[int]] = [[] for _ in begun]
    for step in range(12):
        before = [each.detach().clone() for each in hidden_matrices(model)]
        set_gradients(model, step)
        gradients = [each.grad.clone() for each in hidden_matrices(model)]
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.step()
        for place, (matrix, gradient) in enumerate(zip(hidden_matrices(model), gradients, strict=True)):
            expected[place].lerp_(gradient / 4.0, 1 - optimization.MOMENTUM)
            average = optimizer.state[matrix]["momentum_buffer"]
            assert torch.allclose(average, expected[place], rtol=1e-5, atol=1e-8)
            moved = before[place] * (1 - 0.5e-3 * 0.1 * 6) - matrix.detach()
            if torch.equal(matrix, before[place]):
                continue
            moved_at[place].append(step)
            # Queries, keys and values each for themselves; 6 steps' worth at half of the rate.
            for part, of_part in zip(*(each.split(64, 1) if each.shape == (64, 192) else (each,) for each in (moved, average)), strict=True):  # fmt: skip
                assert part.square().mean().sqrt() == pytest.approx(0.2 * 0.5e-3 * 6, rel=1e-3)
                direction = orthogonal(of_part, torch.float32)
                assert torch.nn.functional.cosine_similarity(part.flatten(), direction.flatten(), 0) > 1 - 1e-5
    assert all(len(steps) == 2 and steps[1] - steps[0] == 6 for steps in moved_at), moved_at
    assert {steps[0] for steps in moved_at} == set(range(6)), "they take turns"


def test_steps_of_several_documents_average_and_update_as_often_by_documents(tokenizer):
    model = tiny(tokenizer)
    matrix = hidden_matrices(model)[0]
    assert [optimization.steps_between(matrix, documents) for documents in (1, 2, 8, 64)] == [32, 16, 4, 1]
    assert optimization.steps_between(torch.empty(768, 3072)) == 48
    groups = [{"params": list(model.parameters())}]
    optimizer = AdamWWithMuon.of(torch.optim.AdamW(groups, fused=True), model, 0.5, torch.float32, documents=2)
    set_gradients(model, 0)
    gradient = matrix.grad.clone()
    optimizer.step()
    share = 1 - optimization.MOMENTUM**2
    assert torch.allclose(optimizer.state[matrix]["momentum_buffer"], share * gradient, rtol=1e-5)


@pytest.mark.parametrize("documents", [1, 2, 3, 8, 64])
def test_every_matrix_has_one_turn_in_its_time_and_those_of_a_step_cost_alike(documents):
    shapes = [torch.Size(each) for each in [(256, 768), (256, 256), (256, 1024), (1024, 256)] * 5]
    matrices = [torch.zeros(shape) for shape in shapes]
    between = optimization.steps_between(matrices[0], documents)
    together = -(-len(shapes) // between) if documents > 1 else 1
    turns = optimization._turns(shapes, together)
    assert len({turn % between for turn in turns}) == len(set(turns)) <= between
    at_once = [
        [shared_turns.cost(shapes[place]) for place, at in enumerate(turns) if at == turn] for turn in set(turns)
    ]
    assert max(map(len, at_once)) == together
    if documents == 2:
        # 10 pairs: of like cost, but for the one between queries and projections.
        assert sum(len(set(costs)) == 1 for costs in at_once) == 9


def test_a_matrix_without_a_gradient_so_far_stays_as_it_is(tokenizer, monkeypatch):
    """Samples of two tokens have nothing to attend to: the gradients of queries and keys are 0, not those of values."""
    monkeypatch.setattr(optimization, "DOCUMENTS_BETWEEN", 4)
    model = tiny(tokenizer)
    optimizer = with_muon(model)
    matrix = hidden_matrices(model)[0]
    queries, keys, values = (part.clone() for part in matrix.detach().chunk(3, 1))
    for step in range(4):
        set_gradients(model, step)
        matrix.grad[:, :128] = 0
        optimizer.step()
    decay = 1 - 0.5e-3 * 0.1 * 4
    now = matrix.detach().chunk(3, 1)
    assert torch.allclose(now[0], decay * queries) and torch.allclose(now[1], decay * keys)
    assert torch.isfinite(now[2]).all() and not torch.allclose(now[2], decay * values)


def test_a_step_that_is_skipped_moves_nothing(tokenizer):
    """Told as a GPU is told: by a flag on the device, which is not read."""
    model = tiny(tokenizer)
    optimizer = with_muon(model, by_row=True)
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    assert optimizer.state
    before = [each.detach().clone() for each in model.parameters()]
    averages = [optimizer.state[each]["momentum_buffer"].clone() for each in hidden_matrices(model)]
    rows = {name: value.clone() for name, value in optimizer.state[model.transformer.wte.weight].items()}
    assert sorted(rows) == ["exp_avg", "row_moment", "step"]
    for _ in range(optimization.DOCUMENTS_BETWEEN):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        optimizer.step()
    assert all(torch.equal(each, was) for each, was in zip(model.parameters(), before, strict=True))
    assert all(
        torch.equal(optimizer.state[each]["momentum_buffer"], was)
        for each, was in zip(hidden_matrices(model), averages, strict=True)
    )
    kept = optimizer.state[model.transformer.wte.weight]
    assert all(torch.equal(kept[name], was) for name, was in rows.items())


def test_turns_come_alike_whether_a_step_is_skipped_by_a_flag_or_by_having_no_gradients(tokenizer, monkeypatch):
    """On a device by `found_inf`, which is not read, on a CPU by no gradients: to the bit, at a matrix' turn too."""
    monkeypatch.setattr(optimization, "DOCUMENTS_BETWEEN", 4)
    models_of_both = tiny(tokenizer), tiny(tokenizer)
    optimizers = [with_muon(each, by_row=True) for each in models_of_both]
    for step in range(14):
        bad = step in (1, 2, 7, 8)
        for model in models_of_both:
            set_gradients(model, step)
        if bad:
            optimizers[0].zero_grad(set_to_none=True)
            for parameter in models_of_both[1].parameters():
                parameter.grad.fill_(float("nan"))
        optimizers[1].found_inf = torch.tensor(float(bad))
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in models_of_both), strict=True))
    counts = [group["steps"] for each in optimizers for group in each.param_groups if group.get("muon")]
    assert counts == [14] * len(counts)


def test_a_count_of_turns_goes_on_from_that_of_an_older_checkpoint(tokenizer):
    """One that left out the steps that a CPU had skipped: the turns come where they would have come."""
    model = tiny(tokenizer)
    optimizer = with_muon(model)
    set_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        if group.get("muon"):
            group["steps"] = 29
    optimizer.load_state_dict(state)
    before = [each.detach().clone() for each in hidden_matrices(model)]
    set_gradients(model, 1)
    optimizer.step()
    moved = [not torch.equal(each, was) for each, was in zip(hidden_matrices(model), before, strict=True)]
    # Counted 30, of every 32: the turn of the third.
    assert moved == [place == 2 for place in range(len(moved))]


def test_its_state_is_saved_and_goes_on_to_the_bit(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "DOCUMENTS_BETWEEN", 4)
    whole, cut = tiny(tokenizer), tiny(tokenizer)
    optimizers = [with_muon(whole, by_row=True), with_muon(cut, by_row=True)]
    for step in range(7):
        if step == 4:
            torch.save(optimizers[1].state_dict(), tmp_path / "optimizer.pt")
            again = tiny(tokenizer, seed=2)
            again.load_state_dict(cut.state_dict())
            cut, optimizers[1] = again, with_muon(again, by_row=True)
            optimizers[1].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            set_gradients(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    kept = sum(value.numel() for state in optimizers[0].state.values() for value in state.values() if value.ndim)
    assert 4 * kept == optimization.moments_bytes(whole, UpdateRules())


@pytest.mark.long
def test_matrices_learn_by_muon_in_a_real_run(tokenizer, shards, tmp_path):
    """Of four matrices with an update every 32 steps each its first within 32 steps: by the rate of that step."""
    run = tmp_path / "run"
    done = run_script(*WIDE, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "32", "--warmup_steps", "100", "--seed", "3",
                      "--precision", "float32", "--output_dir", str(run), "--average_weights", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "matrices by Muon at 0.2 of it" in done.stderr
    begun = models.build(models.model_config("tiny", "n_layer=1,n_embd=64,n_head=2", tokenizer, 256), 3)
    after = load_file(run / "checkpoint-32/model.safetensors")
    names = {id(weight): name for name, weight in begun.named_parameters()}
    for place, weight in enumerate(hidden_matrices(begun)):
        length = (after[names[id(weight)]] - weight.detach()).square().mean().sqrt().item()
        # Counted from 1, each at the step where it and its place are 32 together: the rate rises until 100.
        rate = 1e-3 * (32 - place) / 100
        assert length == pytest.approx(0.2 * 0.2 * rate * 32, rel=1e-2), names[id(weight)]


ADAMW = ["--hidden_optim", "adamw"]


@pytest.mark.first(1)
@pytest.mark.parametrize(("flags", "share"), [(ADAMW, 0.1), ([*ADAMW, "--hidden_rate", "1"], 1.0)])
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


@pytest.mark.slow
def test_it_goes_on_exactly_and_cannot_change_by_accident(shards, tmp_path):
    flags = [*WIDE, "--dataset", f"{shards}/*.jsonl.zst", "--warmup_steps", "5", "--save_steps", "20", "--display_samples",
             "0", "--viz_interval", "0", "--precision", "float32"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Matrices move for the first time at steps 29 to 32, by what they have averaged on both sides of the cut.
    for run, steps in ((whole, "40"), (cut, "20")):
        done = run_script(*flags, "--max_steps", steps, "--output_dir", str(run))
        assert done.returncode == 0, done.stderr
    on = ["--resume_from_checkpoint", "true", "--output_dir", str(cut), "--max_steps", "40"]
    refused = run_script(*on, "--hidden_rate", "1")
    assert refused.returncode != 0 and "hidden_rate" in refused.stderr
    # Its state is of another kind: that cannot be allowed.
    refused = run_script(*on, *ADAMW, "--allow_changes", "hidden_optim")
    assert refused.returncode == 1 and "begun with muon" in refused.stderr and "Traceback" not in refused.stderr
    assert run_script(*on).returncode == 0
    same = run_command("verify", str(whole), str(cut))
    assert same.returncode == 0, same.stdout + same.stderr


def test_a_rate_that_is_none_is_one_sentence(shards, tmp_path):
    done = run_script(*WIDE, "--dataset", f"{shards}/*.jsonl.zst", "--hidden_rate", "0", "--output_dir", str(tmp_path / "r"))  # fmt: skip
    assert done.returncode == 2 and "--hidden_rate 0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_begun_before_there_was_a_choice_goes_on_as_it_was(shards, tmp_path):
    run = tmp_path / "run"
    flags = [*WIDE, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(run), "--save_steps", "4"]
    done = run_script(*flags, *ADAMW, "--hidden_rate", "1", "--max_steps", "4")
    assert done.returncode == 0, done.stderr
    config = run / "run_config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("hidden_", "embedding_moment"))]
    assert len(kept) == len(lines) - 3
    config.write_text("".join(kept))
    without_sum(run)
    # It is not known any more as a run of this user, so its files are named again.
    on = ["--resume_from_checkpoint", "true", "--dataset", f"{shards}/*.jsonl.zst"]
    done = run_script(*on, "--output_dir", str(run), "--max_steps", "8")
    assert done.returncode == 0, done.stderr
    assert "matrices" not in done.stderr and "second moment" not in done.stderr, "as all the rest, in one plain AdamW"
    assert read_config(str(config))["hidden_optim"] == "adamw" and read_config(str(config))["hidden_rate"] == 1


def test_a_device_is_not_read(tokenizer, monkeypatch):
    """Tensors of the meta device refuse to be read, and to be computed with those of another device."""
    monkeypatch.setattr(optimization, "DOCUMENTS_BETWEEN", 4)
    config = models.model_config("tiny", "n_layer=2,n_embd=48,n_head=3", tokenizer, 64)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    optimizer = AdamWWithMuon.of(torch.optim.AdamW(groups), model, 0.5, torch.bfloat16)
    optimizer.found_inf = torch.zeros((), device="meta")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    for group in optimizer.param_groups[1:]:
        for _ in range(4):
            optimizer._step_matrices(group)
    assert {each["momentum_buffer"].device.type for each in optimizer.state.values()} == {"meta"}
    assert len(optimizer.state) == len(hidden_matrices(model)) == 8


@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48)])
def test_orthogonal_is_what_torch_makes_of_it(shape):
    """The same polynomial as `torch.optim.Muon`, as often."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = _zeropower_via_newtonschulz(matrix, optimization._POLYNOMIAL, optimization._ITERATIONS, 1e-7).float()
    ours = orthogonal(matrix, torch.bfloat16).float()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.999
    assert ours.norm() / theirs.norm() == pytest.approx(1.0, abs=0.02)


def test_made_at_every_document_it_moves_as_muon_of_torch(monkeypatch):
    """Without turns, without Nesterov, matched to AdamW's length: 20 steps from the same weights."""
    monkeypatch.setattr(optimization, "DOCUMENTS_BETWEEN", 1)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 64, generator=generator)
    ours, theirs = (torch.nn.Linear(64, 48, bias=False) for _ in range(2))
    for layer in (ours, theirs):
        layer.weight.data.copy_(weight)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    adamw = torch.optim.AdamW([{"params": [ours.weight]}], fused=True, **options)
    optimizer = AdamWWithMuon.of(adamw, ours, 1.0, torch.bfloat16)
    oracle = torch.optim.Muon(
        [theirs.weight], momentum=optimization.MOMENTUM, nesterov=False, ns_coefficients=optimization._POLYNOMIAL,
        ns_steps=optimization._ITERATIONS, adjust_lr_fn="match_rms_adamw", **options,
    )  # fmt: skip
    for _ in range(20):
        gradient = torch.randn(48, 64, generator=generator)
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        oracle.step()
    moved, expected = (layer.weight.detach() - weight for layer in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.98
    # Theirs is as long as singular values of 1 would make it; those of the polynomial lie about 1.
    assert moved.norm() / expected.norm() == pytest.approx(1.0, abs=0.15)
