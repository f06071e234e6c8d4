"""`inspect RUN --find TEXT`: was this read, when, with what loss. An index over the run's own documents.

`RUN/_index/search.sqlite` holds the documents of the ledger, read again from the corpus (compressed), which characters
of each were trained at which step, and the trigrams of each (SQLite's FTS5). A search asks the trigrams for candidates
and then looks into their texts, so that every yes is a place in a text. Where FTS5 is not compiled in, and for a TEXT
of fewer than 3 characters, it looks into all texts. The index grows with the ledger and shrinks with it: each of its
steps carries the chain hash of its row.

What is found: the very characters of TEXT, capitals and accents included; any white space in it matches any white
space. Of a text that stands in a document but behind what was trained it is said that it was cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import ledger, palette, reread, surprisals, terminal
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.patience import Patience
from slimpajama_hf.reread import NotTheDocument, Place, Rereader
from slimpajama_hf.run_folder import RunFolder
from slimpajama_hf.screen import Waiting

if TYPE_CHECKING:
    from rich.console import Console

    from slimpajama_hf.tokenizer import Encoder

#: The underscore keeps it out of uploads.
FOLDER = "_index"
FILE_NAME = "search.sqlite"

#: Another layout of the tables: an index of another version is made anew.
_VERSION = 1

#: Ledger rows taken into the index in one transaction. A shuffled block is taken whole, so that it is read in order.
CHUNK_STEPS = 1000

#: Trigrams of a long TEXT that candidates are asked for; the rest is seen in their texts.
MOST_TRIGRAMS = 48

#: Seconds that another process may hold the index.
_BUSY_SECONDS = 120.0

#: Matches shown on a terminal, which is also how many steps are looked up for their losses.
MATCHES_SHOWN = 20
#: Characters of one, and on either side of it.
_TEXT_SHOWN, _AROUND = 300, 60

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, shard TEXT NOT NULL, row INTEGER NOT NULL, sha1 BLOB NOT NULL,
    text BLOB NOT NULL, UNIQUE (shard, row, sha1)
);
CREATE TABLE steps (step INTEGER PRIMARY KEY, chain TEXT NOT NULL, trouble TEXT);
CREATE TABLE trained (
    step INTEGER NOT NULL, document INTEGER NOT NULL, start INTEGER NOT NULL, end INTEGER NOT NULL,
    PRIMARY KEY (document, step, start)
) WITHOUT ROWID;
"""
_TRIGRAMS = """
CREATE VIRTUAL TABLE trigrams
    USING fts5(text, tokenize='trigram case_sensitive 1', detail=none, content='', columnsize=0);
"""


# ---- the file ----


def path_of(folder: RunFolder) -> Path:
    """Where the index of a run lies."""
    return folder.path / FOLDER / FILE_NAME


def _connect(folder: RunFolder) -> sqlite3.Connection:
    """The index of a run, made where there is none. Raises UserError when it cannot be opened."""
    path = path_of(folder)
    try:
        path.parent.mkdir(exist_ok=True)
        for attempt in range(2):
            # Transactions are begun by hand: the module's own come too late to read what they then change.
            connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                if _is_ready(connection):
                    return connection
            except sqlite3.OperationalError:
                # Held by another process, or the disk: nothing is wrong with the file.
                connection.close()
                raise
            except sqlite3.DatabaseError:
                pass
            connection.close()
            # Of another version, or no index at all (a file that was damaged): it can be made again.
            if attempt == 0:
                path.unlink(missing_ok=True)
                # What is left of a transaction on the old file must not be applied to the new one.
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        raise sqlite3.DatabaseError("it cannot be made anew")
    except (OSError, sqlite3.Error) as error:
        raise _trouble(path, error) from None


def _trouble(path: Path, error: Exception) -> UserError:
    if "locked" in str(error):
        return UserError(f"{path}: another process is building it; ask again when that is done")
    return UserError(f"{path}: {error}; make room or remove it, it is made again")


