"""Decompress files. Bytes that come before an error are given out before the error is raised."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

#: Bytes read at a time, and the most given out at a time.
CHUNK_BYTES = 2**18


class _GzipMember:
    """Decompress one member of a .gz file, with the interface of `zstd.ZstdDecompressor`. Raises zlib.error."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._member.decompress(self._member.unconsumed_tail + data, max_length)
        self.needs_input = not self._member.unconsumed_tail and len(out) < max_length
        return out

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data


def _zstd_frame() -> Any:
    from backports import zstd

    # The library's own limit is 128 MB, but `zstd --long=31` makes frames that look 2 GB back.
    most = zstd.DecompressionParameter.window_log_max
    return zstd.ZstdDecompressor(options={most: most.bounds()[1]})


def unpacked(raw: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the bytes of `raw` in pieces, decompressed as the ending of `name` says.

    Raises EOFError if the file ends inside its compressed data, and zlib.error or ZstdError if it is damaged.
    """
    lower = name.lower()
    if lower.endswith(".zst"):
        return _parts(raw, _zstd_frame, padding=b"")
    if lower.endswith(".gz"):
        # Zeros may follow a member (tapes, blocks).
        return _parts(raw, _GzipMember, padding=b"\0")
    return iter(lambda: raw.read(CHUNK_BYTES), b"")


def _parts(raw: IO[bytes], new: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """Yield the bytes of all frames (or members) of a file, one after the other."""
    data = raw.read(CHUNK_BYTES)
    if not data:
        raise EOFError
    while data:
        part, begin, given = new(), raw.tell() - len(data), 0
        while not part.eof:
            if not data and part.needs_input:
                data = raw.read(CHUNK_BYTES)
                if not data:
                    raise EOFError
            try:
                out = part.decompress(data, CHUNK_BYTES)
            except Exception:
                yield _rest_before_the_error(raw, new(), begin, given)
                raise
            data, given = b"", given + len(out)
            if out:
                yield out
        data = (part.unused_data or raw.read(CHUNK_BYTES)).lstrip(padding)
        while not data and (more := raw.read(CHUNK_BYTES)):
            data = more.lstrip(padding)


def _rest_before_the_error(raw: IO[bytes], part: Any, begin: int, given: int) -> bytes:
    """What a broken frame, which begins at offset `begin` of the file, still holds after its first `given` bytes.

    A decompressor that fails keeps the output of the same call to itself. So the frame is decompressed again:
    from where that call began, one byte at a time.
    """
    raw.seek(begin)
    data, rest, made = b"", bytearray(), 0
    while True:
        if part.needs_input:
            data = raw.read(CHUNK_BYTES)
            if not data:
                return bytes(rest)
        try:
            out = part.decompress(data, min(CHUNK_BYTES, given - made) if made < given else 1)
        except Exception:
            return bytes(rest)
        if made >= given:
            rest += out
        made, data = made + len(out), b""
