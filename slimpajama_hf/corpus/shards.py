"""One file of a corpus: how it is opened, and read record by record from any row. Formats are in `formats.FORMATS`."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import os
import pathlib
import re
import urllib.parse
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from slimpajama_hf.corpus import formats, sniffing
from slimpajama_hf.corpus.formats import Reading
from slimpajama_hf.corpus.patience import OutOfPatience
from slimpajama_hf.corpus.unpacking import unpacked
from slimpajama_hf.errors import UserError, one_line

if TYPE_CHECKING:
    from slimpajama_hf.corpus.patience import Patience


#: Bytes at each end of a local file that its fingerprint covers.
FINGERPRINT_BYTES = 64 * 2**10


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file. `name` is what the ledger records; `url` is what is opened (`hf://...` or a local path)."""

    name: str
    url: str
    size: int | None = None
    """Bytes of a local file when the run began. None: not recorded (the Hub pins its files by commit)."""
    fingerprint: str | None = None

    @property
    def is_local(self) -> bool:
        return not self.url.startswith("hf://")

    @property
    def path(self) -> str:
        """Path of a local file."""
        return path_of(self.url)


class BrokenShard(UserError):
    """A file that can never be read from `row` on: it is missing, cut short, or not what its name says."""

    def __init__(self, shard: str, row: int, reason: str, says_what_to_do: bool = False) -> None:
        """`says_what_to_do`: the reason says how to mend the file, so the message need not."""
        mend = "or" if says_what_to_do else "mend the file, or"
        super().__init__(
            f"{shard}: {reason} (at row {row:,}); {mend} leave the rest of it out with --skip_broken_shards"
        )
        self.shard, self.row, self.reason = shard, row, reason


# ---- names ---------------------------------------------------------------------------------------------------------


def url_of(path: str) -> str:
    """The url of a shard for a local file at an absolute path: the path itself, or if that is not UTF-8 a `file://` url
    with those bytes in hexadecimal. So every JSON reader can read the `run.json` that names it."""
    return path if printable(path) == path else pathlib.Path(path).as_uri()


def path_of(url: str) -> str:
    """The path of a local file, from its url."""
    return os.fsdecode(urllib.parse.unquote_to_bytes(url[len("file://") :])) if url.startswith("file://") else url


def printable(name: str) -> str:
    r"""A file name with `\xe9` for each byte that is not UTF-8 and for control characters. Names stay distinct."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\0-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", name)


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
    """Open a local path, or a file on the Hub (`hf://datasets/...`), which is fetched range by range."""
    if url.startswith("hf://"):
        from slimpajama_hf.corpus.hub_files import open_on_hub

        return open_on_hub(url, patience)
    return open(path_of(url), "rb")


# ---- records -------------------------------------------------------------------------------------------------------


def read_shard(
    shard: Shard, start: int, reading: Reading, patience: Patience | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (row, record) of one shard from row `start`. A record is a value, or a string that says why there is none.

    Raises BrokenShard, with the row that could not be read, for a file that is missing, cut short or not what its name
    says. Raises UserError if the Hub refuses access, and what `Patience` raises.
    """
    reader = formats.reader_of(shard.name)
    assert reader is not None, shard.name  # a corpus lists only files that can be read
    row = start
    try:
        with open_raw(shard.url, patience) as raw:
            is_parquet = reader is formats.read_parquet
            # A parquet reader starts at the end of the file: on the Hub, a look at the beginning is one more request.
            if reading.txt_documents is not None and (shard.is_local or not is_parquet):
                _refuse_mistaken(sniffing.not_packed(raw.read(sniffing.SNIFFED_BYTES), shard.name))
                raw.seek(0)
            source = raw if is_parquet else _text(raw, shard.name, reading)
            for row, record in reader(source, start, reading):
                yield row, record
                row += 1
    except OutOfPatience:
        raise
    except UserError as error:
        raise BrokenShard(shard.name, row, str(error), says_what_to_do=True) from None
    except Exception as error:
        reason = _why_broken(error, shard)
        if reason is None:
            raise
        raise BrokenShard(shard.name, row, reason) from None


def _refuse_mistaken(reason: str | None) -> None:
    """Raise UserError for a file that is not what its name says."""
    if reason is not None:
        raise UserError(reason)


def _text(raw: IO[bytes], name: str, reading: Reading) -> Iterator[bytes]:
    """Yield the bytes of a text file in pieces, without the UTF-8 byte order mark."""
    chunks = unpacked(raw, name)
    if reading.txt_documents is None:
        yield from chunks
        return
    start, broken = b"", None
    try:
        while len(start) < sniffing.SNIFFED_BYTES and (chunk := next(chunks, None)) is not None:
            start += chunk
    except Exception as error:
        # What came before the error is given out first.
        broken = error
    _refuse_mistaken(sniffing.mistaken(start[: sniffing.SNIFFED_BYTES], name))
    yield start.removeprefix(codecs.BOM_UTF8)
    if broken is not None:
        raise broken
    yield from chunks


def _why_broken(error: Exception, shard: Shard) -> str | None:
    """What is wrong with a file, in a few words; None if the error has another cause.

    Raises UserError if the Hub refuses access, because that concerns every file.
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
    of_library = isinstance(error, zlib.error) or type(error).__name__ == "ZstdError" or _is_of_arrow(error)
    if of_library or isinstance(error, ValueError | OverflowError):
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
