"""A document and its place: what a record of a shard becomes, or why it cannot be used."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from typing import Any

from slimpajama_hf.corpus.shards import DOMAIN_KEYS

UNKNOWN_DOMAIN = "unknown"


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A place in a corpus: what is read next. `row` counts records of `shard` from 0, `token` tokens of that record.

    Scalars alone, each with a default: it is kept in checkpoints, and those of older versions have fewer fields. In a
    shuffled block (`size` above 0) shard and row are where the block begins, not the record.
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
    """Records of the block already used, in its shuffled order."""
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


@dataclasses.dataclass(frozen=True)
class Gap:
    """The rest of a shard that was set aside, from `row` on; `after` is the start of the next shard."""

    reason: str
    shard: str
    row: int
    here: Cursor = Cursor()
    after: Cursor = Cursor()


# ---- records -------------------------------------------------------------------------------------------------------


def domain_of(record: dict[str, Any]) -> str:
    """The domain in a record's `meta`, which is a dict, a JSON string or the repr of a Python dict, by mirror."""
    meta = record.get("meta")
    if isinstance(meta, str) and len(meta) < 10_000:
        try:
            meta = json.loads(meta)
        except ValueError:
            try:
                meta = ast.literal_eval(meta)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                meta = None
    for place in (meta, record):
        if isinstance(place, dict):
            for key in DOMAIN_KEYS:
                if isinstance(place.get(key), str) and place[key]:
                    return place[key]
    return UNKNOWN_DOMAIN


def to_document(record: Any, text_column: str, mirror: str, shard: str, row: int) -> Document | Unusable:
    """A record as a document, or the reason why it is none. The tokenizer may still find it too short."""
    if not isinstance(record, dict):
        return Unusable("not a record", shard, row)
    if text_column not in record:
        return Unusable(f"no {text_column!r}", shard, row)
    text = record[text_column]
    if not isinstance(text, str):
        return Unusable("text is null" if text is None else f"text is a {type(text).__name__}", shard, row)
    if not text:
        return Unusable("empty", shard, row)
    if text.isspace():
        return Unusable("blank", shard, row)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return Unusable("lone surrogate", shard, row)
    return Document(text, domain_of(record), mirror, shard, row, hashlib.sha1(data).hexdigest(), len(data))
