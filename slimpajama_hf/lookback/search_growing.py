"""Extends the search index when the ledger grows, and shortens it when the ledger was cut back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from slimpajama_hf.corpus.patience import Patience
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import reread
from slimpajama_hf.lookback.reread import NotTheDocument, Rereader, quiet_encoder_of
from slimpajama_hf.lookback.search_index import (
    connect,
    for_trigrams,
    has_trigrams,
    path_of,
    read_meta,
    transaction,
    trouble_with,
    write_meta,
)
from slimpajama_hf.record import ledger

if TYPE_CHECKING:
    from slimpajama_hf.lookback.reread import Place
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder


#: Ledger rows per transaction. A shuffled block is added as a whole, so that it is read in order.
CHUNK_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Extent:
    """How far an index goes."""

    steps: int
    """Steps of the ledger that are in it."""
    documents: int
    missing: tuple[tuple[int, str], ...]
    """(step, why) of the steps whose text could not be read again."""


def extend(
    folder: RunFolder,
    *,
    waiting: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
    patience: Patience | None = None,
) -> Extent:
    """Bring the index in line with the ledger: add new steps, remove those that the ledger lost. Returns its extent.

    `waiting` is called with the progress. `stop` is called between documents; what was added until then stays. Several
    processes may do this at once. It takes about 1 s of a processor for 1,000 documents of 7 kB, and as much disk as
    the text has bytes. Raises UserError if the run has no readable ledger or its Hub does not answer.
    """
    record = folder.read_record()
    connection = connect(folder)
    try:
        return _Extension(connection, folder, record, waiting, stop, patience).run()
    except sqlite3.Error as error:
        raise trouble_with(path_of(folder), error) from None
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
        self.trigrams = has_trigrams(connection)
        self._encoder: Encoder | None = None

    def run(self) -> Extent:
        """Add chunk after chunk until the ledger has no more."""
        chunk = max(CHUNK_STEPS, self._shuffle_buffer())
        rereader: Rereader | None = None
        try:
            while not self.stop():
                with transaction(self.connection):
                    # Read within the transaction, because another process may have extended the index.
                    rows, offset = self._next_rows(chunk)
                    retried = self._troubled(rows)
                    if not rows and not retried:
                        break
                    if rereader is None:
                        rereader = Rereader(reread.corpus_of(self.record), self.patience)
                    whole = self._take(rereader, [*retried, *rows])
                    if not whole:
                        # Half a chunk is not in order: the next call begins it again.
                        raise _Stopped
                    if rows:
                        write_meta(self.connection, "offset", offset)
                if not rows:
                    break
        except _Stopped:
            pass
        finally:
            if rereader is not None:
                rereader.close()
        return self._extent()

    def _shuffle_buffer(self) -> int:
        from slimpajama_hf.settings import yaml_file

        config = yaml_file.read_config(str(self.folder.config)) if self.folder.config.is_file() else {}
        return int(config.get("shuffle_buffer") or 0)

    def _extent(self) -> Extent:
        def one(query: str) -> int:
            return self.connection.execute(query).fetchone()[0]

        missing = self.connection.execute("SELECT step, trouble FROM steps WHERE trouble IS NOT NULL ORDER BY step")
        return Extent(one("SELECT count(*) FROM steps"), one("SELECT count(*) FROM documents"), tuple(missing))

    # -- rows --

    def _next_rows(self, most: int) -> tuple[list[dict[str, Any]], int]:
        """The next rows that are not in the index, and the byte of the ledger after them."""
        if not self.folder.ledger.is_file():
            raise UserError(f"{self.folder.path}: no ledger in it yet; nothing was read")
        offset, step = self._agreed()
        rows = list(itertools.islice(self._rows_from(offset, step), most))
        return [row for row, _ in rows], rows[-1][1] if rows else offset

    def _rows_from(self, offset: int, step: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The rows from `step` on, whose line begins at byte `offset`, each with the byte after its line."""
        try:
            yield from ledger.rows_and_ends(self.folder.ledger, offset, step)
        except ledger.Damaged as error:
            raise UserError(f"{error}; see python -m slimpajama_hf verify {self.folder.path}") from None

    def _agreed(self) -> tuple[int, int]:
        """(byte of the ledger, step) up to which index and ledger agree; removes later steps from the index."""
        last = self.connection.execute("SELECT step, chain FROM steps ORDER BY step DESC LIMIT 1").fetchone()
        if last is None:
            return 0, 0
        offset = int(read_meta(self.connection, "offset") or 0)
        # The hash of one row covers all rows before it, so comparing the last one is enough.
        if self._chain_before(offset) == last[1]:
            return offset, last[0] + 1
        offset = agreed = 0
        stored = self.connection.execute("SELECT chain FROM steps ORDER BY step")
        for (row, end), (chain,) in zip(self._rows_from(0, 0), stored, strict=False):
            if row["chain"] != chain:
                break
            offset, agreed = end, agreed + 1
        self._let_go(agreed)
        write_meta(self.connection, "offset", offset)
        return offset, agreed

    def _chain_before(self, offset: int) -> str | None:
        """Chain hash of the row that ends at byte `offset` of the ledger; None if no row does."""
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
        """Remove `step` and all later ones from the index."""
        self.connection.execute("DELETE FROM steps WHERE step >= ?", (step,))
        self.connection.execute("DELETE FROM trained WHERE step >= ?", (step,))
        # Their trigrams stay (a contentless table cannot delete) but lead nowhere, because ids are not reused.
        self.connection.execute("DELETE FROM documents WHERE id NOT IN (SELECT document FROM trained)")
        if step == 0 and self.trigrams:
            self.connection.execute("INSERT INTO trigrams (trigrams) VALUES ('delete-all')")

    def _troubled(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose text could not be read earlier, because the corpus may be back; once per call of `extend`."""
        if self._asked_again:
            return []
        self._asked_again = True
        steps = {step for (step,) in self.connection.execute("SELECT step FROM steps WHERE trouble IS NOT NULL")}
        if not steps:
            return []
        return [row for row, _ in self._rows_from(0, 0) if row["step"] in steps]

    _asked_again = False

    # -- their documents --

    def _take(self, rereader: Rereader, rows: list[dict[str, Any]]) -> bool:
        """Add rows to the index; False if it was stopped before the end."""
        places: dict[Place, list[tuple[int, Place]]] = {}
        trouble: dict[int, str] = {}
        for row in rows:
            try:
                for place in reread.places(row, self.mode, self.length):
                    # Several steps may use one document (windows, passes); it is read once.
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
                    "INSERT INTO trigrams (rowid, text) VALUES (?, ?)", (document, for_trigrams(text))
                )
        else:
            document, text = found[0], zlib.decompress(found[1]).decode("utf-8")
        for step, start, end in self._trained_characters(text, uses, rows):
            self.connection.execute("INSERT OR REPLACE INTO trained VALUES (?, ?, ?, ?)", (step, document, start, end))

    def _trained_characters(
        self, text: str, uses: list[tuple[int, Place]], rows: dict[int, dict[str, Any]]
    ) -> Iterator[tuple[int, int, int]]:
        """(step, first character, one past the last) of what each step trained of a document."""
        if self.mode == "truncate":
            data = text.encode("utf-8")
            for step, _ in uses:
                # The row has the number of bytes that its tokens cover, so no tokenizer is needed.
                yield step, 0, len(data[: rows[step]["text_bytes"]].decode("utf-8", "ignore"))
            return
        ends = self._token_ends(text, max(place.first_token + place.tokens for _, place in uses))
        for step, place in uses:
            first, last = place.first_token, min(place.first_token + place.tokens, len(ends))
            if first > last:
                raise NotTheDocument(f"{place.name}: it has {len(ends):,} tokens now, step {step} began at {first:,}")
            to_the_end = last - first < place.tokens
            if to_the_end and self.mode == "window":
                # A last window of one token borrows the one before (in `pack` it is the EOS, without characters).
                first -= 1
            yield step, ends[first - 1] if first > 0 else 0, len(text) if to_the_end else ends[last - 1]

    def _token_ends(self, text: str, count: int) -> list[int]:
        """The ends of the first `count` tokens of a text, or of all, in characters."""
        from slimpajama_hf.samples.cutting import tokens_in_pieces

        if self._encoder is None:
            self._encoder = quiet_encoder_of(self.folder, self.record)
        ends: list[int] = []
        for _, new_ends in tokens_in_pieces(self._encoder, text):
            ends += new_ends
            if len(ends) >= count:
                break
        return ends[:count]


class _Stopped(Exception):
    """`stop` was requested in the middle of a chunk."""
