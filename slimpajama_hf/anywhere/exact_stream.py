"""`ExactStream`: the samples of a corpus as a dataset for any loader, which goes on exactly where training stopped."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from slimpajama_hf.anywhere.notes import Notes, NotesOfWorkers, WrittenNotes, empty_folder
from slimpajama_hf.corpus import patience
from slimpajama_hf.corpus.corpus import Corpus
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.corpus.opening import open_corpus
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.samples.encoder import Encoder
from slimpajama_hf.samples.sample import Sample
from slimpajama_hf.samples.stream import SampleStream
from slimpajama_hf.samples.tokenizer import load_tokenizer

#: How documents become samples; see `cutting.py`.
MODES = ("truncate", "window", "pack")

#: The label of positions that are not predicted.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Place:
    """A position in a stream."""

    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    """What is read next."""
    samples: int = 0
    """Samples before this place, since the beginning of the run."""
    origin: int = 0
    """The sample from which the batches of several workers or processes are counted."""


class ExactStream(IterableDataset):
    """The samples of a corpus, in an order that does not depend on the loader, its workers or the processes.

        stream = ExactStream("slimpajama", tokenizer, max_length=256, shuffle_buffer=10_000)

    Each item is `{"input_ids": [...], "labels": [...]}`, lists of 2 to `max_length` ids. `labels=False` omits the
    labels, for collators that make their own (`DataCollatorForLanguageModeling`). `collate` is a collator that pads.

    `dataset`: what `--dataset` takes (`slimpajama`, `embedded`, files, a folder, a glob, an id on the Hub), or a
    `Corpus`. `tokenizer`: a tokenizer of transformers, or what `--tokenizer` takes. `mode`: `truncate` (a sample is the
    beginning of a document), `window` (consecutive samples cover the document) or `pack` (documents are joined by EOS
    and cut into samples of `max_length`). `shuffle_buffer`: how many documents are shuffled at a time, 0 for none.
    `epochs`: passes over the corpus.

    With `RunRecord` the stream knows what training has taken. Without it, it is `Stateful` in torchdata's sense:
    `state_dict()` is the place after the last item that this process' iterator has given out, and `load_state_dict`
    goes on there. A loader with workers needs `batch_size` (`RunRecord` sets it): worker w of W makes the batches w,
    w + W, ..., so that the order is the same as without workers. Each worker reads the whole corpus; without workers, a
    thread of the process already reads ahead.

    `rank` and `world_size`: this process' share of each batch, if accelerate does not share it out. Raises UserError if
    the corpus or the tokenizer cannot be opened, UsageError for an invalid setting.
    """

    def __init__(
        self,
        dataset: str | Corpus,
        tokenizer: Any,
        max_length: int = 256,
        *,
        mode: str = "truncate",
        shuffle_buffer: int = 0,
        seed: int = 0,
        epochs: int = 1,
        labels: bool = True,
        batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        text_column: str = "text",
        split: str = "train",
        config_name: str | None = None,
        revision: str | None = None,
        skip_broken_shards: bool = False,
        patience_seconds: float = patience.SECONDS,
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"ExactStream(mode={mode!r}): expected one of {', '.join(MODES)}")
        if max_length < 2:
            raise UsageError(
                f"ExactStream(max_length={max_length}): a token is predicted from another; expected 2 or more"
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"ExactStream(rank={rank}, world_size={world_size}): expected 0 <= rank < world_size")
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.tokenizer_name = tokenizer if isinstance(tokenizer, str) else str(tokenizer.name_or_path)
        self.encoder = Encoder(self.tokenizer)
        self.mode, self.max_length = mode, max_length
        self.shuffle_buffer, self.seed, self.epochs = shuffle_buffer, seed, epochs
        self.labels, self.batch_size = labels, batch_size
        self.rank, self.world_size = rank, world_size
        self.skip_broken_shards, self.patience_seconds = skip_broken_shards, patience_seconds
        if isinstance(dataset, Corpus):
            self.corpus = dataset
        else:
            self.corpus = open_corpus(
                dataset,
                text_column=text_column,
                split=split,
                config_name=config_name,
                revision=revision,
                skip_broken_shards=skip_broken_shards,
            )
        self.block: int | None = None
        """How many samples of the stream one batch of the loader takes from all processes; None: unknown."""
        self._start = self._given = Place()
        self._notes: Notes | NotesOfWorkers | None = None
        """What training has not taken yet; None: not tracked (`track`)."""
        self.is_over = False
        """Whether the run is complete; then the stream gives no items."""
        self.fills_a_batch = False
        """Whether a complete run gives one item that is not trained: accelerate does not accept an empty loader."""
        self._folder: Path | None = None
        self._reading: Any = None
        self._ended: SampleStream | None = None
        """The stream that was read to its end."""
        # Shared with forked workers, which set it; spawned workers set it when this object is pickled.
        self._worked_on = mmap.mmap(-1, 1)

    def __getstate__(self) -> dict[str, Any]:
        from multiprocessing.context import get_spawning_popen

        if get_spawning_popen() is not None:
            self._worked_on[0] = 1
        left_out = dict.fromkeys(("_worked_on", "_ended", "_reading"))
        return self.__dict__ | left_out | {"_notes": None if self._notes is None else Notes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_worked_on": mmap.mmap(-1, 1)})

    # ---- items ----

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Items from the place that was taken or loaded. Raises UserError if several workers would not know which
        samples are theirs, and as `SampleStream` does."""
        number, workers = 0, 1
        notes: Any = self._notes
        worker = get_worker_info()
        if worker is not None:
            self._worked_on[0] = 1
            number, workers = worker.id, worker.num_workers
            notes = WrittenNotes(self._folder, number) if self._folder is not None else None
            if workers > 1 and self._samples_of_a_batch is None:
                raise UserError(
                    f"ExactStream: {workers} workers, and the size of a batch is not known, so that their samples "
                    "would come in another order; say ExactStream(..., batch_size=N), the batch_size of the loader"
                )
        elif self._notes is not None:
            # Samples that were given out but not taken by training are given out again.
            notes = self._notes = Notes()
        return self._items(number, workers, notes)

    @property
    def _samples_of_a_batch(self) -> int | None:
        if self.block is not None:
            return self.block
        return self.batch_size * self.world_size if self.batch_size else None

    def _items(self, number: int, workers: int, notes: Notes | WrittenNotes | Any) -> Iterator[dict[str, Any]]:
        if self.is_over:
            if self.fills_a_batch and number == 0:
                yield {name: [0, 0] for name in ("input_ids", *(["labels"] * self.labels))}
            return
        start = self._given = self._start
        samples = self.samples(start.cursor)
        block = self._samples_of_a_batch or self.world_size
        share = block // self.world_size
        own: list[tuple[Sample, Place]] = []
        self._reading = reading = iter(samples)
        for position, sample in enumerate(reading, start.samples):
            batch, place = divmod(position - start.origin, block)
            if batch % workers == number:
                if notes is not None:
                    notes.add(sample)
                if place // share == self.rank:
                    own.append((sample, Place(sample.after, position + 1, start.origin)))
            # With several processes, each reads the whole batch before it gives out its share.
            if own and (self.world_size == 1 or place == block - 1):
                yield from self._given_out(own)
                own = []
        self._ended = samples
        if notes is not None:
            notes.end()
        yield from self._given_out(own)
        if notes is None:
            # A second iteration begins at the beginning, as with any dataset.
            self._start = self._given = Place()

    def _given_out(self, own: list[tuple[Sample, Place]]) -> Iterator[dict[str, Any]]:
        for sample, self._given in own:
            yield self._item(sample)

    def has_more(self) -> bool:
        """Whether there is a sample after what was taken."""
        if self.cursor.size:
            # Within a shuffled block, which would have to be read as a whole.
            return True
        behind = self.samples(self.cursor)
        behind.passes = dataclasses.replace(behind.passes, shuffle_buffer=0)
        return next(iter(behind), None) is not None

    def samples(self, start: Cursor) -> SampleStream:
        """The samples themselves, from a cursor on."""
        return SampleStream(
            self.corpus,
            self.encoder,
            self.mode,
            self.max_length,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            epochs=self.epochs,
            skip_broken_shards=self.skip_broken_shards,
            patience_seconds=self.patience_seconds,
            start=start,
            in_worker=get_worker_info() is not None,
        )

    def _item(self, sample: Sample) -> dict[str, Any]:
        ids = sample.input_ids
        return {"input_ids": ids, "labels": list(ids)} if self.labels else {"input_ids": ids}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Items as a batch: `input_ids`, `attention_mask` and `labels`, (items, longest) each. Padding is masked and
        not predicted."""
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for place, item in enumerate(items):
            own = torch.tensor(item["input_ids"])
            ids[place, : len(own)], labels[place, : len(own)], mask[place, : len(own)] = own, own, 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def as_datasets(self) -> Any:
        """This stream as a `datasets.IterableDataset`, for Trainers that accept nothing else (TRL's)."""
        import datasets
        from datasets.iterable_dataset import ExamplesIterable

        kinds = {name: datasets.List(datasets.Value("int64")) for name in ("input_ids", *(["labels"] * self.labels))}
        info = datasets.DatasetInfo(features=datasets.Features(kinds))
        return datasets.IterableDataset(ExamplesIterable(_examples, {"stream": _Shared(self)}), info=info)

    # ---- its place ----

    def state_dict(self) -> dict[str, Any]:
        """The place of this process' iterator: after the last item that it gave out, or, with `RunRecord`, after the
        last sample that training has taken. Raises UserError if workers have the iterators."""
        tracked = self._notes is not None
        if not tracked and get_worker_info() is None and self._worked_on[0]:
            raise UserError(
                "ExactStream.state_dict(): the workers of the loader know how far they are, this process does not; "
                "take the state of torchdata's StatefulDataLoader, add RunRecord, or use num_workers=0"
            )
        return dataclasses.asdict(self._start if tracked else self._given)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises UserError for anything else."""
        try:
            place = Place(**state | {"cursor": Cursor(**state["cursor"])})
        except (TypeError, KeyError):
            raise UserError("ExactStream.load_state_dict: not what ExactStream.state_dict() has given") from None
        self._start = self._given = place

    # ---- for callers that know what training has taken ----

    def track(self, folder: Path, workers: int, block: int, here: bool) -> None:
        """Track from now on what training takes (`take`), beginning at the loaded place. `workers`: of the loader;
        `block`: samples in its batches of all processes; `folder`: for the notes of workers. `here`: whether this
        process keeps the record."""
        self.block = block
        self._start = self._given = dataclasses.replace(self._start, origin=self._start.samples)
        self._folder, self._notes = None, None
        if here and workers > 0:
            self._folder = empty_folder(folder)
            self._notes = NotesOfWorkers(self._folder, workers, block)
        elif here:
            self._notes = Notes()

    def take(self, count: int) -> list[Sample]:
        """Mark the next `count` samples as taken by training and return them without their texts; fewer at the end of
        the stream. Raises UserError if fewer were given out."""
        assert self._notes is not None
        taken = self._notes.take(count)
        if len(taken) < count and not self._notes.ended:
            raise UserError(
                f"training says that it took {count:,} samples, and the loader has given out {len(taken):,}: its "
                "batches are not of the size that it says, or a loop called step() without a batch of "
                "record.batches(loader)"
            )
        if taken:
            at = self._start
            self._start = Place(taken[-1].after, at.samples + len(taken), at.origin)
        return taken

    def close(self) -> None:
        """Stop reading: the thread that reads ahead ends."""
        if self._reading is not None:
            self._reading.close()

    @property
    def cursor(self) -> Cursor:
        """Where reading goes on after what was taken."""
        return self._start.cursor

    def passed_over_at_end(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Gaps, and records by reason, after the last sample of a stream that this process has read to its end."""
        return (self._ended.gaps_at_end, self._ended.skipped_at_end) if self._ended is not None else ([], {})


class _Shared:
    """Holds a stream; `datasets` deep-copies the arguments of a generator, but must not copy the stream."""

    def __init__(self, stream: ExactStream) -> None:
        self.stream = stream

    def __deepcopy__(self, memory: dict[int, Any]) -> _Shared:
        return self


def _examples(stream: _Shared) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(stream.stream)


def stream_of(dataset: Any) -> ExactStream | None:
    """The stream in a loader's dataset, or None."""
    while dataset is not None and not isinstance(dataset, ExactStream):
        examples = getattr(getattr(dataset, "_ex_iterable", None), "kwargs", None)
        if isinstance(examples, dict) and isinstance(examples.get("stream"), _Shared):
            return examples["stream"].stream
        dataset = getattr(dataset, "dataset", None)
    return dataset