def _is_ready(connection: sqlite3.Connection) -> bool:
    """Whether the file is an index of this version; an empty file is made one."""
    connection.execute("PRAGMA synchronous = NORMAL")
    with _transaction(connection):
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            with contextlib.suppress(sqlite3.OperationalError):
                # Not in every SQLite (FTS5 is an option, its trigrams came with 3.34): then all texts are looked into.
                connection.execute(_TRIGRAMS)
            connection.execute("INSERT INTO meta VALUES ('version', ?)", (str(_VERSION),))
            return True
        return "meta" in tables and _meta(connection, "version") == str(_VERSION)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of what is done inside, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _meta(connection: sqlite3.Connection, name: str) -> str | None:
    found = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def _set_meta(connection: sqlite3.Connection, name: str, value: Any) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, str(value)))


def _has_trigrams(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT rowid FROM trigrams LIMIT 0")
    except sqlite3.OperationalError:
        return False
    return True


# ---- growing with the ledger ----


@dataclasses.dataclass(frozen=True)
class Extent:
    """How far an index goes."""

    steps: int
    """Steps of the ledger that are in it."""
    documents: int
    missing: tuple[tuple[int, str], ...]
    """(step, why) of those whose text could not be read again."""


def extend(
    folder: RunFolder,
    *,
    waiting: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
    patience: Patience | None = None,
) -> Extent:
    """Take what the ledger gained into the index, and out of it what the ledger lost; returns how far it goes.

    `waiting` is told how far it is, `stop` asked between documents: what is in by then stays. Several processes may
    do this at once. Takes about 1 s of a processor for 1,000 documents of 7 kB, and as much disk as the text has
    bytes. Raises UserError when the run has no readable ledger or its Hub does not answer.
    """
    record = folder.read_record()
    connection = _connect(folder)
    try:
        return _Extension(connection, folder, record, waiting, stop, patience).run()
    except sqlite3.Error as error:
        raise _trouble(path_of(folder), error) from None
    finally:
        connection.close()


class _Extension:
    """One call of `extend`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        folder: RunFolder,
        record: dict[str, Any],
        waiting: Callable[[str], None],
        stop: Callable[[], bool],
        patience: Patience | None,
    ) -> None:
        self.connection, self.folder, self.record = connection, folder, record
        self.waiting, self.stop = waiting, stop
        self.patience = patience or Patience(reread.PATIENCE_SECONDS, stop)
        self.mode: str = record["model"]["sample_mode"]
        self.length: int = record["model"]["max_seq_length"]
        self.trigrams = _has_trigrams(connection)
        self._encoder: Encoder | None = None

    def run(self) -> Extent:
        """Chunk after chunk until the ledger has no more."""
        chunk = max(CHUNK_STEPS, self._shuffle_buffer())
        rereader: Rereader | None = None
        try:
            while not self.stop():
                with _transaction(self.connection):
                    # Where it stands is read inside: another process may have gone on meanwhile.
                    rows, offset = self._next_rows(chunk)
                    retried = self._troubled(rows)
                    if not rows and not retried:
                        break
                    if rereader is None:
                        rereader = Rereader(reread.corpus_of(self.record), self.patience)
                    whole = self._take(rereader, [*retried, *rows])
                    if not whole:
                        # Half a chunk is not in order: the next call takes it anew.
                        raise _Stopped
                    if rows:
                        _set_meta(self.connection, "offset", offset)
                if not rows:
                    break
        except _Stopped:
            pass
        finally:
            if rereader is not None:
                rereader.close()
        return self._extent()

    def _shuffle_buffer(self) -> int:
        from slimpajama_hf import cli

        config = cli.read_config(str(self.folder.config)) if self.folder.config.is_file() else {}
        return int(config.get("shuffle_buffer") or 0)

    def _extent(self) -> Extent:
        def one(query: str) -> int:
            return self.connection.execute(query).fetchone()[0]

        missing = self.connection.execute("SELECT step, trouble FROM steps WHERE trouble IS NOT NULL ORDER BY step")
        return Extent(one("SELECT count(*) FROM steps"), one("SELECT count(*) FROM documents"), tuple(missing))

    # -- which rows --

    def _next_rows(self, most: int) -> tuple[list[dict[str, Any]], int]:
        """The next rows that are not in the index, and where the ledger goes on behind them."""
        if not self.folder.ledger.is_file():
            raise UserError(f"{self.folder.path}: no ledger in it yet; nothing was read")
        offset, step = self._agreed()
        rows = []
        with open(self.folder.ledger, "rb") as file:
            file.seek(offset)
            for line in itertools.islice(file, most):
                if not line.endswith(b"\n"):
                    break
                row = self._row(line, step)
                rows.append(row)
                offset, step = offset + len(line), step + 1
        return rows, offset

    def _row(self, line: bytes, step: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if row["step"] == step and {"chain", "text_sha1", "shard", "row", "tokens", "text_bytes"} <= row.keys():
                return row
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f"{self.folder.ledger}: step {step} cannot be read; see python -m slimpajama_hf verify {self.folder.path}"
        )

    def _agreed(self) -> tuple[int, int]:
        """(byte of the ledger, step) up to which index and ledger agree; what the ledger has otherwise is let go."""
        last = self.connection.execute("SELECT step, chain FROM steps ORDER BY step DESC LIMIT 1").fetchone()
        if last is None:
            return 0, 0
        offset = int(_meta(self.connection, "offset") or 0)
        # The hash of one row covers all rows before it: looking at the last one is enough.
        if self._chain_before(offset) == last[1]:
            return offset, last[0] + 1
        offset = agreed = 0
        stored = self.connection.execute("SELECT chain FROM steps ORDER BY step")
        with open(self.folder.ledger, "rb") as file:
            for line, (chain,) in zip(file, stored, strict=False):
                if not line.endswith(b"\n") or self._row(line, agreed)["chain"] != chain:
                    break
                offset, agreed = offset + len(line), agreed + 1
        self._let_go(agreed)
        _set_meta(self.connection, "offset", offset)
        return offset, agreed

    def _chain_before(self, offset: int) -> str | None:
        """Chain hash of the row that ends at byte `offset` of the ledger; None where none does."""
        with open(self.folder.ledger, "rb") as file:
            if offset == 0 or file.seek(0, 2) < offset:
                return None
            start, block = offset, b""
            while start and block.count(b"\n") < 2:
                step = min(start, 2**16)
                start -= step
                file.seek(start)
                block = file.read(step) + block
        try:
            return json.loads(block.splitlines()[-1])["chain"] if block.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):
            return None

    def _let_go(self, step: int) -> None:
        """Take `step` and all later ones out of the index."""
        self.connection.execute("DELETE FROM steps WHERE step >= ?", (step,))
        self.connection.execute("DELETE FROM trained WHERE step >= ?", (step,))
        # Their trigrams stay (a table without content cannot delete) and lead to nothing: ids are not used twice.
        self.connection.execute("DELETE FROM documents WHERE id NOT IN (SELECT document FROM trained)")
        if step == 0 and self.trigrams:
            self.connection.execute("INSERT INTO trigrams (trigrams) VALUES ('delete-all')")

    def _troubled(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose text could not be read in an earlier call: the corpus may be back. Asked for once a call."""
        if self._asked_again:
            return []
        self._asked_again = True
        steps = {step for (step,) in self.connection.execute("SELECT step FROM steps WHERE trouble IS NOT NULL")}
        if not steps:
            return []
        with open(self.folder.ledger, "rb") as file:
            return [self._row(line, step) for step, line in enumerate(file) if step in steps]

    _asked_again = False

    # -- their documents --

    def _take(self, rereader: Rereader, rows: list[dict[str, Any]]) -> bool:
        """Take rows into the index; False when it was stopped on the way."""
        places: dict[Place, list[tuple[int, Place]]] = {}
        trouble: dict[int, str] = {}
        for row in rows:
            try:
                for place in reread.places(row, self.mode, self.length):
                    # Several steps may be of one document (windows, passes): it is read once.
                    whole = dataclasses.replace(place, first_token=0, tokens=0)
                    places.setdefault(whole, []).append((row["step"], place))
            except UserError as error:
                trouble[row["step"]] = str(error)
        by_step = {row["step"]: row for row in rows}
        order = {shard: number for number, shard in enumerate(dict.fromkeys(place.shard for place in places))}
        for number, whole in enumerate(sorted(places, key=lambda place: (order[place.shard], place.row))):
            if self.stop():
                return False
            if number % 50 == 0:
                last = rows[-1]["step"] + 1
                self.waiting(f"building the search index: up to step {last:,}, {number:,} of {len(places):,} documents")
            try:
                self._take_document(rereader, whole, places[whole], by_step)
            except NotTheDocument as error:
                trouble |= {step: str(error) for step, _ in places[whole]}
        self.connection.executemany(
            "INSERT OR REPLACE INTO steps VALUES (?, ?, ?)",
            [(row["step"], row["chain"], trouble.get(row["step"])) for row in rows],
        )
        return True

    def _take_document(
        self, rereader: Rereader, whole: Place, uses: list[tuple[int, Place]], rows: dict[int, dict[str, Any]]
    ) -> None:
        sha1 = bytes.fromhex(whole.sha1)
        found = self.connection.execute(
            "SELECT id, text FROM documents WHERE shard = ? AND row = ? AND sha1 = ?", (whole.shard, whole.row, sha1)
        ).fetchone()
        if found is None:
            text = rereader.read(whole).text
            document = self.connection.execute(
                "INSERT INTO documents (shard, row, sha1, text) VALUES (?, ?, ?, ?)",
                (whole.shard, whole.row, sha1, zlib.compress(text.encode("utf-8"))),
            ).lastrowid
            if self.trigrams:
                self.connection.execute(
                    "INSERT INTO trigrams (rowid, text) VALUES (?, ?)", (document, _for_trigrams(text))
                )
        else:
            document, text = found[0], zlib.decompress(found[1]).decode("utf-8")
        for step, start, end in self._trained_characters(text, uses, rows):
            self.connection.execute("INSERT OR REPLACE INTO trained VALUES (?, ?, ?, ?)", (step, document, start, end))

    def _trained_characters(
        self, text: str, uses: list[tuple[int, Place]], rows: dict[int, dict[str, Any]]
    ) -> Iterator[tuple[int, int, int]]:
        """(step, first character, character behind the last) of what each step trained of a document."""
        if self.mode == "truncate":
            data = text.encode("utf-8")
            for step, _ in uses:
                # The row says how many bytes its tokens cover: no tokenizer is needed.
                yield step, 0, len(data[: rows[step]["text_bytes"]].decode("utf-8", "ignore"))
            return
        ends = self._token_ends(text, max(place.first_token + place.tokens for _, place in uses))
        for step, place in uses:
            first, last = place.first_token, min(place.first_token + place.tokens, len(ends))
            if first > last:
                raise NotTheDocument(f"{place.name}: it has {len(ends):,} tokens now, step {step} began at {first:,}")
            to_the_end = last - first < place.tokens
            if to_the_end and self.mode == "window":
                # A last window of one token borrows the one before (in `pack` it is the EOS that has no characters).
                first -= 1
            yield step, ends[first - 1] if first > 0 else 0, len(text) if to_the_end else ends[last - 1]

    def _token_ends(self, text: str, count: int) -> list[int]:
        """Character ends of the first `count` tokens of a text, or of all."""
        from slimpajama_hf.samples import tokens_in_pieces

        if self._encoder is None:
            self._encoder = _encoder(self.folder, self.record)
        ends: list[int] = []
        for _, new_ends in tokens_in_pieces(self._encoder, text):
            ends += new_ends
            if len(ends) >= count:
                break
        return ends[:count]


class _Stopped(Exception):
    """`stop` said so in the middle of a chunk."""


# ---- searching ----


@dataclasses.dataclass(frozen=True)
class Read:
    """A step that trained the TEXT, the whole of it or its part."""

    step: int
    start: int
    end: int
    """Characters [start, end) of the document: the first place where the TEXT stands in what the step trained."""
    whole: bool
    """Whether the step trained all of it."""


@dataclasses.dataclass(frozen=True)
class Match:
    """A document in which the TEXT stands."""

    shard: str
    row: int
    read: bool
    """Whether all of the TEXT was trained, by one step or by the steps of neighbouring windows together."""
    reads: tuple[Read, ...]
    """Of a TEXT that was not read, the steps that trained a part of it: the rest was cut."""
    document_steps: tuple[int, ...]
    """All steps that trained something of the document."""
    start: int
    """Character at which `text` begins in the document: where it was read first, else where it stands first."""
    before: str
    text: str
    after: str
    places: int
    """How often it stands in the document."""

    @property
    def first_step(self) -> int:
        """Of those that read it, else of those that trained something of its document."""
        return self.reads[0].step if self.reads else self.document_steps[0]


def find(folder: RunFolder, wanted: str) -> list[Match]:
    """The documents of the index that hold `wanted`: those that were read first, in the order of their steps.

    Raises UsageError when there is nothing to look for.
    """
    pattern = _pattern(wanted)
    connection = _connect(folder)
    try:
        matches = [
            match
            for document, shard, row, data in _candidates(connection, wanted)
            if (match := _look_into(connection, pattern, document, shard, row, data)) is not None
        ]
    finally:
        connection.close()
    return sorted(matches, key=lambda match: (not match.read, match.first_step))


def _pattern(wanted: str) -> re.Pattern[str]:
    words = wanted.split()
    if not words:
        raise UsageError("--find: nothing but white space; expected a piece of text")
    try:
        wanted.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("--find: not UTF-8; no document holds it") from None
    return re.compile(r"\s+".join(map(re.escape, words)))


def _for_trigrams(text: str) -> str:
    """A text as it is cut into trigrams: white space as one space, and no NUL, at which FTS5 would stop."""
    return " ".join(text.split()).replace("\0", "\ufffd")


def _candidates(connection: sqlite3.Connection, wanted: str) -> Iterable[tuple[int, str, int, bytes]]:
    """(id, shard, row, compressed text) of every document that may hold `wanted`."""
    columns = "SELECT documents.id, documents.shard, documents.row, documents.text FROM documents"
    text = _for_trigrams(wanted)
    trigrams = sorted({text[place : place + 3] for place in range(len(text) - 2)})
    if not trigrams or not _has_trigrams(connection):
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
        text[max(0, start - _AROUND) : start], text[start:end], text[end : end + _AROUND], len(spans),
    )  # fmt: skip


