"""Embeddings made from counts, against the same by hand and by numpy."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from slimpajama_hf.model import cooccurrence


def texts_of(seed: int, count: int = 400) -> list[list[int]]:
    """Two kinds of words in turn: 1 to 9 come before 11 to 19, which come before 1 to 9; 20 comes anywhere."""
    draw = random.Random(seed)
    return [
        [draw.randint(1, 9) + 10 * (place % 2) if draw.random() < 0.95 else 20 for place in range(30)]
        for _ in range(count)
    ]


def test_neighbours_are_counted_within_a_text():
    counts = cooccurrence.count([[1, 2, 1, 2], [2, 3], [3], []], 5).to_dense()
    expected = torch.zeros(5, 5)
    expected[1, 2], expected[2, 1], expected[2, 3] = 2, 1, 1
    assert torch.equal(counts, expected)


def test_it_is_the_singular_vectors_of_positive_information():
    """numpy's whole decomposition spans the same space, with the same products of embeddings."""
    counts = cooccurrence.count(texts_of(1), 30)
    dense = counts.to_dense().double().numpy()
    halves = []
    for table in (dense, dense.T):
        chance = table.sum(0) ** cooccurrence.SMOOTHING
        chance /= chance.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            information = np.log(table / table.sum(1, keepdims=True) / chance)
        halves.append(np.where(table > 0, np.maximum(information, 0), 0))
    left, values, _ = np.linalg.svd(np.concatenate(halves, 1), full_matrices=False)
    expected = left[:, :8] * np.sqrt(values[:8])
    times = dense.sum(0) + dense.sum(1)
    expected -= times @ expected / times.sum()
    found, there = cooccurrence.embeddings(counts, 8, seed=3)
    assert there.tolist() == [bool(each) for each in times]
    expected[~there.numpy()] = 0
    products, by_numpy = (found @ found.T).double().numpy(), expected @ expected.T
    np.testing.assert_allclose(products / products.trace(), by_numpy / by_numpy.trace(), atol=2e-4)


@pytest.mark.parametrize("width", [16, 64])
def test_like_neighbours_give_like_embeddings_of_the_usual_length(width):
    """More elements than tokens too."""
    found, there = cooccurrence.embeddings(cooccurrence.count(texts_of(2), 30), width, seed=1)
    assert found.shape == (30, width) and not found[~there].any()
    rms = cooccurrence.RMS * math.sqrt(cooccurrence.WIDTH / width)
    assert found[there].square().mean().sqrt().item() == pytest.approx(rms, rel=1e-4)
    near = torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(found, dim=1).T
    assert near[1:10, 1:10].mean() > near[1:10, 11:20].mean() + 0.3
    again, _ = cooccurrence.embeddings(cooccurrence.count(texts_of(2), 30), width, seed=1)
    assert torch.equal(found, again)
