"""Finds where a text was read: the trigrams give candidates, and then their texts are searched."""

from __future__ import annotations

import dataclasses
import re
import sqlite3
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from slimpajama_hf.errors import UsageError
from slimpajama_hf.lookback.search_index import connect, for_trigrams, has_trigrams

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder


#: How many trigrams of a long TEXT are used to find candidates; the texts decide.
MOST_TRIGRAMS = 48

#: Characters shown on either side of a match.
AROUND = 60


@dataclasses.dataclass(frozen=True)
class Read:
    """A step that trained the TEXT or a part of it."""

    step: int
    start: int
    end: int
    """Characters [start, end) of the document: the first place of the TEXT in what the step trained."""
    whole: bool
    """Whether the step trained all of it."""


@dataclasses.dataclass(frozen=True)
class Match:
    """A document that contains the TEXT."""

    shard: str
    row: int
    read: bool
    """Whether all of the TEXT was trained, by one step or by the steps of neighbouring windows together."""
    reads: tuple[Read, ...]
    """The steps that trained it; if none trained all of it, those that trained a part."""
    document_steps: tuple[int, ...]
    """All steps that trained something of the document."""
    start: int
    """Where `text` begins in the document, in characters: at the first place that was read, else at the first place."""
    before: str
    text: str
    after: str
    places: int
    """How often it is in the document."""

    @property
    def first_step(self) -> int:
        """The first step that read it, or else the first step of its document."""
        return self.reads[0].step if self.reads else self.document_steps[0]


def find(folder: RunFolder, wanted: str) -> list[Match]:
    """The documents in the index that contain `wanted`. Those that were read come first; both kinds are sorted by step.

    Raises UsageError if there is nothing to search for.
    """
    pattern = pattern_of(wanted)
    connection = connect(folder)
    try:
        matches = [
            match
            for document, shard, row, data in _candidates(connection, wanted)
            if (match := _look_into(connection, pattern, document, shard, row, data)) is not None
        ]
    finally:
        connection.close()
    return sorted(matches, key=lambda match: (not match.read, match.first_step))


def pattern_of(wanted: str) -> re.Pattern[str]:
    """The regular expression for a search: any white space matches any other. Raises UsageError if none can match."""
    words = wanted.split()
    if not words:
        raise UsageError("--find: nothing but white space; expected a piece of text")
    try:
        wanted.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("--find: not UTF-8; no document holds it") from None
    return re.compile(r"\s+".join(map(re.escape, words)))


def _candidates(connection: sqlite3.Connection, wanted: str) -> Iterable[tuple[int, str, int, bytes]]:
    """(id, shard, row, compressed text) of every document that may contain `wanted`."""
    columns = "SELECT documents.id, documents.shard, documents.row, documents.text FROM documents"
    text = for_trigrams(wanted)
    trigrams = sorted({text[place : place + 3] for place in range(len(text) - 2)})
    if not trigrams or not has_trigrams(connection):
        return connection.execute(columns)
    if len(trigrams) > MOST_TRIGRAMS:
        trigrams = [trigrams[number * len(trigrams) // MOST_TRIGRAMS] for number in range(MOST_TRIGRAMS)]
    query = " AND ".join('"' + trigram.replace('"', '""') + '"' for trigram in trigrams)
    return connection.execute(
        f"{columns} JOIN trigrams ON trigrams.rowid = documents.id WHERE trigrams MATCH ?", (query,)
    )


def _look_into(
    connection: sqlite3.Connection, pattern: re.Pattern[str], document: int, shard: str, row: int, data: bytes
) -> Match | None:
    text = zlib.decompress(data).decode("utf-8")
    spans = [match.span() for match in pattern.finditer(text)]
    if not spans:
        return None
    trained = connection.execute(
        "SELECT step, start, end FROM trained WHERE document = ? ORDER BY step, start", (document,)
    ).fetchall()
    if not trained:
        return None
    reads: dict[int, Read] = {}
    read = False
    for place in spans:
        steps = _steps_of(place, trained)
        read = read or bool(steps)
        for step, whole in steps:
            if step not in reads or (whole and not reads[step].whole):
                reads[step] = Read(step, *place, whole)
    if not read:
        reads = {
            step: Read(step, start, end, False)
            for start, end in reversed(spans) for step, first, last in trained if first < end and start < last
        }  # fmt: skip
    in_order = tuple(reads[step] for step in sorted(reads))
    start, end = (in_order[0].start, in_order[0].end) if in_order else spans[0]
    return Match(
        shard, row, read, in_order, tuple(sorted({step for step, _, _ in trained})), start,
        text[max(0, start - AROUND) : start], text[start:end], text[end : end + AROUND], len(spans),
    )  # fmt: skip


def _steps_of(span: tuple[int, int], trained: list[tuple[int, int, int]]) -> list[tuple[int, bool]]:
    """(step, whether it trained all of it) for the steps that trained a span: each that trained all of it, or else
    those that did so together. Empty if some characters were not trained."""
    start, end = span
    alone = [(step, True) for step, first, last in trained if first <= start and end <= last]
    if alone:
        return alone
    touching = sorted((first, last, step) for step, first, last in trained if first < end and start < last)
    reached = start
    for first, last, _ in touching:
        if first > reached:
            return []
        reached = max(reached, last)
    return [(step, False) for _, _, step in touching] if reached >= end else []
