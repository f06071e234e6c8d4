"""Shares updates of matrices among processes: each process computes some of them, and every process gets its result.

An update of Muon is costly and needs the whole matrix. If processes have copies of the model, each sends the updates
that it computes to the others. If the matrices are sharded (FSDP2), each process gathers the matrices whose updates it
computes, and scatters the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

#: From a matrix to its update, of the same shape.
Make = Callable[[torch.Tensor], torch.Tensor]


def cost(shape: torch.Size) -> int:
    """What an update of a matrix costs: each product of (m, n), m below n, is m m n, and all need equally many."""
    return min(shape) ** 2 * max(shape)


def owners(shapes: Sequence[torch.Size], processes: int) -> list[int]:
    """The rank that computes the update of each matrix: costliest first, each to the rank with least work so far."""
    costs = [cost(shape) for shape in shapes]
    found, busy = [0] * len(shapes), [0] * processes
    for place in sorted(range(len(shapes)), key=lambda place: (-costs[place], place)):
        found[place] = min(range(processes), key=lambda rank: (busy[rank], rank))
        busy[found[place]] += costs[place]
    return found


def of_copies(matrices: Sequence[torch.Tensor], make: Make, dtype: torch.dtype) -> list[torch.Tensor]:
    """`make(matrix)` of each matrix, in `dtype`, equal to the bit in all processes. All must have the same matrices."""
    rank = dist.get_rank()
    made, under_way = [], []
    for matrix, owner in zip(matrices, owners([each.shape for each in matrices], dist.get_world_size()), strict=True):
        # While this process computes its own, the updates of the others are on their way.
        update = make(matrix).contiguous() if owner == rank else torch.empty_like(matrix, dtype=dtype).contiguous()
        under_way.append(dist.broadcast(update, src=owner, async_op=True))
        made.append(update)
    for work in under_way:
        work.wait()
    return made


def of_shards(matrices: Sequence[DTensor], make: Make, dtype: torch.dtype) -> list[torch.Tensor]:
    """This process' rows of `make(matrix)` of each matrix, in `dtype`; each process has some rows of every matrix."""
    group = matrices[0].device_mesh.get_group()
    rank, processes = dist.get_rank(group), dist.get_world_size(group)
    whose = owners([each.shape for each in matrices], processes)
    gathered: list[list[torch.Tensor] | None] = []
    under_way = []
    for matrix, owner in zip(matrices, whose, strict=True):
        local = _padded(matrix.to_local(), matrix, processes)
        parts = [torch.empty_like(local) for _ in range(processes)] if owner == rank else None
        root = dist.get_global_rank(group, owner)
        under_way.append((dist.gather(local, parts, dst=root, group=group, async_op=True), local))
        gathered.append(parts)
    made, scattered = [], []
    for place, (matrix, owner, parts) in enumerate(zip(matrices, whose, gathered, strict=True)):
        under_way[place][0].wait()
        size = -(-matrix.shape[0] // processes)
        pieces = None
        if parts is not None:
            whole = torch.cat(parts)[: matrix.shape[0]]
            update = torch.nn.functional.pad(make(whole), (0, 0, 0, size * processes - matrix.shape[0]))
            pieces = [piece.contiguous() for piece in update.split(size)]
            gathered[place] = None
        local = torch.empty(size, matrix.shape[1], dtype=dtype, device=matrix.to_local().device)
        root = dist.get_global_rank(group, owner)
        scattered.append((dist.scatter(local, pieces, src=root, group=group, async_op=True), pieces))
        made.append(local[: matrix.to_local().shape[0]])
    for work, _ in scattered:
        work.wait()
    return made


def _padded(local: torch.Tensor, matrix: DTensor, processes: int) -> torch.Tensor:
    """The rows of this process, padded to the number that the first process has: the last processes may have fewer rows
    or none."""
    rows = -(-matrix.shape[0] // processes)
    return torch.nn.functional.pad(local, (0, 0, 0, rows - local.shape[0])).contiguous()