def _steps_of(span: tuple[int, int], trained: list[tuple[int, int, int]]) -> list[tuple[int, bool]]:
    """(step, whether it trained all of it) of those that trained all characters of a span, together where none did
    alone; empty where some characters were not trained."""
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


# ---- with what loss ----


@dataclasses.dataclass(frozen=True)
class Losses:
    """How well a step predicted."""

    step: int
    row: dict[str, Any]
    """Its row of the ledger."""
    own_loss: float | None
    """Mean surprisal of the tokens of the TEXT itself, nats per token; None where it was not kept."""
    own_tokens: int


def losses_of(folder: RunFolder, matches: Iterable[Match], most: int) -> dict[int, Losses]:
    """The losses of the first `most` steps among those of `matches`, by step; the TEXT's own where it was kept."""
    found: dict[int, tuple[Match, Read]] = {}
    for match in matches:
        for read in match.reads:
            found.setdefault(read.step, (match, read))
    wanted = dict(itertools.islice(sorted(found.items(), key=lambda item: item[0]), most))
    if not wanted:
        return {}
    record, losses = folder.read_record(), {}
    with Rereader(reread.corpus_of(record)) as rereader:
        own = _OwnLoss(folder, record, rereader)
        for row, predicted in _rows(folder, set(wanted)):
            match, read = wanted[row["step"]]
            losses[row["step"]] = Losses(row["step"], row, *own(row, predicted, match, read))
    return losses


