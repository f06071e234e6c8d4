"""Sums a row of numbers over the processes of one machine, in memory that all of them see.

Over a socket the kernel copies each row several times. Here every process adds up its part of all rows where they lie,
and writes the sums into all of them.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slimpajama_hf.training.processes import others_lost

#: How many numbers of each row are added at once: few enough for the cache of a core.
PIECE = 1 << 16


class SharedRows:
    """A row of float32 numbers for each process, all on one machine. `own`: the row of this process.

    A row consists of parts, of `sizes` numbers. The memory has no name in a file system. It is freed when the processes
    end, however they end.
    """

    def __init__(self, rows: list[torch.Tensor], rank: int, sizes: Sequence[int]) -> None:
        self.own = rows[rank]
        self._squares = torch.zeros(len(sizes))
        first, last = (len(self.own) * each // len(rows) for each in (rank, rank + 1))
        ends = list(itertools.accumulate(sizes))
        cuts = sorted({first, last, *range(first, last, PIECE), *(end for end in ends if first < end < last)})
        self._pieces = [
            (self._squares[bisect.bisect_right(ends, begin)], *(row[begin:end] for row in rows))
            for begin, end in itertools.pairwise(cuts)
        ]
        """For each piece that this process adds up: where the squared norm of its part is kept, and the piece of all
        rows."""

    def sum(self) -> torch.Tensor:
        """Make every row the sum of all, added in the order of ranks. Returns the squared L2 norm of each part of the
        sum, (parts,), equal to the bit in all processes. All of them must call this. Raises OthersLost if one is
        gone."""
        self._squares.zero_()
        self._meet()
        for square, total, *others in self._pieces:
            for other in others:
                total += other
            # While they are in the cache.
            square += torch.dot(total, total)
            for other in others:
                other.copy_(total)
        self._meet()
        return self._squares

    def _meet(self) -> None:
        # Each needs a message of every other; what these wrote before they sent it can be seen then.
        with others_lost():
            dist.all_reduce(self._squares)


def open_rows(sizes: Sequence[int]) -> SharedRows | None:
    """Rows of zeros, with parts of `sizes` numbers. None, in all processes, if one of them does not see the memory of
    all others: they run on several machines or in several containers, or the system is not Linux. All processes must
    call this."""
    with contextlib.ExitStack() as opened:
        own = _make(4 * sum(sizes), opened)
        everybodys = _told_by_all(own)
        maps = None if None in everybodys else _open(everybodys, opened)
        if not all(_told_by_all(maps is not None)):
            return None
    assert maps is not None
    return SharedRows([torch.frombuffer(each, dtype=torch.float32) for each in maps], dist.get_rank(), sizes)


def _make(size: int, opened: contextlib.ExitStack) -> tuple[str, str] | None:
    """Memory of `size` bytes: which processes can open it, and by which path."""
    try:
        descriptor = os.memfd_create("gradients")
        opened.callback(os.close, descriptor)
        os.truncate(descriptor, size)
        # Process numbers mean something under one kernel and in one namespace alone.
        here = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except (AttributeError, OSError):
        return None
    return here, f"/proc/{os.getpid()}/fd/{descriptor}"


def _open(places: list[tuple[str, str]], opened: contextlib.ExitStack) -> list[mmap.mmap] | None:
    if len({here for here, _ in places}) > 1:
        return None
    maps = []
    try:
        for _, path in places:
            descriptor = os.open(path, os.O_RDWR)
            opened.callback(os.close, descriptor)
            maps.append(mmap.mmap(descriptor, 0))
    except OSError:
        return None
    return maps


def _told_by_all(value: Any) -> list[Any]:
    """The values of all processes, in the order of ranks."""
    told: list[Any] = [None] * dist.get_world_size()
    with others_lost():
        dist.all_gather_object(told, value)
    return told
