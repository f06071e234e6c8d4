"""Samples that one process of a machine makes and hands on to the others there, over a socket of the machine.

In window and pack where one sample ends says where the next begins, so somebody has to tokenize all documents: one
process of each machine, and not every one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any, NamedTuple

from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    from slimpajama_hf.samples.sample import Sample


class Ended(NamedTuple):
    """What comes behind the last sample: what the stream knows then (`SampleStream`)."""

    error: Exception | None
    gaps: list[dict[str, Any]]
    skipped: dict[str, int]
    fields: dict[Any, int]


class Machine:
    """The processes `ranks` of this machine, of which the first makes the samples of all. `place`: that of its socket,
    and the key to it; None in the first itself, which opens it."""

    def __init__(self, ranks: Sequence[int], place: tuple[str, bytes] | None = None) -> None:
        self.ranks = ranks
        self._listener: Listener | None = None
        if place is None:
            key = os.urandom(32)
            # A folder that this user alone can enter. It is gone when all have come, or at the end of the program.
            self._folder = tempfile.TemporaryDirectory(prefix="samples-")
            self._listener = Listener(os.path.join(self._folder.name, "socket"), backlog=len(ranks), authkey=key)
            place = str(self._listener.address), key
        self.place = place

    @contextlib.contextmanager
    def others(self) -> Iterator[HandingOn]:
        """For the first: a connection to each of the others, once all have come."""
        assert self._listener is not None
        with contextlib.ExitStack() as open_ones:
            lines: dict[int, Connection] = {}
            while len(lines) < len(self.ranks) - 1:
                line = open_ones.enter_context(self._listener.accept())
                lines[line.recv()] = line
            self._listener.close()
            self._folder.cleanup()
            yield HandingOn(lines)

    def taken(self, rank: int) -> Iterator[Sample | Ended]:
        """For another one: its samples, and behind them how the stream ended. Raises UserError where the first process
        of the machine is gone."""
        address, key = self.place
        try:
            with Client(address, authkey=key) as line:
                line.send(rank)
                while True:
                    told = line.recv()
                    yield from told
                    if isinstance(told[-1], Ended):
                        return
        except (EOFError, OSError) as error:
            raise UserError(
                f"process {self.ranks[0]}, which reads for process {rank}, ended or no longer answers "
                f"({type(error).__name__}); start all of them again with --resume_from_checkpoint true"
            ) from None


class HandingOn:
    """The way to the other processes of the machine, by rank."""

    def __init__(self, lines: dict[int, Connection]) -> None:
        self._lines = lines

    def ranks(self) -> list[int]:
        """Those that still take samples."""
        return list(self._lines)

    def give(self, rank: int, samples: list[Sample] | list[Ended]) -> None:
        """Hand samples on; waits while that process has some in stock. One that has what it wants has hung up."""
        try:
            self._lines[rank].send(samples)
        except OSError:
            del self._lines[rank]

    def end(self, ended: Ended) -> None:
        """Tell all that no more samples come."""
        for rank in self.ranks():
            self.give(rank, [ended._replace(error=_portable(ended.error))])


def _portable(error: Exception | None) -> Exception | None:
    """An error that another process can be given: the same, or its words where it cannot be taken apart."""
    if error is None:
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(str(error))
