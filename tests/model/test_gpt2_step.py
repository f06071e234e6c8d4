"""The step written out for GPT-2 is the step that autograd makes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from slimpajama_hf.model import optimization
from slimpajama_hf.model import presets as models
from slimpajama_hf.model.averaging import WeightAverage
from slimpajama_hf.model.gpt2_likeness import unsupported
from slimpajama_hf.model.gpt2_step import GPT2Step
from slimpajama_hf.model.products import Weights, square
from slimpajama_hf.samples.tokenizer import load_tokenizer
from tests.conftest import NANO_UNSEEN, read_ledger, run_script


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin")


def build(tokenizer, overrides: str = "", length: int = 64):
    config = models.model_config("tiny", f"n_layer=2,n_embd=48,n_head=3,{overrides}", tokenizer, length)
    model = models.build(config, 5)
    with torch.no_grad():
        # Fresh biases are 0 and norms 1: a wrong gradient of theirs, or a forgotten bias, would hide.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def ids_of(length: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def reference(model, ids: torch.Tensor):
    model.zero_grad(set_to_none=True)
    outputs = model(input_ids=ids[None], labels=ids[None], use_cache=False)
    outputs.loss.backward()
    return outputs, [p.grad.clone() for p in model.parameters()]


OVERRIDES = [
    "", "activation_function=gelu_new", "tie_word_embeddings=false", "n_inner=80", "scale_attn_weights=false",
    "scale_attn_by_inverse_layer_idx=true",
]  # fmt: skip


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_loss_guesses_surprisals_and_every_gradient_are_those_of_autograd(tokenizer, overrides):
    model = build(tokenizer, overrides)
    step = GPT2Step(model, "float32", 64)
    # Long, short, long: what one sample leaves in the buffers must not reach the next.
    for seed, length in enumerate((64, 2, 3, 40, 64, 17)):
        ids = ids_of(length, len(tokenizer), seed)
        outputs, gradients = reference(model, ids)
        result = step(ids)
        assert result.loss.item() == pytest.approx(outputs.loss.item(), rel=2e-6)
        logits = outputs.logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        torch.testing.assert_close(result.nats[: length - 1], nats, rtol=1e-5, atol=1e-5)
        assert result.correct.item() == (logits.argmax(-1) == ids[1:]).sum().item()
        for (name, parameter), expected in zip(model.named_parameters(), gradients, strict=True):
            error = (parameter.grad - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error < 2e-5, (name, length, error)
        exact = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        # One thread adds up a million squares in a row, in float32.
        assert step.squared_norms().sum().sqrt().item() == pytest.approx(exact, rel=5e-5)


def test_norms_are_those_of_what_lies_in_the_buffer(tokenizer):
    """Some are taken on the way; a gradient that is changed afterwards has another."""
    step = GPT2Step(build(tokenizer), "float32", 64)
    step(ids_of(64, len(tokenizer)))
    pieces = step.gradients.split([p.numel() for p in step._parameters])
    taken = step.squared_norms()
    torch.testing.assert_close(taken, torch.stack([piece.square().sum() for piece in pieces]), rtol=5e-5, atol=0)
    whole = torch.stack([square(piece) for piece in pieces])
    # Only that of the embedding is added up from parts.
    assert (taken != whole).nonzero().flatten().tolist() in ([], [0])
    step.gradients.div_(2.0)
    assert torch.equal(step.squared_norms(), whole / 4)
    step(ids_of(64, len(tokenizer), seed=7))
    torch.testing.assert_close(
        step.squared_norms(), torch.stack([piece.square().sum() for piece in pieces]), rtol=5e-5, atol=0
    )


def test_attention_beyond_the_explicit_length(tokenizer):
    model = build(tokenizer, "n_positions=600,", 600)
    ids = ids_of(530, len(tokenizer))
    outputs, gradients = reference(model, ids)
    result = GPT2Step(model, "float32", 600)(ids)
    assert result.loss.item() == pytest.approx(outputs.loss.item(), rel=2e-6)
    for (name, parameter), expected in zip(model.named_parameters(), gradients, strict=True):
        assert (parameter.grad - expected).norm() / expected.norm() < 2e-5, name


def test_padding_has_no_share(tokenizer):
    """What the CUDA graph does: a shorter sample at the full length, its padding without a share in the loss."""
    model = build(tokenizer)
    step = GPT2Step(model, "float32", 64)
    ids = ids_of(23, len(tokenizer))
    plain = step(ids)
    gradients = step.gradients.clone()
    padded = torch.zeros(64, dtype=torch.long)
    padded[:23] = ids
    with torch.no_grad():
        result = step._run(padded, step._shares(23, 64))
    assert result.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert result.correct.item() == plain.correct.item()
    torch.testing.assert_close(result.nats[:22], plain.nats[:22], rtol=1e-5, atol=1e-5)
    assert (step.gradients - gradients).norm() / gradients.norm() < 1e-5


def test_the_first_of_equal_logits_is_the_guess(tokenizer):
    """As `argmax` decides, so that accuracy is the same number whoever counts."""
    model = build(tokenizer, "tie_word_embeddings=false")
    with torch.no_grad():
        model.lm_head.weight.fill_(0.5)
    step = GPT2Step(model, "float32", 64)
    assert step(torch.zeros(10, dtype=torch.long)).correct.item() == 9
    assert step(torch.full((10,), 7)).correct.item() == 0


@pytest.mark.parametrize("length", [64, 23, 2])
def test_bfloat16_is_autocast_to_its_rounding(tokenizer, length):
    """Shorter samples are computed at a multiple of 32 tokens."""
    model = build(tokenizer)
    ids = ids_of(length, len(tokenizer))
    _, exact = reference(model, ids)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
    loss.backward()
    autocast = [p.grad.clone() for p in model.parameters()]
    result = GPT2Step(model, "bfloat16", 64)(ids)
    assert result.loss.item() == pytest.approx(loss.item(), rel=5e-3)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(result.nats[: length - 1], nats, rtol=2e-2, atol=5e-2)
    whole = torch.cat([g.flatten() for g in exact])

    def error(gradients) -> float:
        return ((torch.cat([g.flatten() for g in gradients]) - whole).norm() / whole.norm()).item()

    assert error([p.grad for p in model.parameters()]) < 1.5 * error(autocast)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resid_pdrop": 0.1}, "dropout"),
        ({"activation_function": "relu"}, "activation"),
        ({"reorder_and_upcast_attn": True}, "attention"),
    ],
)
def test_what_it_cannot_do_is_said(tokenizer, changes, words):
    """In the configuration itself: as a flag the last one is refused."""
    model = build(tokenizer)
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert words in unsupported(model)
    with pytest.raises(ValueError, match=words):
        GPT2Step(model, "float32", 64)


def test_frozen_weights_and_other_models_are_left_to_autograd(tokenizer):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    model = build(tokenizer)
    assert unsupported(model) is None
    model.transformer.wpe.weight.requires_grad_(False)
    assert "not all" in unsupported(model)
    other = GPTNeoForCausalLM(
        GPTNeoConfig(hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]])
    )
    assert "GPTNeo" in unsupported(other)


def test_gradients_that_differ_are_seen(tokenizer):
    """The comparison above can fail: one element of one bias, moved by a thousandth of its gradient's norm."""
    model = build(tokenizer)
    ids = ids_of(30, len(tokenizer))
    reference(model, ids)
    bias = model.transformer.h[0].mlp.c_fc.bias
    expected = bias.grad
    GPT2Step(model, "float32", 64)(ids)
    assert bias.grad is not expected
    bias.grad[0] += 1e-3 * expected.norm()
    assert (bias.grad - expected).norm() / expected.norm() > 2e-5


