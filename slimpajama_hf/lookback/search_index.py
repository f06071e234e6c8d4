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
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


from typing import TYPE_CHECKING

from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder


#: The underscore keeps it out of uploads.
FOLDER = "_index"
FILE_NAME = "search.sqlite"

#: Another layout of the tables: an index of another version is made anew.
_VERSION = 1

#: Seconds that another process may hold the index.
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
    """Where the index of a run lies."""
    return folder.path / FOLDER / FILE_NAME


def connect(folder: RunFolder) -> sqlite3.Connection:
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
        raise trouble_with(path, error) from None


def trouble_with(path: Path, error: Exception) -> UserError:
    if "locked" in str(error):
        return UserError(f"{path}: another process is building it; ask again when that is done")
    return UserError(f"{path}: {error}; make room or remove it, it is made again")


def _is_ready(connection: sqlite3.Connection) -> bool:
    """Whether the file is an index of this version; an empty file is made one."""
    connection.execute("PRAGMA synchronous = NORMAL")
    with transaction(connection):
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            with contextlib.suppress(sqlite3.OperationalError):
                # Not in every SQLite (FTS5 is an option, its trigrams came with 3.34): then all texts are looked into.
                connection.execute(_TRIGRAMS)
            connection.execute("INSERT INTO meta VALUES ('version', ?)", (str(_VERSION),))
            return True
        return "meta" in tables and read_meta(connection, "version") == str(_VERSION)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of what is done inside, or nothing of it."""
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
    """A text as it is cut into trigrams: white space as one space, and no NUL, at which FTS5 would stop."""
    return " ".join(text.split()).replace("\0", "\ufffd")
