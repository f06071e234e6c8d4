"""Files on the Hub, read range by range, and their lists, read page by page. Both outlast failures of the network.

`HfFileSystem.open` first asks for the whole repository and for every name in the file's folder (huggingface_hub,
`HfFileSystem.info`): thousands of names for a folder of SlimPajama. The retries of huggingface_hub (`http_backoff`)
wait up to 23 s silently and cannot be stopped. `datasets` repeats reads on the decompressor, which loses what it had
half done. Here a failed range is asked for again below everything that decompresses: no byte is lost, and none
comes twice.
"""

from __future__ import annotations

import email.utils
import functools
import io
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from slimpajama_hf.corpus.patience import Patience

#: Bytes in one request: enough to keep the connection busy, few enough that the first document comes soon.
RANGE_BYTES = 2 * 2**20

#: Seconds without a byte after which a request counts as failed.
REQUEST_TIMEOUT = 10.0

#: HTTP statuses that pass by themselves, like those from 500 on. Every other one from 400 on is final.
_PASSING = frozenset({408, 425, 429})

_STATUS_WORDS = {
    401: "not there, private or gated",
    403: "forbidden",
    404: "not there",
    410: "gone",
    429: "too many requests",
    500: "the server failed",
    502: "bad gateway",
    503: "the server is busy",
    504: "the server is late",
}

Result = TypeVar("Result")


class ShortAnswer(OSError):
    """An answer with other bytes than asked for, or with fewer. The request is repeated."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of huggingface_hub; None if no server answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def status_words(status: int) -> str:
    """`HTTP 404 (not there)`."""
    return f"HTTP {status} ({_STATUS_WORDS.get(status, 'error')})"


def _transport_errors() -> tuple[type[Exception], ...]:
    """The network errors of the HTTP client that huggingface_hub uses (httpx or httpx2, by version)."""
    from huggingface_hub.utils import get_session

    client = sys.modules[type(get_session()).__module__.partition(".")[0]]
    return (client.TransportError,)


def passing(error: BaseException) -> str | None:
    """Why a request failed, if another try can help; None for a failure that stays."""
    if isinstance(error, ShortAnswer):
        return str(error)
    status = status_of(error)
    if status is not None:
        return status_words(status) if status in _PASSING or status >= 500 else None
    if isinstance(error, _transport_errors()):
        name = type(error).__name__
        if "Timeout" in name:
            return f"no answer for {REQUEST_TIMEOUT:.0f} s"
        return "no connection" if "Connect" in name else f"the connection broke ({name})"
    return None


def _seconds_asked(error: BaseException) -> float | None:
    """Seconds that the server asks us to wait: `Retry-After` (seconds or a date), or the Hub's `ratelimit` headers."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return None
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            return None
    if status_of(error) == 429:
        from huggingface_hub.utils import parse_ratelimit_headers

        limit = parse_ratelimit_headers(headers)
        if limit is not None and limit.remaining == 0:
            return float(limit.reset_in_seconds)
    return None


def persistently(ask: Callable[[], Result], what: str, patience: Patience) -> Result:
    """Call `ask` until it succeeds or patience is over. Raises its error when another try cannot help."""
    while True:
        began = time.monotonic()
        try:
            result = ask()
        except Exception as error:
            why = passing(error)
            if why is None:
                raise
            patience.failed(what, why, error, began, _seconds_asked(error))
        else:
            patience.succeeded()
            return result


class RangeFile(io.RawIOBase):
    """The bytes of `path` in a dataset at a revision, as a file.

    Raises the errors of huggingface_hub if it cannot be read, and those of `Patience`.
    """

    def __init__(self, repo: str, revision: str, path: str, patience: Patience | None = None) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        self._patience = patience or Patience()
        self._what = f"{repo}: {path}"
        self._url = hf_hub_url(repo, path, repo_type="dataset", revision=revision)
        metadata = persistently(
            lambda: get_hf_file_metadata(self._url, timeout=REQUEST_TIMEOUT), self._what, self._patience
        )
        if metadata.size is None:
            raise OSError(f"the Hub does not say how long {path} is")
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
        """Fill `buffer` from the current position; 0 at the end of the file. A retry goes on after the last byte."""
        start = self._position
        end = min(start + len(buffer), self._size)
        while self._position < end:
            began, before = time.monotonic(), self._position
            what = f"{self._what} at {before / 2**20:,.1f} of {self._size / 2**20:,.1f} MB"
            try:
                self._fetch(memoryview(buffer)[before - start : end - start])
            except Exception as error:
                why = passing(error)
                if why is None:
                    raise
                if self._position > before:
                    self._patience.succeeded()
                self._patience.failed(what, why, error, began, _seconds_asked(error))
            else:
                self._patience.succeeded()
        return max(0, end - start)

    def _fetch(self, buffer: memoryview) -> None:
        """Make one request for the next `len(buffer)` bytes. `_position` moves with every byte that comes."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        first, last = self._position, self._position + len(buffer) - 1
        # If the server compressed the answer, the range would count compressed bytes.
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self._url, headers=headers, timeout=REQUEST_TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            # A server that does not know ranges sends everything.
            to_pass_over = first if response.status_code == 200 else 0
            if response.status_code != 200:
                asked, came = f"bytes {first}-{last}/{self._size}", response.headers.get("content-range", "nothing")
                if asked != came:
                    raise ShortAnswer(f"{came} came where {asked} was asked for")
            filled = 0
            for chunk in response.iter_raw():
                if to_pass_over:
                    passed = min(to_pass_over, len(chunk))
                    chunk, to_pass_over = chunk[passed:], to_pass_over - passed
                taken = min(len(chunk), len(buffer) - filled)
                buffer[filled : filled + taken] = chunk[:taken]
                filled += taken
                self._position += taken
                if filled == len(buffer):
                    return
        raise ShortAnswer(f"{filled:,} bytes came where {len(buffer):,} were asked for")


def open_on_hub(url: str, patience: Patience | None = None) -> io.BufferedReader:
    """Open `hf://datasets/<repo>@<revision>/<path>` for reading."""
    place = url.removeprefix("hf://datasets/")
    repo, _, rest = place.partition("@")
    revision, _, path = rest.partition("/")
    return io.BufferedReader(RangeFile(repo, revision, path, patience), RANGE_BYTES)


def list_folder(repo: str, revision: str | None, folder: str, patience: Patience) -> Iterator[str]:
    """Yield the paths of the files in one folder of a dataset, in the Hub's order (by name), in pages of 1,000.

    This is the tree API of huggingface_hub 2.4 (hf_api.py, `_iter_repo_tree_pages`), whose own requests have no time
    limit. If a page fails, only that page is asked for again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    place = f"{repo}/tree/{urllib.parse.quote(revision or 'main', safe='')}"
    page: str | None = f"{HfApi().endpoint}/api/datasets/{place}" + (
        "/" + urllib.parse.quote(folder, safe="") if folder else ""
    )

    def ask(page: str) -> Any:
        response = get_session().get(page, headers=build_hf_headers(), timeout=REQUEST_TIMEOUT)
        hf_raise_for_status(response)
        return response

    while page is not None:
        answer = persistently(functools.partial(ask, page), f"{repo}: the list of {folder or 'its files'}", patience)
        for entry in answer.json():
            if entry["type"] == "file":
                yield entry["path"]
        page = answer.links.get("next", {}).get("url")
