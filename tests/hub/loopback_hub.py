"""A read-only stand-in for the Hub's HTTP API on loopback: dataset info, file lists, files by range.

Only what `huggingface_hub` 2.4 and `datasets` 5.2 ask for while a dataset is streamed. Every request is logged as
"METHOD path -> status"; `refuse` maps a part of a path to the status that it gets; `faults` break single answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = 1000


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests whose path holds `part`: the first `times` of them, or all for `seconds`."""

    part: str
    status: int | None = None
    """Answer with this status."""
    how: str = ""
    """Or: `reset` after half of the body, `short` (a close after half of it), `stall` (no answer while `seconds`)."""
    times: int | None = None
    seconds: float | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    method: str = "GET"
    met: int = 0
    since: float | None = None

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is broken; counts it."""
        if self.part not in path or method != self.method:
            return False
        self.since = self.since or time.monotonic()
        if self.times is not None and self.met >= self.times:
            return False
        if self.seconds is not None and time.monotonic() - self.since > self.seconds:
            return False
        self.met += 1
        return True


class LoopbackHub(ThreadingHTTPServer):
    """Serves `datasets[repo_id]`, a folder each, at any revision. Use as a context manager."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page = PAGE
        self.datasets: dict[str, Path] = {}
        self.refuse: dict[str, int] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.released = threading.Event()
        """Set at the end: requests that stall are let go."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        # Looks every 0.05 s whether it is to end; 0.5 s, the default, would be most of the time of a test.
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def commit_of(self, revision: str) -> str:
        """A full commit id stays itself; a branch has one of its own."""
        return revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub
    broken = ""

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.server.log.append(f"{self.command} {self.path} -> {status}")
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.broken:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if self.broken == "reset":
                    # Closing with a linger of 0 s sends RST.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                self.close_connection = True
                return
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _missing(self, code: str, status: int = 404) -> None:
        self._send(
            status, b'{"error":"not found"}', {"X-Error-Code": code, "X-Repo-Commit": self.server.commit_of("main")}
        )

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        self.broken = ""
        for fault in self.server.faults:
            if not fault.strikes(self.command, path):
                continue
            if fault.status is not None:
                self._send(fault.status, b'{"error":"fault"}', fault.headers)
                return
            if fault.how == "stall":
                self.server.log.append(f"{self.command} {self.path} -> stall")
                self.server.released.wait(fault.seconds)
                self.close_connection = True
                return
            self.broken = fault.how
            break
        for part, status in self.server.refuse.items():
            if part in path:
                self._send(status, b'{"error":"refused"}', {"X-Error-Code": "RepoNotFound"} if status == 401 else {})
                return
        for repo, folder in self.server.datasets.items():
            if match := re.fullmatch(rf"/api/datasets/{re.escape(repo)}(?:/revision/([^/]+))?", path):
                names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
                self._json(
                    {
                        "id": repo,
                        "sha": self.server.commit_of(match.group(1) or "main"),
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "siblings": [{"rfilename": name} for name in names],
                    }
                )
                return
            if match := re.fullmatch(rf"/api/datasets/{re.escape(repo)}/tree/([^/]+)/?(.*)", path):
                self._tree(folder, match.group(2), query)
                return
            if re.fullmatch(rf"/api/datasets/{re.escape(repo)}/paths-info/[^/]+", path):
                wanted = (
                    json.loads(body)["paths"]
                    if body.startswith(b"{")
                    else urllib.parse.parse_qs(body.decode()).get("paths", [])
                )
                self._json([_entry(folder, folder / name) for name in wanted if (folder / name).exists()])
                return
            if match := re.fullmatch(rf"/datasets/{re.escape(repo)}/resolve/([^/]+)/(.+)", path):
                self._file(folder / match.group(2), match.group(1))
                return
        self._missing("RepoNotFound", 401)

    def _tree(self, folder: Path, under: str, query: dict[str, list[str]]) -> None:
        place = folder / under
        if not place.is_dir():
            self._missing("EntryNotFound")
            return
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted(place.rglob("*") if recursive else place.iterdir(), key=str)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.server.page < len(found):
            headers["Link"] = (
                f'<{self.server.url}{urllib.parse.urlsplit(self.path).path}?cursor={start + self.server.page}>; rel="next"'
            )
        self._json([_entry(folder, path) for path in found[start : start + self.server.page]], headers)

    def _file(self, path: Path, revision: str) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        data = path.read_bytes()
        headers = {
            "X-Repo-Commit": self.server.commit_of(revision),
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match.group(1)), int(match.group(2) or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            self._send(206, data[first : last + 1], headers)
        else:
            self._send(200, data, headers)


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    return {
        "type": "file",
        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        "size": path.stat().st_size,
        "path": name,
    }
