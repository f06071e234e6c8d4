"""Cut documents into samples: truncate, window, pack.

To add a way, write a generator like `windows` and add its name to `arguments.SAMPLE_MODES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slimpajama_hf.corpus.documents import TOO_SHORT, Document, Unusable
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples.sample import Sample

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Cursor, Gap
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.passes import Record


#: Long documents are tokenized in pieces of this many characters, so that memory does not grow with their length.
PIECE_CHARACTERS = 65_536


_OVERLAP_CHARACTERS = 2_048


_OVERLAP_TOKENS = 32


def truncate(example: dict[str, Any], encoder: Encoder, max_length: int) -> dict[str, Any]:
    """{"record": Document} -> {"sample": Sample} of the document's first `max_length` tokens. A function for `map`."""
    record = example["record"]
    if not isinstance(record, Document):
        return {"sample": record}
    opening = encoder.opening(record.text, max_length)
    if len(opening.ids) < 2:
        return {"sample": Unusable(TOO_SHORT, record.shard, record.row)}
    exact = opening.total_tokens is not None
    covered = record.size if opening.end >= len(record.text) else len(record.text[: opening.end].encode("utf-8"))
    if opening.total_tokens is not None:
        tokens_cut = opening.total_tokens - len(opening.ids)
    else:
        # The rest was not tokenized: estimate its tokens by the bytes per token of the opening.
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
    """Yield (ids, character ends) of a whole document, piece by piece. Joined they equal `encoder.encode(text)`.

    Pieces overlap. Each begins some words before the last one ended, and goes on after the tokens (ids and ends) that
    the last one gave last. The tokens near the end of a piece are left to the next. If no such place is found, because
    a tokenizer looks further than words, the document is tokenized whole after all.
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
    """Index in `tokens` of the token after `tail`; both are lists of (id, end). -1 when `tail` is not in `tokens`."""
    for place in range(len(tokens), len(tail) - 1, -1):
        if tokens[place - 1] == tail[-1] and tokens[place - len(tail) : place] == tail:
            return place
    return -1


def _word_start(text: str, near: int) -> int:
    """The next place at or after `near` where white space follows a word, or `near` itself if none is close."""
    if near <= 0 or near >= len(text):
        return max(0, min(near, len(text)))
    for place in range(near, min(near + _OVERLAP_CHARACTERS // 2, len(text))):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return near


def _slices(pieces: Iterable[tuple[list[int], list[int]]], size: int) -> Iterator[tuple[list[int], int, bool]]:
    """Yield (ids, character end, whether it is the last) of consecutive runs of `size` tokens."""
    ids: list[int] = []
    ends: list[int] = []
    for new_ids, new_ends in pieces:
        ids, ends = ids + new_ids, ends + new_ends
        # One more token than a run is kept back. Otherwise the last run would not be known as the last.
        while len(ids) > size:
            yield ids[:size], ends[size - 1], False
            ids, ends = ids[size:], ends[size:]
    if ids:
        yield ids, ends[-1], True


def _tokens_used(record: Document, start: Cursor) -> int:
    """Number of tokens of a document that were used before the stream was opened at `start`."""
    return start.token if dataclasses.replace(record.here, token=start.token) == start else 0


def windows(
    records: Iterable[Record], encoder: Encoder, max_length: int, start: Cursor
) -> Iterator[Sample | Unusable | Gap]:
    """Cut each document into consecutive windows; nothing is lost. A last one of one token borrows the one before."""
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
                yield Unusable(TOO_SHORT, record.shard, record.row)
            elif taken > resumed:
                after = record.after if last else dataclasses.replace(record.here, token=taken)
                size_bytes = len(record.text[covered_to:end].encode("utf-8"))
                yield Sample(sample_ids, record, after, size_bytes, part)
            covered_to, before = end, ids[-1:]


def packed(
    records: Iterable[Record], encoder: Encoder, max_length: int, start: Cursor
) -> Iterator[Sample | Unusable | Gap]:
    """Join documents by EOS and cut them into blocks of `max_length`. A block has the name of its first document.

    The cursor after a block holds the document in which the block stops, and how many of its tokens (with EOS) are
    used. A block belongs to one pass over the corpus. The last block of a pass may be shorter, with at least 2 tokens.
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
