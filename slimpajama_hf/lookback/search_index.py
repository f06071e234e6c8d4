"""`inspect RUN --find TEXT`: whether the run read a text, when, and with what loss. An index of the run's documents.

`RUN/_index/search.sqlite` has the documents of the ledger, read again from the corpus (compressed), the characters of
each that were trained at each step, and its trigrams (SQLite's FTS5). A search gets candidates from the trigrams and
then searches their texts, so every match is a place in a text. Without FTS5, and for a TEXT of fewer than 3 characters,
it searches all texts. The index grows and shrinks with the ledger: each of its steps has the chain hash of its row.

A match has exactly the characters of TEXT, capitals and accents included; any white space matches any other. If a
document contains the text only after the part that was trained, the result says that it was cut.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder


#: The underscore keeps this folder out of uploads.
FOLDER = "_index"
FILE_NAME = "search.sqlite"

#: The version of the tables; an index of another version is made anew.
_VERSION = 1

#: How long to wait while another process holds the index, in seconds.
_BUSY_SECONDS = 120.0

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
    """The path of a run's index."""
    return folder.path / FOLDER / FILE_NAME


def connect(folder: RunFolder) -> sqlite3.Connection:
    """Open the index of a run, or make one. Raises UserError if it cannot be opened."""
    path = path_of(folder)
    try:
        path.parent.mkdir(exist_ok=True)
        for attempt in range(2):
            # Transactions are begun by hand: the module begins its own too late, after what they depend on was read.
            connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                if _is_ready(connection):
                    return connection
            except sqlite3.OperationalError:
                # Another process holds it, or the disk fails: nothing is wrong with the file.
                connection.close()
                raise
            except sqlite3.DatabaseError:
                pass
            connection.close()
            # Another version, or a damaged file: it can be made again.
            if attempt == 0:
                path.unlink(missing_ok=True)
                # A transaction left over from the old file must not be applied to the new one.
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        raise sqlite3.DatabaseError("it cannot be made anew")
    except (OSError, sqlite3.Error) as error:
        raise trouble_with(path, error) from None


def trouble_with(path: Path, error: Exception) -> UserError:
    if "locked" in str(error):
        return UserError(f"{path}: another process is building it; ask again when that is done")
    return UserError(f"{path}: {error}; make room or remove it, it is made again")


def _is_ready(connection: sqlite3.Connection) -> bool:
    """Whether the file is an index of this version; an empty file becomes one."""
    connection.execute("PRAGMA synchronous = NORMAL")
    with transaction(connection):
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            with contextlib.suppress(sqlite3.OperationalError):
                # Some SQLite lack it (FTS5 is optional, its trigrams came with 3.34): then all texts are searched.
                connection.execute(_TRIGRAMS)
            connection.execute("INSERT INTO meta VALUES ('version', ?)", (str(_VERSION),))
            return True
        return "meta" in tables and read_meta(connection, "version") == str(_VERSION)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Context that commits everything done inside, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def read_meta(connection: sqlite3.Connection, name: str) -> str | None:
    found = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def write_meta(connection: sqlite3.Connection, name: str, value: Any) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, str(value)))


def has_trigrams(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT rowid FROM trigrams LIMIT 0")
    except sqlite3.OperationalError:
        return False
    return True


def for_trigrams(text: str) -> str:
    """A text as it is cut into trigrams: white space becomes one space, and NUL, at which FTS5 stops, is replaced."""
    return " ".join(text.split()).replace("\0", "\ufffd")