class _OwnLoss:
    """The mean surprisal of a TEXT in a step, from `surprisals.f32`."""

    def __init__(self, folder: RunFolder, record: dict[str, Any], rereader: Rereader) -> None:
        self.folder, self.record, self.rereader = folder, record, rereader
        self._encoder: Encoder | None = None

    def __call__(self, row: dict[str, Any], predicted: int, match: Match, read: Read) -> tuple[float | None, int]:
        """(nats per token, tokens); (None, 0) where it was not kept or the document cannot be had any more."""
        nats = surprisals.read(self.folder.surprisals, predicted, ledger.predicted(row))
        if not np.isfinite(nats).all():
            return None, 0
        if self._encoder is None:
            self._encoder = _encoder(self.folder, self.record)
        mode, length = self.record["model"]["sample_mode"], self.record["model"]["max_seq_length"]
        places = reread.places(row, mode, length)
        try:
            documents = [self.rereader.read(place) for place in places]
            tokens = reread.tokens_again(self._encoder, places, documents, mode)
        except UserError:
            # The index has the text; the corpus itself is not needed to answer.
            return None, 0
        # The first token of each sample is not predicted, and has no value.
        firsts = set(itertools.accumulate((sample["tokens"] for sample in ledger.each_sample(row)), initial=0))
        valued = (token for index, token in enumerate(tokens) if index not in firsts)
        own = [
            index
            for index, token in enumerate(valued)
            if (places[token.document].shard, places[token.document].row) == (match.shard, match.row)
            and token.start < read.end and read.start < token.end
        ]  # fmt: skip
        return (float(nats[own].astype(np.float64).mean()), len(own)) if own else (None, 0)


