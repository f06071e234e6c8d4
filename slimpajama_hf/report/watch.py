"""The report of a run that is on: a page on this machine alone that takes in what the ledger gains."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.record.columns import Reader
from slimpajama_hf.record.run_folder import GROWING, RunFolder
from slimpajama_hf.report import page

#: Where the page is looked for first; the next free port is taken where this one is not.
PORT = 8642
_PORTS_TRIED = 20

#: Seconds during which the content is not gathered again, however many pages ask.
FRESH_SECONDS = 1.0

#: Files whose growth means that there is something new.
_GROWING = ("ledger.jsonl", "run.json", *GROWING)


class Content:
    """The packed content of a growing run, gathered when it has grown; for several threads."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._reader = Reader(run.ledger)
        self._lock = threading.Lock()
        self._stamp: tuple[Any, ...] | None = None
        self._packed, self._tag, self._gathered = b"", "", 0.0
        self.meta: dict[str, Any] = {}
        self.get()

    def get(self) -> tuple[bytes, str]:
        """The packed content and its ETag. Raises UserError when the run is gone."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp and time.monotonic() - self._gathered >= FRESH_SECONDS:
                self._packed, self.meta = page.packed_content(self.run, self._reader)
                self._tag = f'"{hashlib.blake2b(self._packed, digest_size=12).hexdigest()}"'
                self._stamp, self._gathered = stamp, time.monotonic()
            return self._packed, self._tag

    def _stamp_now(self) -> tuple[Any, ...]:
        found: list[Any] = []
        for name in _GROWING:
            with contextlib.suppress(OSError):
                state = (self.run.path / name).stat()
                found.append((name, state.st_size, state.st_mtime_ns))
        return tuple(found)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # A page of the web that lets its own name lead here would ask under that name.
        if self.headers.get("Host", "") not in self.server.names:
            self._answer(403, "text/plain; charset=utf-8", b"this page is for this machine alone\n")
            return
        try:
            packed, tag = self.server.content.get()
        except Exception as error:
            self._answer(500, "text/plain; charset=utf-8", f"{type(error).__name__}: {error}\n".encode())
            return
        if self.path == "/data":
            if self.headers.get("If-None-Match") == tag:
                self._answer(304, None, b"", tag)
            else:
                self._answer(200, "application/octet-stream", packed, tag)
        elif self.path == "/":
            text = page.render(self.server.content.meta, None, watch=True)
            self._answer(200, "text/html; charset=utf-8", text.encode("utf-8"))
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there is / and /data\n")

    def _answer(self, status: int, kind: str | None, body: bytes, tag: str | None = None) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        if tag is not None:
            self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a line for every question would bury the address."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, content: Content) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.content = content
        self.names = {f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost")}


def serve(folder: Path, port: int | None, say: Callable[[str], None]) -> int:
    """Show the report of a run at 127.0.0.1 until Ctrl-C; returns the exit code, 130.

    `port` None: `PORT` or the next one that is free. Raises UserError when there is no run or no port.
    """
    content = Content(RunFolder(folder))
    server = _open(content, port)
    say(f"watching {folder}: http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        return 130
    finally:
        server.server_close()
    return 0


def _open(content: Content, port: int | None) -> _Server:
    wanted = [port] if port is not None else list(range(PORT, PORT + _PORTS_TRIED))
    for number in wanted:
        with contextlib.suppress(OSError):
            return _Server(number, content)
    raise UserError(
        f"--watch: port {wanted[0]} of 127.0.0.1 is taken"
        + ("; choose another with --port" if port is not None else f", and so are the {_PORTS_TRIED - 1} after it")
    )
