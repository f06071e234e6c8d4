"""The stream of samples: documents in order, cut, with what was passed over and why. It can go on from any place."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from slimpajama_hf import screen
from slimpajama_hf.corpus import documents, patience
from slimpajama_hf.corpus.documents import HELD_OUT, TOO_SHORT, Cursor, Document, Gap, Unusable
from slimpajama_hf.corpus.patience import Patience
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples.cutting import packed, truncate, windows
from slimpajama_hf.samples.handed_on import Ended
from slimpajama_hf.samples.passes import Passes, stream
from slimpajama_hf.samples.read_ahead import read_ahead
from slimpajama_hf.samples.sample import Sample

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.handed_on import Machine


#: After so many unusable records in a row, the source itself must be wrong.
MOST_UNUSABLE_IN_A_ROW = 1000

#: Reason for documents that this run must not learn.
LEFT_OUT = "left out"

#: With several processes, each of them checks that a text of at most this many characters has 2 tokens. A longer text
#: is assumed to have them, except by the process that learns it. The longest token of GPT-2 has 128 characters.
SHORT_TEXT_CHARACTERS = 128


class SampleStream:
    """The training samples of a corpus from a cursor on. Iterating opens the stream anew at `start`.

    Yields `Sample`s of 2 to `max_length` tokens. Up to `read_ahead` of them are made in advance in a thread.
    A step has `world_size * accumulated` samples. All processes open the same stream, in the order in which a single
    process reads. Of every `world_size` samples in a row, each process takes the one at its `rank`. `after` is that of
    the last sample of the step on every rank, so that any number of processes can go on exactly from it. The same holds
    for what was passed over.

    In `truncate`, a process tokenizes only its own documents. All processes look at the beginning of short documents
    (`SHORT_TEXT_CHARACTERS`) and of the first document of each step, which therefore always has 2 tokens. Places may
    stay empty (`Sample.only_fills`): at the end of the stream, and where a long text turns out to have fewer than 2
    tokens. In `window` and `pack`, one process of each `machine` reads and tokenizes for all its processes.

    Raises UserError after 1,000 unusable records in a row, at a broken shard (unless `skip_broken_shards`) and when the
    Hub failed for `patience_seconds`. Raises patience.StopRequested when `stop()` is true while it waits.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        mode: str,
        max_length: int,
        world_size: int = 1,
        rank: int = 0,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        epochs: int = 1,
        skip_broken_shards: bool = False,
        patience_seconds: float = patience.SECONDS,
        read_ahead: int = 8,
        leave_out: Iterable[str] = (),
        accumulated: int = 1,
        short_text_characters: int | None = SHORT_TEXT_CHARACTERS,
        start: Cursor | None = None,
        stop: Callable[[], bool] = lambda: False,
        in_worker: bool = False,
        machine: Machine | None = None,
    ) -> None:
        """`stop`: whether the run must stop; called while waiting, from this thread and from another.
        `short_text_characters`: None for a run of a version in which all processes looked at every document.
        `in_worker`: a worker of a DataLoader reads; `datasets` would give samples only to the first worker.
        `machine`: the processes of this machine, if one of them may read for all."""
        self.corpus, self.encoder, self.mode, self.max_length = corpus, encoder, mode, max_length
        self.passes = Passes(corpus, epochs, shuffle_buffer, seed, skip_broken_shards)
        self.world_size, self.rank, self.accumulated = world_size, rank, accumulated
        self.patience_seconds, self.read_ahead = patience_seconds, read_ahead
        self._size = world_size * accumulated
        self._short = short_text_characters
        self._machine = machine if machine is not None and len(machine.ranks) > 1 and mode != "truncate" else None
        self.leave_out = frozenset(leave_out)
        """`shard#row`: documents that are never trained on. `shard#row.part`: only that sample of a document."""
        self.start = start if start is not None else Cursor()
        self._stop, self._in_worker = stop, in_worker
        self.gaps_at_end: list[dict[str, Any]] = []
        """Shards that were skipped after the last sample, so that no sample carries them."""
        self.skipped_at_end: dict[str, int] = {}
        """Reason -> number of unusable records after the last sample, when the stream has ended or broken."""
        self.error: Exception | None = None
        """The error that broke the stream."""
        self.fields: Counter[str] = Counter()
        """Fields of records without a text -> their characters in all (-1 for each value that is no string)."""

    def __iter__(self) -> Iterator[Sample]:
        start = self.start
        if self.read_ahead < 1:
            return self._samples(start, Patience(self.patience_seconds, self._stop, visible=True))
        return read_ahead(
            lambda patience: self._samples(start, patience),
            self.read_ahead,
            self.patience_seconds,
            self._stop,
            f"waiting for the next document of {self.corpus.mirror}",
        )

    def _samples(self, start: Cursor, patience: Patience) -> Iterator[Sample]:
        if self._machine is None:
            yield from self._in_steps(self._read(start, patience))
        elif self.rank != self._machine.ranks[0]:
            yield from self._handed_on(self._machine)
        else:
            yield from self._handing_on(self._machine, start, patience)

    def _handing_on(self, machine: Machine, start: Cursor, patience: Patience) -> Iterator[Sample]:
        """Yield this process' samples. Make those of the machine's other processes too, and send them there."""
        with machine.others() as others:
            try:
                for step in self._steps(self._with_what_was_passed_over(self._read(start, patience))):
                    for rank in others.ranks():
                        others.give(rank, [_bare(sample) for sample in self._share(step, rank)])
                    yield from self._share(step, self.rank)
            except Exception as error:
                others.end(Ended(error, self.gaps_at_end, self.skipped_at_end, dict(self.fields)))
                raise
            others.end(Ended(None, self.gaps_at_end, self.skipped_at_end, dict(self.fields)))

    def _handed_on(self, machine: Machine) -> Iterator[Sample]:
        """Yield this process' samples, which another process of the machine makes."""
        for told in machine.taken(self.rank):
            if isinstance(told, Ended):
                self.error, self.gaps_at_end, self.skipped_at_end = told.error, told.gaps, told.skipped
                self.fields.update(told.fields)
                if told.error is not None:
                    raise told.error
            else:
                yield told

    def _read(self, start: Cursor, patience: Patience) -> Iterator[Sample | Unusable | Gap]:
        """Yield everything in the order of the corpus, unusable records too."""
        samples: Iterable[Sample | Unusable | Gap]
        cut: dict[str, Any] = {"encoder": self.encoder, "max_length": self.max_length}
        of_datasets = None if self._in_worker else stream(self.passes, start, patience)
        if self.mode == "truncate" and of_datasets is not None:
            # The streaming map of `datasets`: one record in, its first tokens out. With several processes, it is not
            # known who tokenizes a record before it has its place.
            if self.world_size > 1:
                mapped = of_datasets.map(untokenized, remove_columns=["record"])
            else:
                mapped = of_datasets.map(truncate, fn_kwargs=cut, remove_columns=["record"])
            samples = (example["sample"] for example in mapped)
        else:
            plain = self.passes.records(start, patience)
            records = plain if of_datasets is None else (example["record"] for example in of_datasets)
            if self.mode == "truncate":
                samples = (truncate({"record": record}, **cut)["sample"] for record in records)
            else:
                samples = (windows if self.mode == "window" else packed)(records, self.encoder, self.max_length, start)
        yield from samples

    def _in_steps(self, samples: Iterable[Sample | Unusable | Gap]) -> Iterator[Sample]:
        whole = self._with_what_was_passed_over(samples)
        if self._size == 1:
            yield from whole
        else:
            for step in self._steps(whole):
                yield from self._share(step, self.rank)

    def _steps(self, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
        """Yield the samples of each step, for all processes; fewer at the end of the stream."""
        step: list[Sample] = []
        for sample in samples:
            step.append(sample)
            if len(step) == self._size:
                yield step
                step = []
        if step:
            yield step

    def _share(self, step: list[Sample], rank: int) -> Iterator[Sample]:
        """Yield the samples of a step that `rank` learns."""
        skipped: Counter[str] = Counter()
        for sample in step:
            if sample.skipped:
                skipped.update(sample.skipped)
        gaps = [gap for sample in step for gap in sample.gaps]
        together = [self._without_text(place, sample) for place, sample in enumerate(step)] if rank == 0 else []
        for place in range(rank, self._size, self.world_size):
            sample = self._tokenized(step[place]) if place < len(step) else _filler(step[0].document)
            yield dataclasses.replace(
                sample, after=step[-1].after, skipped=dict(skipped), gaps=gaps, together=together, rank=rank
            )

    def _without_text(self, place: int, sample: Sample) -> Sample:
        of = sample.document
        # Built new instead of copied: with a thousand processes, copying would slow the first one's reading by a fifth.
        document = Document("", of.domain, of.mirror, of.shard, of.row, of.sha1, of.size)
        return Sample(
            sample.input_ids, document, sample.after, sample.text_bytes, sample.part, sample.tokens_cut,
            sample.tokens_cut_exact, documents=sample.documents, rank=place % self.world_size,
        )  # fmt: skip

    def _tokenized(self, sample: Sample) -> Sample:
        """The same sample with its tokens, if it has none yet."""
        if sample.input_ids:
            return sample
        found = truncate({"record": sample.document}, self.encoder, self.max_length)["sample"]
        return found if isinstance(found, Sample) else _filler(sample.document)

    def _is_too_short(self, sample: Sample, opens_step: bool) -> bool:
        """Whether all processes know that an untokenized sample has fewer than 2 tokens."""
        text = sample.document.text
        looked_at = opens_step or self._short is None or len(text) <= self._short
        return looked_at and len(self.encoder.opening(text, 2).ids) < 2

    def _with_what_was_passed_over(self, samples: Iterable[Sample | Unusable | Gap]) -> Iterator[Sample]:
        """Yield usable samples. Each carries what was passed over before it."""
        skipped: Counter[str] = Counter()
        gaps: list[dict[str, Any]] = []
        in_a_row = passed_on = 0
        try:
            for sample in samples:
                if isinstance(sample, Sample):
                    if self.leave_out and not self.leave_out.isdisjoint(names_of(sample)):
                        sample = Unusable(LEFT_OUT, sample.document.shard, sample.document.row)
                    elif not sample.input_ids and self._is_too_short(sample, opens_step=passed_on % self._size == 0):
                        sample = Unusable(TOO_SHORT, sample.document.shard, sample.document.row)
                if isinstance(sample, Gap):
                    gaps.append({"shard": sample.shard, "row": sample.row, "reason": sample.reason})
                    screen.say(f"{sample.shard}: {sample.reason}; set aside from row {sample.row:,} on")
                elif isinstance(sample, Unusable):
                    skipped[sample.reason] += 1
                    self.fields.update(dict(sample.fields))
                    # Held-out and left-out documents are no fault of the source.
                    in_a_row += sample.reason not in (HELD_OUT, LEFT_OUT)
                    if in_a_row == MOST_UNUSABLE_IN_A_ROW:
                        raise UserError(
                            f"{self.corpus.name} ({self.corpus.mirror}): {in_a_row:,} records in a row are unusable, "
                            f"the last at {sample.shard} row {sample.row} ({self.in_words(skipped)}); check --dataset "
                            "and --text_column"
                        )
                else:
                    sample.skipped, sample.gaps = dict(skipped), gaps
                    skipped, gaps, in_a_row = Counter(), [], 0
                    passed_on += 1
                    yield sample
        except Exception as error:
            self.error, self.gaps_at_end, self.skipped_at_end = error, gaps, dict(skipped)
            raise
        self.gaps_at_end, self.skipped_at_end = gaps, dict(skipped)

    def in_words(self, passed_over: Mapping[str, int], read: int = 0) -> str:
        """What was passed over, by reason, and the fields of records without a text (`documents.in_words`)."""
        return documents.in_words(passed_over, self.fields, self.corpus.text_column, read)

    def why_nothing(self) -> str:
        """The end of a message "no document": why an ended stream gave none; "" if nothing was passed over."""
        return f": {self.in_words(self.skipped_at_end)}" if self.skipped_at_end else ""


def _bare(sample: Sample) -> Sample:
    """The same sample without its document's text, which only the first process shows."""
    return dataclasses.replace(sample, document=dataclasses.replace(sample.document, text=""))


def untokenized(example: dict[str, Any]) -> dict[str, Any]:
    """{"record": Document} -> {"sample": Sample} without tokens. A function for `map`."""
    record = example["record"]
    return {"sample": Sample([], record, record.after, 0) if isinstance(record, Document) else record}


def _filler(document: Document) -> Sample:
    """A sample for a place without a document: any two tokens, which do not count."""
    return Sample([0, 0], document, document.after, 0, only_fills=True)


def names_of(sample: Sample) -> tuple[str, str]:
    """The names under which `leave_out` lists the document of a sample, and the sample itself."""
    document = f"{sample.document.shard}#{sample.document.row}"
    return document, f"{document}.{sample.part}"
