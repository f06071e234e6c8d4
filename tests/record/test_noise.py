"""The gradient noise scale: right where it is known, of the gradients themselves, and said in honest words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slimpajama_hf.model.gpt2_step import GPT2Step
from slimpajama_hf.record import checkpoints, noise
from tests.conftest import NANO, read_ledger, run_script


def measurements(truth: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What steps with documents of a known noise scale would measure, between steps without."""
    draw = np.random.default_rng(seed)
    size = 3000
    mean = draw.normal(size=size)
    mean /= np.linalg.norm(mean)
    squares, agreements = np.full(count * 5, np.nan), np.full(count * 5, np.nan)
    for number in range(count):
        gradients = mean + (truth / size) ** 0.5 * draw.normal(size=(noise.DOCUMENTS, size))
        square = float((gradients**2).sum())
        products = float((gradients.sum(axis=0) ** 2).sum()) - square
        squares[5 * number + 4] = square / noise.DOCUMENTS
        agreements[5 * number + 4] = products / (noise.DOCUMENTS * (noise.DOCUMENTS - 1))
    return squares, agreements


@pytest.mark.parametrize("truth", [1.0, 10.0, 60.0])
def test_it_finds_a_noise_scale_that_is_known(truth):
    inside = 0
    for seed in range(20):
        found = noise.estimate(*measurements(truth, noise.WINDOW, seed))
        assert found is not None and found.value == pytest.approx(truth, rel=0.5)
        inside += found.low <= truth <= (found.high or math.inf)
    assert inside >= 16, "two standard errors hold the truth 19 times out of 20"


