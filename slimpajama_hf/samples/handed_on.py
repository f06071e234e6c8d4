"""One process of a machine makes the samples of all processes there, and sends them over a local socket.

In window and pack a sample begins where the one before it ends, so whoever makes samples has to tokenize all documents.
One process of each machine does that, instead of every one.
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
    """Comes after the last sample: what the stream knows at its end (`SampleStream`)."""

    error: Exception | None
    gaps: list[dict[str, Any]]
    skipped: dict[str, int]
    fields: dict[Any, int]


class Machine:
    """The processes `ranks` of this machine. The first of them makes the samples of all. `place`: address and key of
    its socket; None in the first process itself, which opens the socket."""

    def __init__(self, ranks: Sequence[int], place: tuple[str, bytes] | None = None) -> None:
        self.ranks = ranks
        self._listener: Listener | None = None
        if place is None:
            key = os.urandom(32)
            # Only this user can enter the folder. It is removed when all have connected, or at the end of the program.
            self._folder = tempfile.TemporaryDirectory(prefix="samples-")
            self._listener = Listener(os.path.join(self._folder.name, "socket"), backlog=len(ranks), authkey=key)
            place = str(self._listener.address), key
        self.place = place

    @contextlib.contextmanager
    def others(self) -> Iterator[HandingOn]:
        """In the first process: connections to all others, once they have all connected."""
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
        """In another process: yield its samples, and after them how the stream ended. Raises UserError if the first
        process of the machine is gone."""
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
    """Connections to the other processes of the machine, by rank."""

    def __init__(self, lines: dict[int, Connection]) -> None:
        self._lines = lines

    def ranks(self) -> list[int]:
        """Ranks that still take samples."""
        return list(self._lines)

    def give(self, rank: int, samples: list[Sample] | list[Ended]) -> None:
        """Send samples to `rank`. Waits while it has enough of them. A process that needs no more has hung up."""
        try:
            self._lines[rank].send(samples)
        except OSError:
            del self._lines[rank]

    def end(self, ended: Ended) -> None:
        """Tell all processes that no more samples come."""
        for rank in self.ranks():
            self.give(rank, [ended._replace(error=_portable(ended.error))])


def _portable(error: Exception | None) -> Exception | None:
    """Make an error fit for another process: the same, or a UserError with its words if it cannot be pickled."""
    if error is None:
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(str(error))