def _encoder(folder: RunFolder, record: dict[str, Any]) -> Encoder:
    from slimpajama_hf import session

    session.quiet_libraries()
    return reread.encoder_of(folder, record)


def _rows(folder: RunFolder, steps: set[int]) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, tokens predicted before it) of some steps, in order."""
    predicted = 0
    with open(folder.ledger, "rb") as file:
        for number, line in enumerate(file):
            if not steps:
                return
            row = json.loads(line)
            if number in steps:
                steps.discard(number)
                yield row, predicted
            predicted += ledger.predicted(row)


# ---- the answer ----


def main(run: str, wanted: str, as_json: bool) -> int:
    """`inspect RUN --find TEXT`: extend the index, answer; the exit code. Raises UserError when it cannot say no."""
    _pattern(wanted)
    folder = RunFolder(Path(run).expanduser())
    with Waiting("opening the search index") as waiting:
        extent = extend(folder, waiting=waiting)
        waiting("searching")
        matches = find(folder, wanted)
        waiting("looking up the losses")
        losses = losses_of(folder, matches, MATCHES_SHOWN)
    read = any(match.read for match in matches)
    if extent.missing and not read:
        step, why = extent.missing[0]
        missing = len(extent.missing)
        raise UserError(
            f"not read in {extent.steps - missing:,} steps, but the text of {missing:,} others cannot be had again "
            f"(the first: step {step}, {why}); bring the corpus back to be sure"
        )
    if as_json:
        sys.stdout.write(json.dumps(_to_dict(run, wanted, extent, matches, losses, read), indent=1) + "\n")
    else:
        _show(run, wanted, extent, matches, losses)
    return 0


def _to_dict(
    run: str, wanted: str, extent: Extent, matches: list[Match], losses: dict[int, Losses], read: bool
) -> dict[str, Any]:
    return {
        "run": run,
        "text": wanted,
        "read": read,
        "steps_searched": extent.steps,
        "documents_searched": extent.documents,
        "steps_not_searched": [{"step": step, "reason": why} for step, why in extent.missing],
        "matches": [dataclasses.asdict(match) for match in matches],
        "losses": [
            {"step": each.step, "loss": each.row["loss"], "text_loss": each.own_loss, "text_tokens": each.own_tokens,
             "accuracy": each.row["accuracy"], "domain": each.row["domain"]}
            for each in losses.values()
        ],
    }  # fmt: skip


def _show(run: str, wanted: str, extent: Extent, matches: list[Match], losses: dict[int, Losses]) -> None:
    from rich.text import Text

    drawn = terminal.console()
    steps = sorted({read.step for match in matches if match.read for read in match.reads})
    quoted = f"“{terminal.visible(wanted, line_ends=False)}”"
    where = f"{extent.steps:,} steps of {run}"
    if steps:
        times = f"at step {steps[0]:,}" if len(steps) == 1 else f"at {len(steps):,} steps, first at {steps[0]:,}"
        answer = f"{quoted} was read {times}, of {where}"
    elif matches:
        count = "a document" if len(matches) == 1 else f"{len(matches):,} documents"
        answer = f"{quoted} was not read: it stands in {count} of the {where}, but in what was cut"
    else:
        answer = f"{quoted} was not read: it is in no document of the {where}"
    drawn.print(Text(answer, "bold"))
    for match in matches[:MATCHES_SHOWN]:
        drawn.print()
        _show_match(drawn, match, losses)
    if len(matches) > MATCHES_SHOWN:
        drawn.print(Text(f"\nand {len(matches) - MATCHES_SHOWN:,} documents more (--json has them all)", "dim"))
    if extent.missing:
        drawn.print(Text(f"note: the text of {len(extent.missing):,} steps cannot be had again", "italic"))


def _show_match(drawn: Console, match: Match, losses: dict[int, Losses]) -> None:
    from rich.text import Text

    for read in match.reads:
        line = Text(f"step {read.step:,}", "bold")
        if not read.whole:
            line.append(" (a part of it)" if match.read else " (a part of it; the rest was cut)", "not bold dim")
        if read.step in losses:
            line.append(f"  {_loss_words(losses[read.step])}", "not bold")
        drawn.print(line)
    if not match.reads:
        drawn.print(Text(f"step {match.first_step:,}", "bold") + Text("  cut: outside what it trained", "not bold"))
    times = f", {match.places:,} times" if match.places > 1 else ""
    place = terminal.visible(f"  {match.shard} row {match.row:,}, character {match.start:,}{times}", line_ends=False)
    drawn.print(Text(place, "dim"))
    context = Text("  … ", "dim")
    shown = match.text if len(match.text) <= _TEXT_SHOWN else f"{match.text[:_TEXT_SHOWN]} … "
    for text, style in ((match.before, "not dim"), (shown, "not dim bold reverse"), (match.after, "not dim")):
        # Indents say nothing here.
        context.append(terminal.visible(re.sub(r"[ \t]{2,}", " ", text), line_ends=False), style)
    context.append(" …")
    drawn.print(context)


def _loss_words(losses: Losses) -> str:
    row, own = losses.row, ""
    if losses.own_loss is not None:
        plural = "this token" if losses.own_tokens == 1 else f"these {losses.own_tokens} tokens"
        own = f" ({losses.own_loss:.4f} for {plural})"
    accuracy = terminal.number(row["accuracy"], ".1%")
    return f"loss {terminal.number(row['loss'])}{own}, accuracy {accuracy}, {palette.domain_name(row['domain'])}"
