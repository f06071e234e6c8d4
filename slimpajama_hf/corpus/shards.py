"""One file of a corpus: opened, decompressed, cut into records. To add a format: a row in `FORMATS` and a reader."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from slimpajama_hf.corpus.patience import OutOfPatience
from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    from slimpajama_hf.corpus.patience import Patience


#: A longer line is passed over without being held in memory. The longest documents of SlimPajama are books of some MB.
LONGEST_LINE_BYTES = 32 * 2**20

#: Columns, beside `meta`, where other corpora keep what SlimPajama calls `redpajama_set_name`.
DOMAIN_KEYS = ("redpajama_set_name", "domain", "pile_set_name", "source", "subset")

#: Bytes at each end of a local file that its fingerprint covers.
FINGERPRINT_BYTES = 64 * 2**10


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file. `name` is what the ledger records; `url` is what is opened (`hf://...` or a local path)."""

    name: str
    url: str
    size: int | None = None
    """Bytes of a local file when the run began; None: not noted (the Hub pins its files by commit)."""
    fingerprint: str | None = None

    @property
    def is_local(self) -> bool:
        return not self.url.startswith("hf://")


class BrokenShard(UserError):
    """A file that cannot be read from `row` on, for good: not there, cut short, or not what its name says."""

    def __init__(self, shard: str, row: int, reason: str) -> None:
        super().__init__(
            f"{shard}: {reason} (at row {row:,}); mend the file, or leave the rest of it out with --skip_broken_shards"
        )
        self.shard, self.row, self.reason = shard, row, reason


# ---- bytes ---------------------------------------------------------------------------------------------------------


def fingerprint(path: str) -> tuple[int, str]:
    """(size in bytes, SHA-256 of the size and of the first and the last 64 KiB) of a local file. Raises OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode())
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return size, digest.hexdigest()


def open_raw(url: str, patience: Patience | None = None) -> IO[bytes]:
    """The bytes of a local path or of a file on the Hub (`hf://datasets/...`, fetched range by range)."""
    if url.startswith("hf://"):
        from slimpajama_hf.corpus.hub_files import open_on_hub

        return open_on_hub(url, patience)
    return open(url, "rb")


def decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    """`raw` behind the decompression that its name asks for. Both readers raise EOFError on a truncated file."""
    if name.endswith(".zst"):
        from backports import zstd

        return cast("IO[bytes]", zstd.ZstdFile(raw))
    if name.endswith(".gz"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    return raw


def lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their newline; None stands for one that is longer than `LONGEST_LINE_BYTES` (never held whole)."""
    pending: list[bytes] = []
    size = 0
    while chunk := file.read(2**18):
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


# ---- records -------------------------------------------------------------------------------------------------------


def read_json_lines(file: IO[bytes], start: int, text_column: str) -> Iterator[tuple[int, Any]]:
    """(row, record) from row `start`; a record is a value, or Unusable's reason as a string."""
    for row, line in enumerate(lines(file)):
        if row < start:
            continue
        if line is None:
            yield row, f"longer than {LONGEST_LINE_BYTES // 2**20} MB"
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            yield row, "not UTF-8"
        except (ValueError, RecursionError):
            yield row, "not JSON" if line.strip() else "empty line"
        else:
            # A string alone would be taken for a reason.
            yield row, record if not isinstance(record, str) else [record]


def read_text_lines(file: IO[bytes], start: int, text_column: str) -> Iterator[tuple[int, Any]]:
    """A plain text file: one document a line; empty lines only separate."""
    for row, line in enumerate(lines(file)):
        if row < start or (line is not None and not line.strip()):
            continue
        if line is None:
            yield row, f"longer than {LONGEST_LINE_BYTES // 2**20} MB"
            continue
        try:
            yield row, {text_column: line.decode("utf-8").rstrip("\r")}
        except UnicodeDecodeError:
            yield row, "not UTF-8"


