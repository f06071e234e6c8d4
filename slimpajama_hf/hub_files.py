"""A file on the Hub, read range by range: one request to open it, none for anything beside it.

`HfFileSystem.open` asks for the whole repository and for every name in the file's folder first (huggingface_hub 2.4,
hf_file_system.py, lines 1226 to 1301): thousands of names for a folder of SlimPajama.
"""

from __future__ import annotations

import io

#: Bytes asked for at a time: enough to keep the line busy, little enough that the first document comes soon.
RANGE_BYTES = 2 * 2**20


class RangeFile(io.RawIOBase):
    """The bytes of `path` in a dataset at a revision. Raises huggingface_hub's errors when it cannot be had."""

    def __init__(self, repo: str, revision: str, path: str) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        self._url = hf_hub_url(repo, path, repo_type="dataset", revision=revision)
        metadata = get_hf_file_metadata(self._url, timeout=10)
        if metadata.size is None:
            raise OSError(f"{repo}: the Hub does not say how long {path} is")
        self._size = metadata.size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` from here on; 0 at the end of the file. Raises OSError when fewer bytes come than asked for."""
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        last = min(self._position + len(buffer), self._size) - 1
        wanted = last + 1 - self._position
        if wanted <= 0:
            return 0
        headers = {**build_hf_headers(), "Range": f"bytes={self._position}-{last}"}
        response = http_backoff("GET", self._url, headers=headers, timeout=10)
        hf_raise_for_status(response)
        data = response.content
        if response.status_code == 200:
            # A server that knows no ranges sends everything.
            data = data[self._position : last + 1]
        if len(data) != wanted:
            raise OSError(f"{self._url}: {len(data):,} bytes came where {wanted:,} were asked for")
        buffer[:wanted] = data
        self._position += wanted
        return wanted


def open_on_hub(url: str) -> io.BufferedReader:
    """Open `hf://datasets/<repo>@<revision>/<path>` for reading."""
    place = url.removeprefix("hf://datasets/")
    repo, _, rest = place.partition("@")
    revision, _, path = rest.partition("/")
    return io.BufferedReader(RangeFile(repo, revision, path), RANGE_BYTES)