def test_a_run_with_it_goes_as_a_run_without(shards, tmp_path):
    """Through the real program: clipping, AdamW and the ledger, 40 steps at a rate that moves."""
    ledgers = []
    for backward in ("auto", "autograd"):
        run = tmp_path / backward
        done = run_script(
            *NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "40", "--warmup_steps", "5", "--output_dir", str(run),
            "--no-checkpoint", "--precision", "float32", "--backward", backward, "--max_grad_norm", "0.5",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("written out" in done.stderr) == (backward == "auto")
        ledgers.append(read_ledger(run))
    for ours, theirs in zip(*ledgers, strict=True):
        assert ours["text_sha1"] == theirs["text_sha1"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert max(row["grad_norm"] for row in ledgers[0]) > 0.5, "clipping was at work"
    assert ledgers[0][-1]["loss"] < ledgers[0][0]["loss"] - 0.3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("overrides", OVERRIDES)
def test_no_device_but_the_cpu_is_read_or_mixed_with_it(tokenizer, overrides, precision):
    """Tensors of the meta device refuse to be read, and to be computed with those of another device."""
    config = models.model_config("tiny", f"n_layer=2,n_embd=48,n_head=3,{overrides}", tokenizer, 64)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
        ids = torch.zeros(9, dtype=torch.long)
    with pytest.raises(RuntimeError, match="meta"):
        ids[0].item()
    step = GPT2Step(model, precision, 64)
    result = step(ids)
    assert {each.device.type for each in (result.loss, result.correct, result.nats, step.squared_norms())} == {"meta"}
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_what_is_seldom_changed_is_cast_when_it_has_changed_and_only_then(tokenizer, monkeypatch):
    """To the bit as without, over updates of Muon, weights put aside and back, and weights loaded."""
    monkeypatch.setattr(optimization, "DOCUMENTS_BETWEEN", 4)
    models_of_both, losses, casts = [build(tokenizer), build(tokenizer)], ([], []), [0, 0]
    refresh = Weights.refresh
    for which, model in enumerate(models_of_both):

        def counted(weights, which=which):
            changed = refresh(weights)
            casts[which] += len(changed)
            return changed

        monkeypatch.setattr(Weights, "refresh", counted)
        groups = [{"params": list(model.parameters())}]
        adamw = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        optimizer = optimization.AdamWWithMuon.of(adamw, model, 0.5, torch.float32, by_row=True)
        step = GPT2Step(model, "bfloat16", 64, seldom_changed=optimizer.matrices if which else ())
        average = WeightAverage(model, 1)
        begun = {name: weight.clone() for name, weight in model.state_dict().items()}
        for number in range(24):
            ids = ids_of(40, len(tokenizer), number)
            losses[which].append(step(ids).loss.item())
            optimizer.step()
            average.step(number + 1)
            if number == 10:
                with average.applied():
                    losses[which].append(step.loss_alone(ids).item())
            if number == 15:
                model.load_state_dict(begun)
    assert losses[0] == losses[1]
    # Of 28 parameters 8 are matrices: cast at first, after each of 6 updates, after three changes by others.
    assert casts[0] == 25 * 28 and 25 * 20 + 8 * 6 <= casts[1] <= 25 * 20 + 8 * (1 + 6 + 3)