def read_parquet(file: IO[bytes], start: int, text_column: str) -> Iterator[tuple[int, Any]]:
    """A parquet file, row group by row group: those before `start` are not read."""
    from pyarrow import parquet

    # Buffered ahead, the first row of a local file would wait until its whole row group has been read, which may be all
    # of the file. What comes over the network comes in few large requests.
    local = isinstance(file, io.BufferedReader)
    reader = parquet.ParquetFile(file, pre_buffer=not local, buffer_size=2**20 if local else 0)
    names = reader.schema_arrow.names
    if text_column not in names:
        raise UserError(
            f"no column {text_column!r} among {', '.join(names) or 'no columns at all'}; name it with --text_column"
        )
    columns = [text_column, *(name for name in ("meta", *DOMAIN_KEYS) if name in names)]
    row = 0
    for group in range(reader.num_row_groups):
        size = reader.metadata.row_group(group).num_rows
        if row + size <= start:
            row += size
            continue
        for batch in reader.iter_batches(batch_size=64, row_groups=[group], columns=columns):
            for record in batch.to_pylist():
                if row >= start:
                    yield row, record
                row += 1


Reader = Callable[[IO[bytes], int, str], Iterator[tuple[int, Any]]]

#: File name ending -> reader of (row, record).
FORMATS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json.gz": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
    ".txt": read_text_lines,
    ".txt.gz": read_text_lines,
    ".txt.zst": read_text_lines,
}


def reader_of(name: str) -> Reader | None:
    """The reader for a file name, or None for a format that we do not read."""
    return next((reader for ending, reader in FORMATS.items() if name.lower().endswith(ending)), None)


def read_shard(
    shard: Shard, start: int, text_column: str, patience: Patience | None = None
) -> Iterator[tuple[int, Any]]:
    """(row, record) of one shard from row `start`.

    Raises BrokenShard, with the row that could not be read, for a file that is not there, is cut short or is not what
    its name says; UserError for a Hub that does not let us in; what `Patience` raises.
    """
    reader = reader_of(shard.name)
    assert reader is not None, shard.name  # a corpus lists only files that can be read
    row = start
    try:
        with open_raw(shard.url, patience) as raw, decompressed(raw, shard.name) as file:
            for row, record in reader(file, start, text_column):
                yield row, record
                row += 1
            if file is not raw and raw.tell() == 0:
                raise EOFError
    except OutOfPatience:
        raise
    except UserError as error:
        raise BrokenShard(shard.name, row, str(error)) from None
    except Exception as error:
        reason = _why_broken(error, shard)
        if reason is None:
            raise
        raise BrokenShard(shard.name, row, reason) from None


def _why_broken(error: Exception, shard: Shard) -> str | None:
    """What is wrong with a file, in a few words; None for an error that is not the file's.

    Raises UserError for a Hub that refuses us: then it is not this one file.
    """
    from slimpajama_hf.corpus import hub_files

    status = hub_files.status_of(error)
    if status in (401, 403):
        raise UserError(
            f"{shard.name}: {hub_files.status_words(status)} on the Hub; `hf auth login`, or ask for access"
        ) from None
    if status is not None:
        return hub_files.status_words(status)
    if type(error).__name__ == "OfflineModeIsEnabled":
        raise UserError(f"{shard.name}: HF_HUB_OFFLINE is set, and this corpus is on the Hub; unset it") from None
    if isinstance(error, EOFError):
        return "the file is truncated: it ends inside its compressed data"
    if isinstance(error, FileNotFoundError):
        return "no such file any more" if shard.is_local else "not there"
    # backports.zstd raises its own ZstdError on 3.10 to 3.13; pyarrow's errors are ArrowInvalid and its relatives.
    if isinstance(error, gzip.BadGzipFile | zlib.error) or type(error).__name__ == "ZstdError" or _is_of_arrow(error):
        return f"not a readable {kind_of(shard.name)} file ({one_line(error)})"
    if isinstance(error, OSError) and shard.is_local:
        return f"cannot be read ({one_line(error)})"
    if isinstance(error, OSError):
        return f"not a readable {kind_of(shard.name)} file ({one_line(error)})"
    return None


def _is_of_arrow(error: Exception) -> bool:
    return any(kind.__module__.startswith("pyarrow") for kind in type(error).__mro__)


def kind_of(name: str) -> str:
    """The last ending of a file name: `.zst`."""
    return "." + name.rpartition(".")[2]


def one_line(error: BaseException) -> str:
    """The words of an error, at most 200 characters of them."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
