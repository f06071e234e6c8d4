"""The gradient noise scale: right where it is known, from the optimizer's own average, and said in honest words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from slimpajama_hf import noise
from slimpajama_hf.noise import NoiseScale
from tests.conftest import read_ledger


@pytest.mark.parametrize("truth", [3.0, 30.0, 300.0])
def test_it_finds_a_noise_scale_that_is_known(truth):
    """Gradients of a fixed mean in 4,000 dimensions, and AdamW's first moment of them."""
    draw = np.random.default_rng(7)
    size, beta1 = 4000, 0.9
    mean = draw.normal(size=size)
    mean /= np.linalg.norm(mean)
    spread = (truth / size) ** 0.5
    moment, found = np.zeros(size), None
    scale = NoiseScale(beta1, max_norm=0)
    for step in range(4000):
        gradient = mean + spread * draw.normal(size=size)
        moment = beta1 * moment + (1 - beta1) * gradient
        looked = step % noise.STEPS_BETWEEN == noise.STEPS_BETWEEN - 1
        norm = float(np.linalg.norm(moment)) / (1 - beta1 ** (step + 1)) if looked else None
        found = scale.add(float(np.linalg.norm(gradient)), norm, 1) or found
    assert found == pytest.approx(truth, rel=0.15)


def test_gradients_without_a_mean_have_none():
    scale, found = NoiseScale(0.9, 1.0), []
    for step in range(1000):
        found.append(scale.add(5.0, 0.05 if step % 10 == 9 else None, 1))
    assert set(found) == {None}


def test_the_ledger_has_the_norm_of_what_the_optimizer_holds(finished):
    rows = read_ledger(finished)
    assert [row["step"] for row in rows if row["momentum_norm"] is not None] == [9, 19, 29, 39]
    for step in (9, 39):
        state = torch.load(finished / f"checkpoint-{step + 1}/optimizer.pt", weights_only=True)["state"]
        moments = torch.cat([each["exp_avg"].flatten() for each in state.values()])
        norm = moments.norm().item() / (1 - 0.9 ** (step + 1))
        assert rows[step]["momentum_norm"] == pytest.approx(norm, rel=1e-5)


def test_what_it_means_is_said():
    words = noise.in_words(300, 1)
    assert "noise-bound" in words and "8 times as many would need about 2% more documents" in words
    assert "signal-bound" in noise.in_words(2, 8)
    assert json.dumps(words)
