"""The records of a corpus in the order of training: pass after pass, each in order or shuffled block by block.

The shuffle is our own because it must go on exactly after a stop: `datasets` refills its buffer with other records.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from slimpajama_hf.corpus.documents import Cursor, Document, Gap, Unusable
from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    import datasets

    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.corpus.patience import Patience


Record = Document | Unusable | Gap


def permutation(size: int, seed: int, epoch: int, block: int) -> list[int]:
    """The order in which the records of a shuffled block are used: their numbers sorted by the SHA-256 of
    "seed epoch block number".

    Neither `random.shuffle` nor NumPy's Generator promises the same order in every version (Python's documentation of
    `random`, "Notes on Reproducibility"; NumPy's NEP 19). A hash of text is the same everywhere and always.
    """
    return sorted(range(size), key=lambda number: hashlib.sha256(f"{seed} {epoch} {block} {number}".encode()).digest())


@dataclasses.dataclass(frozen=True)
class Passes:
    """How a corpus is read. `records(start)` goes on exactly after the record that `start` came with."""

    corpus: Corpus
    epochs: int = 1
    shuffle_buffer: int = 0
    """Records in a block, which is shuffled as a whole. Below 2: the order of the corpus."""
    seed: int = 0
    skip_broken_shards: bool = False

    def records(self, start: Cursor, patience: Patience) -> Iterator[Record]:
        """Yield records from `start` to the end of the last pass."""
        while start.epoch < self.epochs:
            yield from self._one_pass(start, patience)
            start = Cursor(epoch=start.epoch + 1)

    def _read(self, start: Cursor, patience: Patience) -> Iterator[Record]:
        return self.corpus.records(
            dataclasses.replace(start, token=0, block=0, used=0, size=0),
            skip_broken_shards=self.skip_broken_shards,
            patience=patience,
        )

    def _one_pass(self, start: Cursor, patience: Patience) -> Iterator[Record]:
        records = self._read(start, patience)
        block = start.block
        if start.size:
            # A block that was begun is finished with its old size, whatever --shuffle_buffer says now.
            found, gap = _take(records, start.size)
            if len(found) < start.size:
                why = f"{gap.shard} row {gap.row:,}: {gap.reason}" if gap else "the corpus ends inside it"
                raise UserError(f"the shuffled block in which this run stopped cannot be read again: {why}")
            yield from self._in_new_order(found, start)
            start, block = dataclasses.replace(found[-1].after, token=0), block + 1
        elif start.token and self.shuffle_buffer > 1:
            # The run stopped inside a document that was read in order, so that document comes first.
            for record in records:
                start = record.after
                yield record
                break
        if self.shuffle_buffer < 2:
            yield from records
            return
        while True:
            found, gap = _take(records, self.shuffle_buffer)
            if found:
                begin = dataclasses.replace(found[0].here, block=block, size=len(found))
                yield from self._in_new_order(found, begin)
                block += 1
            if gap is not None:
                # A block ends where a shard breaks off, so that it stays the same if the shard is repaired.
                yield dataclasses.replace(
                    gap,
                    here=dataclasses.replace(gap.here, block=block),
                    after=dataclasses.replace(gap.after, block=block),
                )
            elif len(found) < self.shuffle_buffer:
                return

    def _in_new_order(self, found: list[Record], begin: Cursor) -> Iterator[Record]:
        """Yield the records of one block, shuffled. `begin`: where the block starts, and how many are used already."""
        next_block = dataclasses.replace(found[-1].after, block=begin.block + 1)
        begin = dataclasses.replace(begin, token=0)
        order = permutation(len(found), self.seed, begin.epoch, begin.block)
        for used in range(begin.used, len(order)):
            last = used == len(order) - 1
            yield dataclasses.replace(
                found[order[used]],
                here=dataclasses.replace(begin, used=used),
                after=next_block if last else dataclasses.replace(begin, used=used + 1),
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # `datasets` hashes the arguments of a generator. The list of 59,166 files need not be in the hash.
        return Passes, (dataclasses.replace(self.corpus, files=()), *dataclasses.astuple(self)[1:])

    def __deepcopy__(self, memory: dict[int, Any]) -> Passes:
        return self


def _take(records: Iterator[Record], count: int) -> tuple[list[Record], Gap | None]:
    """Take up to `count` records: fewer if a shard breaks off (its Gap is the second value) or the pass ends."""
    found: list[Record] = []
    while len(found) < count:
        record = next(records, None)
        if record is None:
            break
        if isinstance(record, Gap):
            return found, record
        found.append(record)
    return found, None


def stream(passes: Passes, start: Cursor, patience: Patience) -> datasets.IterableDataset:
    """The records as a streaming dataset of `datasets`, ready for `map`.

    It is the same as `IterableDataset.from_generator` without its builder, which needs a cache folder (HF_HOME).
    """
    import datasets
    from datasets.iterable_dataset import ExamplesIterable

    reading = {"passes": passes, "start": start, "patience": patience}
    return datasets.IterableDataset(ExamplesIterable(_records_as_examples, reading))


def _records_as_examples(passes: Passes, start: Cursor, patience: Patience) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, record in enumerate(passes.records(start, patience)):
        yield number, {"record": record}
