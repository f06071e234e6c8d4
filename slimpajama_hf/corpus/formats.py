"""How a file is cut into records. To add a format, write a reader and add a row to `FORMATS`."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from slimpajama_hf import screen
from slimpajama_hf.corpus.patience import StopRequested
from slimpajama_hf.errors import UserError

#: Longer lines are skipped and never held in memory. The longest documents of SlimPajama are books of some MB.
LONGEST_LINE_BYTES = 32 * 2**20

#: Keys, beside `meta`, in which other corpora keep what SlimPajama calls `redpajama_set_name`.
DOMAIN_KEYS = ("redpajama_set_name", "domain", "pile_set_name", "source", "subset")

#: `--txt_documents` -> what the plan says. It decides what one document of a plain text file is.
TXT_DOCUMENTS = {
    "line": "one line is one document",
    "paragraph": "one paragraph is one document",
    "file": "one file is one document",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the records of a run are read, as the run recorded it."""

    text_column: str = "text"
    txt_documents: str | None = "line"
    """One of `TXT_DOCUMENTS`. None: a run of a version that had no choice, and did not look at first bytes."""


def lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield lines without their newline, or None for a line longer than `LONGEST_LINE_BYTES`, which is never held."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        size += len(first)
        if size <= LONGEST_LINE_BYTES:
            pending.append(first)
        else:
            pending.clear()
        for piece in more:
            yield b"".join(pending) if size <= LONGEST_LINE_BYTES else None
            pending, size = [piece], len(piece)
    if size:
        yield b"".join(pending) if size <= LONGEST_LINE_BYTES else None


def _too_long() -> str:
    return f"longer than {LONGEST_LINE_BYTES // 2**20} MB"


# ---- lines of text -------------------------------------------------------------------------------------------------


