"""Documents -> samples: truncate, window, pack; what is passed over and why.

To add a way of making samples: a generator like `windows`, and its name in `arguments.SAMPLE_MODES`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slimpajama_hf import patience, screen
from slimpajama_hf.corpora import Corpus, Cursor, Document, Gap, Unusable
from slimpajama_hf.errors import UserError
from slimpajama_hf.passes import Passes, Record, stream
from slimpajama_hf.patience import Patience
from slimpajama_hf.read_ahead import read_ahead

if TYPE_CHECKING:
    from slimpajama_hf.tokenizer import Encoder

#: So many unusable records in a row mean that the source itself is wrong.
MOST_UNUSABLE_IN_A_ROW = 1000

#: Long documents are tokenized in pieces of so many characters, so that memory does not grow with them.
PIECE_CHARACTERS = 65_536
_OVERLAP_CHARACTERS = 2_048
_OVERLAP_TOKENS = 32


@dataclasses.dataclass
class Sample:
    """One training example and everything that is known about it; `after` is where reading goes on."""

    input_ids: list[int]
    document: Document
    """The document (in `pack`: the one that the sample begins with)."""
    after: Cursor
    text_bytes: int
    """UTF-8 bytes that the tokens cover."""
    part: int = 0
    tokens_cut: int = 0
    tokens_cut_exact: bool = True
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Unusable records since the sample before, by reason."""
    gaps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Shards set aside since the sample before: {"shard", "row", "reason"}."""
    documents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """In `pack`, what the block is made of: {"shard", "row", "text_sha1", "first_token", "tokens"}, EOS counted."""
    together: list[Sample] = dataclasses.field(default_factory=list)
    """Where a step has several samples, of several processes or accumulated: all of them, this one among them."""
    weight: float = 1.0
    """What its mean loss is multiplied by, so that the mean over the step's samples is that over its tokens; 0 for one
    that only fills a place at the end of the stream (it is another's, and counts there)."""

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: all but the first."""
        return len(self.input_ids) - 1


class SampleStream:
    """The training samples of a corpus from a cursor on. Iterating opens the stream anew at `start`.

    Yields `Sample`s of 2 to `max_length` tokens, made ready up to `read_ahead` at a time in a thread of its own (0:
    when asked for). A step has `world_size * accumulated` samples: each process opens the same stream, in the one order
    that a single process reads, and takes of every `world_size` samples in a row the one at its `rank`. `after` is then
    that of the last sample of the step, equal on every rank, so that any number of processes goes on exactly from it;
    so is what was passed over. At the end of the stream places may stay empty: `Sample.weight`. Raises UserError after
    1,000 unusable records in a row, at a shard that is broken (unless `skip_broken_shards`) and when the Hub failed
    for `patience_seconds`; patience.StopRequested when `stop()` is true while it waits.
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
    ) -> None:
        self.corpus, self.encoder, self.mode, self.max_length = corpus, encoder, mode, max_length
        self.passes = Passes(corpus, epochs, shuffle_buffer, seed, skip_broken_shards)
        self.world_size, self.rank, self.accumulated = world_size, rank, accumulated
        self.patience_seconds, self.read_ahead = patience_seconds, read_ahead
        self.leave_out = frozenset(leave_out)
        """`shard#row`: documents that are never trained; `shard#row.part`: that sample of one alone."""
        self.start = Cursor()
        self.stop: Callable[[], bool] = lambda: False
        """Whether the run is to stop; asked while waiting, from this thread and from another."""
        self.say: Callable[[str], None] = screen.say
        """Told of shards that are set aside, from the thread that reads."""
        self.gaps_at_end: list[dict[str, Any]] = []
        """Shards set aside after the last sample of the stream: no sample carries them."""

    def __iter__(self) -> Iterator[Sample]:
        start = self.start
        if self.read_ahead < 1:
            return self._samples(start, Patience(self.patience_seconds, lambda: self.stop(), visible=True))
        return read_ahead(
            lambda patience: self._samples(start, patience),
            self.read_ahead,
            self.patience_seconds,
            lambda: self.stop(),
            f"waiting for the next document of {self.corpus.mirror}",
        )

    def _samples(self, start: Cursor, patience: Patience) -> Iterator[Sample]:
        records = stream(self.passes, start, patience)
        samples: Iterable[Sample | Unusable | Gap]
        if self.mode == "truncate":
            # The streaming map of `datasets`: one record in, its first tokens out.
            mapped = records.map(
                truncate,
                fn_kwargs={"encoder": self.encoder, "max_length": self.max_length},
                remove_columns=["record"],
            )
            samples = (example["sample"] for example in mapped)
        else:
            make = windows if self.mode == "window" else packed
            samples = make((example["record"] for example in records), self.encoder, self.max_length, start)
        whole = self._with_what_was_passed_over(samples)
        yield from whole if self.world_size * self.accumulated == 1 else self._steps(whole)

    def _steps(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """This rank's samples of each step."""
        size = self.world_size * self.accumulated
        step: list[Sample] = []
        for sample in samples:
            step.append(sample)
            if len(step) == size:
                yield from self._own(step)
                step = []
        if step:
            yield from self._own(step)

    def _own(self, step: list[Sample]) -> Iterator[Sample]:
        size = self.world_size * self.accumulated
        predicted = sum(sample.predicted for sample in step)
        skipped: Counter[str] = Counter()
        for sample in step:
            skipped.update(sample.skipped)
        gaps = [gap for sample in step for gap in sample.gaps]
        for place in range(self.rank, size, self.world_size):
            sample = step[place] if place < len(step) else step[0]
            weight = sample.predicted * size / predicted if place < len(step) else 0.0
            yield dataclasses.replace(
                sample, after=step[-1].after, skipped=dict(skipped), gaps=gaps, together=step, weight=weight
            )

    def _with_what_was_passed_over(self, samples: Iterable[Sample | Unusable | Gap]) -> Iterator[Sample]:
        """Pass usable samples on; what was passed over before one rides with it."""
        skipped: Counter[str] = Counter()
        gaps: list[dict[str, Any]] = []
        in_a_row = 0
        for sample in samples:
            if isinstance(sample, Gap):
                gaps.append({"shard": sample.shard, "row": sample.row, "reason": sample.reason})
                self.say(f"{sample.shard}: {sample.reason}; set aside from row {sample.row:,} on")
            elif isinstance(sample, Unusable):
                skipped[sample.reason] += 1
                in_a_row += 1
                if in_a_row == MOST_UNUSABLE_IN_A_ROW:
                    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
                    raise UserError(
                        f"{self.corpus.name} ({self.corpus.mirror}): {in_a_row:,} records in a row are unusable, "
                        f"the last at {sample.shard} row {sample.row} ({reasons}); check --dataset and --text_column"
                    )
            elif self.leave_out and not self.leave_out.isdisjoint(names_of(sample)):
                skipped["left out"] += 1
            else:
                sample.skipped, sample.gaps = dict(skipped), gaps
                skipped, gaps, in_a_row = Counter(), [], 0
                yield sample
        self.gaps_at_end = gaps


def names_of(sample: Sample) -> tuple[str, str]:
    """What `leave_out` calls the document of a sample, and the sample itself."""
    document = f"{sample.document.shard}#{sample.document.row}"
    return document, f"{document}.{sample.part}"


def truncate(example: dict[str, Any], encoder: Encoder, max_length: int) -> dict[str, Any]:
    """{"record": Document} -> {"sample": Sample}: the document's first `max_length` tokens; a function for `map`."""
    record = example["record"]
    if not isinstance(record, Document):
        return {"sample": record}
    opening = encoder.opening(record.text, max_length)
    if len(opening.ids) < 2:
        return {"sample": Unusable("fewer than 2 tokens", record.shard, record.row)}
    exact = opening.total_tokens is not None
    covered = record.size if opening.end >= len(record.text) else len(record.text[: opening.end].encode("utf-8"))
    if opening.total_tokens is not None:
        tokens_cut = opening.total_tokens - len(opening.ids)
    else:
        # Not tokenized to its end: as many tokens per byte as its opening has.
        tokens_cut = round((record.size - covered) * len(opening.ids) / max(covered, 1))
    return {
        "sample": Sample(
            input_ids=opening.ids,
            document=record,
            after=record.after,
            text_bytes=covered,
            tokens_cut=tokens_cut,
            tokens_cut_exact=exact,
        )
    }


def tokens_in_pieces(encoder: Encoder, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, character ends) of a whole document, piece by piece; joined they equal `encoder.encode(text)`.

    A piece begins some words before the last one ended and goes on where its tokens, ids and ends alike, are those
    that the last one ended with; the tokens near its own end are left to the next. Where no such place is found
    (a tokenizer that looks further than words), the document is tokenized whole after all.
    """
    if len(text) <= 4 * PIECE_CHARACTERS:
        yield encoder.encode(text)
        return
    right = _word_start(text, PIECE_CHARACTERS)
    ids, ends = encoder.encode(text[:right])
    emitted = 0
    first = 0
    while right < len(text):
        last = len(ids) - _OVERLAP_TOKENS
        if last <= first:
            break
        yield ids[first:last], ends[first:last]
        emitted += last - first
        tail = list(zip(ids, ends, strict=True))[max(0, last - _OVERLAP_TOKENS) : last]
        left = _word_start(text, max(0, ends[last - 1] - _OVERLAP_CHARACTERS))
        right = _word_start(text, ends[last - 1] + PIECE_CHARACTERS)
        ids, ends = encoder.encode(text[left:right])
        ends = [left + end for end in ends]
        first = _place_after(list(zip(ids, ends, strict=True)), tail)
        if first < 0:
            break
    else:
        yield ids[first:], ends[first:]
        return
    ids, ends = encoder.encode(text)
    yield ids[emitted:], ends[emitted:]


def _place_after(tokens: list[tuple[int, int]], tail: list[tuple[int, int]]) -> int:
    """Index of the token that follows `tail` in `tokens`, both (id, end); -1 when `tail` is not there."""
    for place in range(len(tokens), len(tail) - 1, -1):
        if tokens[place - 1] == tail[-1] and tokens[place - len(tail) : place] == tail:
            return place
    return -1


def _word_start(text: str, near: int) -> int:
    """The next place at or after `near` where white space follows a word; `near` itself if none is close."""
    if near <= 0 or near >= len(text):
        return max(0, min(near, len(text)))
    for place in range(near, min(near + _OVERLAP_CHARACTERS // 2, len(text))):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return near


def _slices(pieces: Iterable[tuple[list[int], list[int]]], size: int) -> Iterator[tuple[list[int], int, bool]]:
    """(ids, character end, whether it is the last) of consecutive runs of `size` tokens."""
    ids: list[int] = []
    ends: list[int] = []
    for new_ids, new_ends in pieces:
        ids, ends = ids + new_ids, ends + new_ends
        # One token more than a run is kept back, so that the last run is known to be the last.
        while len(ids) > size:
            yield ids[:size], ends[size - 1], False
            ids, ends = ids[size:], ends[size:]
    if ids:
        yield ids, ends[-1], True


def _tokens_used(record: Document, start: Cursor) -> int:
    """Tokens of a document that were used before the stream was opened at `start`."""
    return start.token if dataclasses.replace(record.here, token=start.token) == start else 0


def windows(
    records: Iterable[Record], encoder: Encoder, max_length: int, start: Cursor
) -> Iterator[Sample | Unusable | Gap]:
    """Consecutive windows of each document, nothing thrown away; a last one of one token borrows the one before."""
    for record in records:
        if not isinstance(record, Document):
            yield record
            continue
        resumed = _tokens_used(record, start)
        taken, covered_to = 0, 0
        before: list[int] = []
        for part, (ids, end, last) in enumerate(_slices(tokens_in_pieces(encoder, record.text), max_length)):
            taken += len(ids)
            end = len(record.text) if last else end
            sample_ids = ids if len(ids) > 1 else before + ids
            if len(sample_ids) < 2:
                yield Unusable("fewer than 2 tokens", record.shard, record.row)
            elif taken > resumed:
                after = record.after if last else dataclasses.replace(record.here, token=taken)
                size_bytes = len(record.text[covered_to:end].encode("utf-8"))
                yield Sample(sample_ids, record, after, size_bytes, part)
            covered_to, before = end, ids[-1:]


def packed(
    records: Iterable[Record], encoder: Encoder, max_length: int, start: Cursor
) -> Iterator[Sample | Unusable | Gap]:
    """Documents joined by EOS, cut into blocks of `max_length`; a block is named after the document that begins it.

    The cursor after a block is the document that it stops in and the tokens of it (EOS counted) already used. A block
    belongs to one pass over the corpus: the last one of a pass is as long as it comes, at least 2 tokens.
    """
    eos = encoder.tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            "--sample_mode pack: this tokenizer has no end-of-text token to join documents with; use truncate or window"
        )
    block: list[int] = []
    size_bytes, first, part = 0, None, 0
    parts: list[dict[str, Any]] = []
    last: Document | None = None
    for record in records:
        if last is not None and record.here.epoch != last.here.epoch:
            if len(block) >= 2 and first is not None:
                yield Sample(block, first, last.after, size_bytes, part, documents=parts)
            block, size_bytes, first, last, parts = [], 0, None, None, []
        if not isinstance(record, Document):
            yield record
            continue
        last = record
        used = _tokens_used(record, start)
        position, covered_to, begins = 0, 0, True
        pieces = tokens_in_pieces(encoder, record.text)
        for ids, ends in _with_eos(pieces, eos, len(record.text)):
            for index, (token, end) in enumerate(zip(ids, ends, strict=True)):
                position += 1
                if position <= used:
                    covered_to = end
                    continue
                if not block:
                    first, part = record, (position - 1) // max_length
                if not parts or begins:
                    parts.append(
                        {"shard": record.shard, "row": record.row, "text_sha1": record.sha1,
                         "first_token": position - 1, "tokens": 0}
                    )  # fmt: skip
                    begins = False
                parts[-1]["tokens"] += 1
                block.append(token)
                if len(block) == max_length or index == len(ids) - 1:
                    size_bytes += len(record.text[covered_to:end].encode("utf-8"))
                    covered_to = end
                if len(block) == max_length:
                    assert first is not None
                    after = dataclasses.replace(record.here, token=position)
                    yield Sample(block, first, after, size_bytes, part, documents=parts)
                    block, size_bytes, first, parts = [], 0, None, []
    if len(block) >= 2 and first is not None and last is not None:
        yield Sample(block, first, last.after, size_bytes, part, documents=parts)


def _with_eos(
    pieces: Iterable[tuple[list[int], list[int]]], eos: int, end: int
) -> Iterator[tuple[list[int], list[int]]]:
    yield from pieces
    yield [eos], [end]
