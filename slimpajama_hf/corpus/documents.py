"""A document and its place in the corpus. Each record of a shard becomes a document, or a reason why it cannot."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

from slimpajama_hf.corpus.formats import DOMAIN_KEYS

UNKNOWN_DOMAIN = "unknown"

#: Reason for documents that are kept for evaluation (`--eval_fraction`).
HELD_OUT = "held out"

#: Reason for documents in which no token can be predicted.
TOO_SHORT = "fewer than 2 tokens"

#: If a record has no text, the names of this many of its fields are remembered for the message.
_MOST_FIELDS = 20


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where reading goes on in a corpus. `row` counts records of `shard` from 0, `token` tokens of that record.

    All fields are scalars with a default: checkpoints hold cursors, and those of older versions have fewer fields. In
    a shuffled block (`size` above 0), `shard` and `row` say where the block begins, not where the record is.
    """

    epoch: int = 0
    """Which pass over the corpus, from 0."""
    shard: str | None = None
    """None: the first shard."""
    row: int = 0
    token: int = 0
    block: int = 0
    """Number of the shuffled block in its pass."""
    used: int = 0
    """Records of the block that are already used, in its shuffled order."""
    size: int = 0
    """Records in the block; 0: not inside one."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One record of the corpus."""

    text: str
    domain: str
    mirror: str
    shard: str
    row: int
    sha1: str
    size: int
    """UTF-8 bytes of the whole text."""
    here: Cursor = Cursor()
    """Where reading must start to read it again."""
    after: Cursor = Cursor()
    """Where reading goes on after it."""


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A record that cannot be trained on, and why."""

    reason: str
    shard: str
    row: int
    here: Cursor = Cursor()
    after: Cursor = Cursor()
    fields: tuple[tuple[str, int], ...] = ()
    """If the text is missing: the names of the fields there, each with its length in characters (-1: not a string)."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """The rest of a shard that was skipped, from `row` on. `after` is the start of the next shard."""

    reason: str
    shard: str
    row: int
    here: Cursor = Cursor()
    after: Cursor = Cursor()


# ---- records -------------------------------------------------------------------------------------------------------


def domain_of(record: dict[str, Any]) -> str:
    """The domain that a record's `meta` names. By mirror, `meta` is a dict, a JSON string or the repr of a dict."""
    meta = record.get("meta")
    if isinstance(meta, str) and len(meta) < 10_000:
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            try:
                meta = ast.literal_eval(meta)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                meta = None
    for place in (meta, record):
        if isinstance(place, dict):
            for key in DOMAIN_KEYS:
                if isinstance(place.get(key), str) and place[key]:
                    return without_surrogates(place[key])
    return UNKNOWN_DOMAIN


def without_surrogates(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate, because a UTF-8 file cannot hold one."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def is_held_out(sha1: str, fraction: float) -> bool:
    """Whether the document with this SHA-1 is in the held-out `fraction`: the same in every run and process."""
    return int(sha1[:8], 16) < fraction * 2**32


def in_words(passed_over: Mapping[str, int], fields: Mapping[str, int], text_column: str, read: int = 0) -> str:
    """Say what was passed over, by reason: "6 records without a `text`; fields seen: `content`, `id`; try --text_column
    content". `fields`: field -> characters, over the records without a text. `read`: how many documents have a text.
    Another column is suggested only if they are fewer than the records without one."""
    lacks = f"no {text_column!r}"
    words = ", ".join(
        f"{count:,} record{'s' * (count != 1)} without a `{text_column}`" if reason == lacks else f"{count:,} {reason}"
        for reason, count in sorted(passed_over.items(), key=lambda item: -item[1])
    )
    if lacks not in passed_over:
        return words
    words += f"; fields seen: {', '.join(f'`{name}`' for name in fields) or 'none'}"
    longest = max(fields, key=fields.__getitem__, default=None)
    elsewhere = longest is not None and fields[longest] > 0 and passed_over[lacks] > read
    return words + (f"; try --text_column {longest}" if elsewhere else "")


def to_document(
    record: Any, text_column: str, mirror: str, shard: str, row: int, here: Cursor = Cursor(), after: Cursor = Cursor()
) -> Document | Unusable:
    """Turn a record into a document, or into the reason why it is none. The tokenizer may still find it too short."""
    if isinstance(record, dict):
        text = record.get(text_column)
        if isinstance(text, str) and text and not text.isspace():
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:
                return Unusable("lone surrogate", shard, row, here, after)
            sha1 = hashlib.sha1(data).hexdigest()
            return Document(text, domain_of(record), mirror, shard, row, sha1, len(data), here, after)
    return dataclasses.replace(_unusable(record, text_column, shard, row), here=here, after=after)


def _unusable(record: Any, text_column: str, shard: str, row: int) -> Unusable:
    if not isinstance(record, dict):
        return Unusable("not a record", shard, row)
    if text_column not in record:
        fields = tuple(
            (without_surrogates(name), len(value) if isinstance(value, str) else -1)
            for name, value in itertools.islice(record.items(), _MOST_FIELDS)
        )
        return Unusable(f"no {text_column!r}", shard, row, fields=fields)
    text = record[text_column]
    if not isinstance(text, str):
        return Unusable("text is null" if text is None else f"text is a {type(text).__name__}", shard, row)
    return Unusable("blank" if text else "empty", shard, row)