def read_json_lines(chunks: Iterable[bytes], start: int, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Yield (row, record) from row `start`. A record is a JSON value, or a string that says why it cannot be used."""
    for row, line in enumerate(lines(chunks)):
        if row < start:
            continue
        if line is None:
            yield row, _too_long()
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            yield row, "not UTF-8"
        except (ValueError, RecursionError):
            yield row, "not JSON" if line.strip() else "empty line"
        else:
            # A record that is a string would be taken for a reason.
            yield row, record if not isinstance(record, str) else [record]


def read_text(chunks: Iterable[bytes], start: int, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Cut a plain text file into documents as `--txt_documents` says. The row of a line is its number in the file,
    empty lines included. The row of a paragraph is its number among the paragraphs."""
    if reading.txt_documents == "file":
        found: Iterator[tuple[int, bytes | None]] = iter([(0, _whole(chunks))])
    elif reading.txt_documents == "paragraph":
        found = enumerate(_paragraphs(lines(chunks)))
    else:
        found = ((row, line) for row, line in enumerate(lines(chunks)) if line is None or line.strip())
    for row, data in found:
        if row < start:
            continue
        if data is None:
            yield row, _too_long()
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            yield row, "not UTF-8"
        else:
            whole = reading.txt_documents in ("file", "paragraph")
            yield row, {reading.text_column: text.replace("\r\n", "\n") if whole else text.rstrip("\r")}


def _whole(chunks: Iterable[bytes]) -> bytes | None:
    """All bytes, or None if they are too many for one document."""
    found: list[bytes] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > LONGEST_LINE_BYTES:
            return None
        found.append(chunk)
    return b"".join(found)


def _paragraphs(found: Iterable[bytes | None]) -> Iterator[bytes | None]:
    """Join lines that have no blank line between them. None stands for a paragraph that is too long."""
    paragraph: list[bytes] = []
    size = 0
    for line in found:
        if line is not None and not line.strip():
            if size:
                yield b"\n".join(paragraph) if size <= LONGEST_LINE_BYTES else None
            paragraph, size = [], 0
            continue
        size += LONGEST_LINE_BYTES + 1 if line is None else len(line) + 1
        if size <= LONGEST_LINE_BYTES and line is not None:
            paragraph.append(line.removesuffix(b"\r"))
        else:
            paragraph.clear()
    if size:
        yield b"\n".join(paragraph) if size <= LONGEST_LINE_BYTES else None


# ---- parquet -------------------------------------------------------------------------------------------------------


class _Unreadable(str):
    """Stands for a value that cannot be read, and says why."""


def read_parquet(file: IO[bytes], start: int, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Read a parquet file, row group by row group. Groups before `start` are skipped.

    Each value is decoded by itself, so that a bad one costs only its record. Beside the text, only columns that may
    name the domain are read. If one of them cannot be read, the domain is unknown.
    """
    from pyarrow import parquet

    # With read-ahead, the first row of a local file would wait for its whole row group, which may be all of the file.
    # Over the network, read-ahead means few large requests.
    local = isinstance(file, io.BufferedReader)
    reader = parquet.ParquetFile(file, pre_buffer=not local, buffer_size=2**20 if local else 0)
    names = reader.schema_arrow.names
    if reading.text_column not in names:
        raise UserError(
            f"no column {reading.text_column!r} among {', '.join(names) or 'no columns at all'}; "
            "name it with --text_column"
        )
    said: set[str] = set()
    row = 0
    for group in range(reader.num_row_groups):
        size = reader.metadata.row_group(group).num_rows
        if row + size <= start:
            row += size
            continue
        beside = {path: _beside(reader, group, path, said) for path in _domain_columns(reader.schema_arrow)}
        for value in _column(reader, group, reading.text_column, inside=False):
            named = {path: next(values) for path, values in beside.items()}
            if row >= start:
                yield row, _record(value, named, reading.text_column)
            row += 1


def _record(value: Any, named: dict[str, str | None], text_column: str) -> Any:
    """A record in the shape of a line of JSON, or a string that says why there is none."""
    if isinstance(value, _Unreadable):
        return str(value)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return "not UTF-8"
    meta = {path.partition(".")[2]: name for path, name in named.items() if "." in path}
    flat = {path: name for path, name in named.items() if "." not in path}
    return {**({"meta": meta} if meta else {}), **flat, text_column: value}


def _domain_columns(schema: Any) -> list[str]:
    """The columns that may name the domain of a record: `source`, `meta`, `meta.redpajama_set_name`."""
    import pyarrow

    found = [key for key in DOMAIN_KEYS if schema.names.count(key) == 1]
    if schema.names.count("meta") == 1:
        kind = schema.field("meta").type
        if pyarrow.types.is_struct(kind):
            found += [f"meta.{key}" for key in DOMAIN_KEYS if kind.get_field_index(key) >= 0]
        else:
            found.append("meta")
    return found


def _column(reader: Any, group: int, path: str, inside: bool) -> Iterator[Any]:
    """Yield the values of one column of a row group; text as bytes. `inside`: `path` names a field of a struct."""
    import pyarrow

    for batch in reader.iter_batches(batch_size=64, row_groups=[group], columns=[path]):
        array = batch.column(0)
        while inside and pyarrow.types.is_struct(array.type):
            array = array.flatten()[0]
        if isinstance(array, pyarrow.ExtensionArray):
            array = array.storage
        if pyarrow.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        for text, data in (("string", "binary"), ("large_string", "large_binary"), ("string_view", "binary_view")):
            if array.type == getattr(pyarrow, text)():
                array = array.cast(getattr(pyarrow, data)())
        for value in array:
            try:
                yield value.as_py()
            except (ValueError, OverflowError, pyarrow.ArrowException):
                yield _Unreadable("cannot be decoded")


def _beside(reader: Any, group: int, path: str, said: set[str]) -> Iterator[str | None]:
    """Yield the strings of a column beside the text, None for other values, and None for ever after its end."""
    from slimpajama_hf.corpus import hub_files

    try:
        for value in _column(reader, group, path, inside="." in path):
            value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            yield value if isinstance(value, str) and not isinstance(value, _Unreadable) else None
    except Exception as error:
        if isinstance(error, UserError | StopRequested) or hub_files.status_of(error) is not None:
            raise
        if path not in said:
            said.add(path)
            screen.say(f"the column {path!r} cannot be read ({type(error).__name__}): the domain stays unknown")
    while True:
        yield None


# ---- names ---------------------------------------------------------------------------------------------------------

Reader = Callable[[Any, int, Reading], Iterator[tuple[int, Any]]]

#: Ending of a file name -> reader of (row, record).
FORMATS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json.gz": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".txt.gz": read_text,
    ".txt.zst": read_text,
}


def ending_of(name: str) -> str | None:
    """The ending in `FORMATS` that a file name has, in any case; None for a format that we do not read."""
    return next((ending for ending in sorted(FORMATS, key=len, reverse=True) if name.lower().endswith(ending)), None)


def reader_of(name: str) -> Reader | None:
    """The reader for a file name, or None for a format that we do not read."""
    ending = ending_of(name)
    return FORMATS[ending] if ending is not None else None
