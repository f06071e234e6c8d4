"""Embeddings to begin with, from counts of which tokens stand side by side in a text.

Tokens with like neighbours get like embeddings. For each token there are two lists: how much more often than by chance
each token comes after it, and before it (positive pointwise mutual information, with the chance of rare neighbours
raised as by Levy, Goldberg and Dagan, 2015, TACL 3). The largest singular vectors of the table of these lists, times
the roots of their singular values, are the embeddings, as in their paper; they are turned at random, so that no
coordinate is longer than others, and brought to one length.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

#: Chance of a neighbour: its share of all tokens to this power.
SMOOTHING = 0.75

#: Root mean square of the elements, at a width of 256. At other widths, the length of an embedding stays the same.
RMS, WIDTH = 0.04, 256

#: Singular vectors that are computed beyond those needed, and rounds of multiplication: both make them more exact.
_BEYOND, _ROUNDS = 16, 4


def count(texts: Iterable[Sequence[int]], size: int) -> torch.Tensor:
    """How often token j comes right after token i: (size, size), sparse (COO), float32. `texts`: the ids of each."""
    pairs: list[torch.Tensor] = []
    for ids in texts:
        each = torch.tensor(ids, dtype=torch.int64)
        pairs.append(each[:-1] * size + each[1:])
    places, times = torch.cat([torch.zeros(0, dtype=torch.int64), *pairs]).unique(return_counts=True)
    table = torch.stack([places // size, places % size])
    return _table(table, times.float(), (size, size))


def embeddings(counts: torch.Tensor, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From `count` to (embeddings, (size, width); whether each token was counted, (size,)). Embeddings of tokens that
    were not are 0."""
    random = torch.Generator().manual_seed(seed)
    size = len(counts)
    times = torch.zeros(size).index_add_(0, counts.indices()[0], counts.values())
    times.index_add_(0, counts.indices()[1], counts.values())
    there = times > 0
    table = torch.cat([_information(counts), _information(counts.T.coalesce())], dim=1).coalesce()
    found = _largest(table, min(width, size), random)
    found -= (times[:, None] * found).sum(0) / times.sum().clamp(min=1)
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=random))
    found = found @ turn[: found.shape[1]]
    found *= RMS * (WIDTH / width) ** 0.5 / found[there].square().mean().sqrt().clamp(min=1e-12)
    return torch.where(there[:, None], found, torch.zeros(())), there


def _information(counts: torch.Tensor) -> torch.Tensor:
    """Positive pointwise mutual information of a row's token and each of its neighbours, sparse."""
    rows, columns = counts.indices()
    values = counts.values()
    of_row = torch.zeros(len(counts)).index_add_(0, rows, values)
    of_column = torch.zeros(len(counts)).index_add_(0, columns, values).pow(SMOOTHING)
    chance = of_column / of_column.sum()
    information = (values / of_row[rows] / chance[columns]).log().clamp(min=0)
    return _table(counts.indices(), information, tuple(counts.shape))


def _table(places: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_coo_tensor(places, values, shape, is_coalesced=True, check_invariants=True)


def _largest(table: torch.Tensor, rank: int, random: torch.Generator) -> torch.Tensor:
    """The `rank` largest left singular vectors of a sparse matrix times the roots of their singular values, (rows,
    rank), by randomized subspace iteration (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061)."""
    size, columns = table.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        by_rows, by_columns = table.to_sparse_csr(), table.T.coalesce().to_sparse_csr()
    space = torch.randn(columns, min(rank + _BEYOND, size), generator=random)
    for _ in range(_ROUNDS):
        space, _ = torch.linalg.qr(by_rows @ space)
        space = by_columns @ space
    space, _ = torch.linalg.qr(by_rows @ space)
    # (columns, k): its right singular vectors turn the space into that of the largest singular vectors of the table.
    _, values, turned = torch.linalg.svd(by_columns @ space, full_matrices=False)
    return (space @ turned.T)[:, :rank] * values[:rank].sqrt()