def test_where_no_signal_stands_out_there_is_none():
    squares, _ = measurements(10.0, noise.WINDOW, 0)
    scatter = np.where(np.isfinite(squares), np.random.default_rng(1).normal(0, 0.1, len(squares)), np.nan)
    assert noise.estimate(squares, scatter) is None
    assert noise.estimate(*measurements(1.0, noise.FEWEST - 1, 0)) is None


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """1,510 quick steps: measured at 499, 999 and 1,499, with checkpoints just before two of them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = run_script(
        *NANO, "--dataset", f"{shards}/*.jsonl.zst", "--epochs", "100", "--max_steps", "1510", "--save_steps", "499",
        "--precision", "float32", "--display_samples", "100000", "--viz_interval", "100000", "--max_seq_length", "32",
        "--average_weights", "0", "--warmup_steps", "100", "--output_dir", str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def gradients_at(run, step, shards, encoder):
    """From the checkpoint of a step: the clipped gradients of the eight documents from its cursor on, at its weights,
    and (name, elements) of the model's parameters."""
    import json

    from transformers import AutoModelForCausalLM

    from slimpajama_hf.corpus import opening
    from slimpajama_hf.corpus.documents import Cursor
    from slimpajama_hf.samples.stream import SampleStream

    folder = checkpoints.path_of(run, step)
    stream = SampleStream(opening.open_corpus(f"{shards}/*.jsonl.zst"), encoder, "truncate", 32, epochs=100)
    stream.start = Cursor(**json.loads((folder / checkpoints.DATA_STATE).read_text())["cursor"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    written_out = GPT2Step(model, "float32", 32)
    gradients = []
    for sample, _ in zip(stream, range(noise.DOCUMENTS), strict=False):
        written_out(torch.tensor(sample.input_ids))
        gradient = written_out.gradients.double()
        gradients.append(gradient / max(gradient.norm().item(), 1.0))
    return gradients, [(name, parameter.numel()) for name, parameter in model.named_parameters()]


def square_and_agreement(gradients):
    """Mean square, mean product of any two."""
    products = torch.stack(gradients) @ torch.stack(gradients).T
    count = len(gradients)
    return [products.diagonal().mean().item(), (products.sum() - products.trace()).item() / (count * (count - 1))]


@pytest.mark.slow
@pytest.mark.long
def test_the_ledger_has_what_the_gradients_of_the_next_documents_are(run, shards, encoder):
    """By hand, from the checkpoint of the step: its weights, and the eight documents from its cursor on."""
    rows = read_ledger(run)
    assert [row["step"] for row in rows if row["grad_square"] is not None] == [499, 999, 1499]
    square, agreement = square_and_agreement(gradients_at(run, 499, shards, encoder)[0])
    assert rows[499]["grad_square"] == pytest.approx(square, rel=1e-4)
    assert rows[499]["grad_agreement"] == pytest.approx(agreement, rel=1e-3, abs=1e-6)


@pytest.mark.long
def test_every_layer_has_its_part_of_it(run, shards, encoder):
    """By hand again, and the parts are the whole."""
    rows, gradients, names = read_ledger(run), *gradients_at(run, 499, shards, encoder)
    assert all(bool(row["grad_layers"]) == (row["grad_square"] is not None) for row in rows)
    layers = rows[499]["grad_layers"]
    assert list(layers) == ["wte", "wpe", "h.0.attn", "h.0.mlp", "ln_f"]
    for place, field in enumerate(("grad_square", "grad_agreement")):
        assert sum(values[place] for values in layers.values()) == pytest.approx(rows[499][field], rel=1e-3, abs=1e-6)
    for layer, (square, agreement) in layers.items():
        mine = torch.tensor([noise.layer_of(name) == layer for name, count in names for _ in range(count)])
        by_hand = square_and_agreement([gradient[mine] for gradient in gradients])
        assert [square, agreement] == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


def test_layers_are_those_of_the_model():
    assert noise.layer_of("transformer.wte.weight") == "wte" and noise.layer_of("lm_head.weight") == "lm_head"
    assert noise.layer_of("transformer.h.11.ln_1.bias") == noise.layer_of("transformer.h.11.attn.c_proj.weight")
    assert (
        noise.layer_of("transformer.h.11.ln_2.bias") == noise.layer_of("transformer.h.11.mlp.c_fc.bias") == "h.11.mlp"
    )


def test_a_layer_without_signal_is_told_from_one_that_has_it():
    """Noise scales of 10 and of infinity, side by side: the first is found, of the second it is said that it is large."""
    found, above = 0, []
    for seed in range(20):
        squares, agreements = measurements(10.0, noise.WINDOW, seed)
        measured = np.isfinite(squares)
        scatter = np.random.default_rng(100 + seed).normal(0, 0.02, noise.WINDOW)
        loud, none = noise.by_layer(
            {"loud": [square, agreement], "none": [1.0, product]}
            for square, agreement, product in zip(squares[measured], agreements[measured], scatter, strict=True)
        )
        assert loud.scale == noise.estimate(squares, agreements) and loud.at_least is None
        assert loud.share + none.share == pytest.approx(1.0) and loud.share > 0.9
        found += none.scale is not None
        above += [none.at_least] if none.at_least is not None else []
    assert found <= 2, "one in 33"
    assert len(above) >= 15 and min(above) > 20
    assert noise.by_layer([{"wte": [1.0, 0.5]}] * (noise.FEWEST - 1)) == []


def test_old_ledgers_have_no_layers(tmp_path):
    from slimpajama_hf.record.columns import read_columns
    from tests.report.test_report import make_run

    rows = read_columns(make_run(tmp_path / "run", 5, bare=True) / "ledger.jsonl")
    assert len(rows) == 5 and noise.by_layer(rows.seldom["grad_layers"].values()) == []


@pytest.mark.slow
@pytest.mark.long
def test_training_does_not_know_of_it(run, shards, tmp_path):
    """The same steps from a checkpoint on, with autograd's backward, measure nothing and read the same documents."""
    rows = read_ledger(run)
    assert [row["row"] for row in rows[495:520]] == [
        number % 30 for number in range(rows[495]["row"], rows[495]["row"] + 25)
    ]
    again = tmp_path / "run"
    done = run_script(
        *NANO, "--dataset", f"{shards}/*.jsonl.zst", "--epochs", "100", "--max_steps", "505", "--no-checkpoint",
        "--precision", "float32", "--display_samples", "100000", "--viz_interval", "100000", "--max_seq_length", "32",
        "--average_weights", "0", "--warmup_steps", "100", "--output_dir", str(again), "--backward", "autograd",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for left, right in zip(read_ledger(again), rows, strict=False):
        assert right["grad_square"] is None or left["grad_square"] is None
        assert left["text_sha1"] == right["text_sha1"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3)


def test_what_it_means_is_said():
    words = noise.in_words(noise.NoiseScale(60.0, 41.0, None))
    assert "60 documents (41 to any number; noise-bound)" in words
    assert "steps of 8 would need about 11% more documents" in words
    assert "signal-bound" in noise.in_words(noise.NoiseScale(0.2, 0.1, 0.3))
