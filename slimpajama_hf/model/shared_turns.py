"""Updates of matrices shared out over processes: each makes some of them, and all have all.

An update of Muon needs a matrix as a whole, and is costly. Where processes have copies of the model, each makes those
of its matrices and sends them to the others. Where the matrices lie in shards (FSDP2), each process gathers those that
it makes the updates of, and scatters these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

#: From matrices that belong together (queries, keys and values are three) to their updates, of the same shapes.
Make = Callable[[torch.Tensor], torch.Tensor]


def owners(shapes: Sequence[torch.Size], processes: int) -> list[int]:
    """Who makes the update of each matrix: the costliest first, each to the process that has least to do so far."""
    # Products of (m, n) with m below n: m m n each, as often for all.
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    found, busy = [0] * len(shapes), [0] * processes
    for place in sorted(range(len(shapes)), key=lambda place: (-costs[place], place)):
        found[place] = min(range(processes), key=lambda rank: (busy[rank], rank))
        busy[found[place]] += costs[place]
    return found


def of_copies(matrices: Sequence[torch.Tensor], make: Make, dtype: torch.dtype) -> list[torch.Tensor]:
    """`make(matrix)` of each, in `dtype`; all processes have the same matrices. The same to the bit in all of them."""
    rank = dist.get_rank()
    made, under_way = [], []
    for matrix, owner in zip(matrices, owners([each.shape for each in matrices], dist.get_world_size()), strict=True):
        # What others make is under way while this one makes its own.
        update = make(matrix).contiguous() if owner == rank else torch.empty_like(matrix, dtype=dtype).contiguous()
        under_way.append(dist.broadcast(update, src=owner, async_op=True))
        made.append(update)
    for work in under_way:
        work.wait()
    return made


def of_shards(matrices: Sequence[DTensor], make: Make, dtype: torch.dtype) -> list[torch.Tensor]:
    """This process' rows of `make(matrix)` of each matrix, in `dtype`; of the matrices each process has some rows."""
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
    """The rows of this process, filled up to as many as the first has: rows are dealt out in pieces of one size, of
    which the last ones may be shorter or empty."""
    rows = -(-matrix.shape[0] // processes)
    return torch.nn.functional.pad(local, (0, 0, 0, rows - local.shape[0])).contiguous()
