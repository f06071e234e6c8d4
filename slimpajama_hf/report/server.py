"""Serves the live page over HTTP to this machine only: pages, packed content, and server-sent events.

It uses Starlette on uvicorn, not `http.server`, where each open page would hold a thread for its events, also after it
stopped reading, and half-sent requests would need limits of our own. Here a connection costs a few kilobytes, and a
page that does not read blocks no other.

A request must be a GET with the token from the address, from a page of this server. Refused are other hosts (a site
whose name was made to resolve to this machine), other origins (another site in the same browser) and other methods. No
address is a path on the disk: runs have numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from slimpajama_hf.errors import UserError
from slimpajama_hf.report import page, pages, several
from slimpajama_hf.report.live import LiveRun

#: Only programs on this machine can open the page.
ADDRESS = "127.0.0.1"

#: The first port to try; if it is taken, the next ones are tried.
PORT = 8642
PORTS_TRIED = 20

#: Seconds between two looks at the ledgers while a page is open. If looking takes long, up to the second number.
SECONDS_BETWEEN_LOOKS, MOST_SECONDS_BETWEEN_LOOKS = 0.5, 1.5
#: The share of a core that looking may use within that limit.
LOOKING = 0.02

#: After so many seconds without news an event stream sends a comment; only writing shows that a page is gone.
HEARTBEAT_SECONDS = 10.0
_SIGN_OF_LIFE = ": still here\n\n"

#: Maximum number of connections; a browser uses up to six per page.
MOST_CONNECTIONS = 256

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def listen(port: int | None) -> socket.socket:
    """A socket on this machine only, at `port` (None: `PORT` or the next free one). Raises UserError."""
    wanted = [port] if port is not None else list(range(PORT, PORT + PORTS_TRIED))
    for number in wanted:
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((ADDRESS, number))
            found.listen(MOST_CONNECTIONS)
            return found
        except OSError:
            found.close()
    raise UserError(
        f"--watch: port {wanted[0]} of {ADDRESS} is taken"
        + ("; choose another with --port" if port is not None else f", and so are the {PORTS_TRIED - 1} after it")
    )


class Gate:
    """Lets requests with the token from pages of this server through, and refuses all others with a sentence."""

    def __init__(self, inside: Any, port: int, token: str) -> None:
        self._inside, self._token = inside, token.encode()
        self._hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inside(scope, receive, send)
        elif scope["type"] == "http":
            refusal = self._refusal(scope)
            await (refusal or self._inside)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if scope["method"] != "GET":
            return _refuse(405, "only GET: this page changes nothing", Allow="GET")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return _refuse(403, "this page is for this machine alone: open it as http://127.0.0.1:PORT/TOKEN/")
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{hosts[0]}":
            return _refuse(403, "another page may not read this one")
        # A clicked link may come from any site: the page that it opens is the user's own.
        clicked = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not clicked:
            return _refuse(403, "another page may not read this one")
        given = scope["path"].split("/")[1].encode("utf-8", "surrogatepass")
        if not secrets.compare_digest(given, self._token):
            return _refuse(403, "no token, or another one: open the address that the program printed")
        return None


def _refuse(status: int, words: str, **headers: str) -> Response:
    return PlainTextResponse(f"{words}\n", status, headers=_HEADERS | headers)


class LivePages:
    """The pages of some runs. `over`: set when the program ends; the pages are told."""

    def __init__(self, runs: Sequence[LiveRun]) -> None:
        self.runs = runs
        self.over = asyncio.Event()
        self._changed = asyncio.Condition()
        self._version = 0
        self._open = 0
        """How many event streams are open. Without any, the ledgers are not read."""
        self._somebody = asyncio.Event()

    def app(self, port: int, token: str) -> Gate:
        """The application behind its gate."""
        routes = [
            Route("/{token}/", self._front),
            Route("/{token}/events", self._events_of_all),
            Route("/{token}/run/{number:int}/", self._page),
            Route("/{token}/run/{number:int}/data", self._data),
            Route("/{token}/run/{number:int}/events", self._events_of_one),
        ]

        async def in_words(request: Request, error: Exception) -> Response:
            status = error.status_code if isinstance(error, HTTPException) else 500
            words = "there is no such page" if status == 404 else f"{type(error).__name__}: {error}"
            return PlainTextResponse(f"{words}\n", status, headers=_HEADERS)

        handlers: Any = {HTTPException: in_words, UserError: in_words}
        return Gate(Starlette(routes=routes, exception_handlers=handlers), port, token)

    def end(self) -> None:
        """Tell the pages that the program ends."""
        self.over.set()
        self._somebody.set()

    # ---- requests ----

    def _run(self, request: Request) -> LiveRun:
        number = request.path_params["number"]
        if number >= len(self.runs):
            raise HTTPException(404)
        return self.runs[number]

    async def _front(self, request: Request) -> Response:
        if len(self.runs) == 1:
            return RedirectResponse("run/0/", headers=_HEADERS)
        found = await asyncio.to_thread(several.differences, self.runs)
        return HTMLResponse(pages.several_runs([run.name for run in self.runs], found), headers=_HEADERS)

    async def _page(self, request: Request) -> Response:
        run = self._run(request)
        await self._gather(run)
        meta = run.whole.meta if run.whole is not None else pages.waiting(run.name)
        watch = "yes" if len(self.runs) == 1 else "several"
        return HTMLResponse(page.render(meta, None, watch), headers=_HEADERS)

    async def _data(self, request: Request) -> Response:
        run = self._run(request)
        await self._gather(run)
        whole = run.whole
        if whole is None:
            return Response(status_code=204, headers=_HEADERS)
        tag = f'"{whole.tag}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=_HEADERS | {"ETag": tag})
        return Response(whole.packed, media_type="application/octet-stream", headers=_HEADERS | {"ETag": tag})

    async def _gather(self, run: LiveRun) -> None:
        """Gather the content of a run again if it is due."""
        await asyncio.to_thread(run.look)
        if run.is_due():
            # The error is in the state of the run.
            with contextlib.suppress(Exception):
                await asyncio.to_thread(run.gather)

    async def _events_of_one(self, request: Request) -> Response:
        run = self._run(request)
        # GENERATION-STEPS: from the browser after a broken connection, or from the page at first.
        given = request.headers.get("last-event-id") or request.query_params.get("from", "")
        return self._stream(self._news_of(run, given))

    async def _events_of_all(self, request: Request) -> Response:
        return self._stream(self._news_of_all())

    @staticmethod
    def _stream(news: AsyncIterator[str]) -> Response:
        return StreamingResponse(news, media_type="text/event-stream", headers=_HEADERS)

    # ---- news: each stream knows what it has sent ----

    async def _news_of(self, run: LiveRun, given: str) -> AsyncIterator[str]:
        generation, _, steps = given.partition("-")
        have = (int(generation), int(steps)) if generation.isdecimal() and steps.isdecimal() else None
        tag = ""
        async for changed in self._each_change():
            if not changed:
                yield _SIGN_OF_LIFE
                continue
            whole, rows = run.whole, run.rows
            yield _event("state", run.state)
            if whole is None:
                continue
            if have is None or have[0] != run.generation or whole.kind != run.kind:
                # The page has rows of another ledger or of another kind: it must fetch everything.
                have = None
            elif have[1] < len(rows):
                found = await asyncio.to_thread(run.rows_from, have[1])
                have = (have[0], found["to"])
                yield _event("rows", found, f"{have[0]}-{have[1]}")
            if whole.tag != tag and (have is None or tag):
                yield _event("content", {"tag": whole.tag})
            tag = whole.tag
        yield _event("over", {})

    async def _news_of_all(self) -> AsyncIterator[str]:
        async for changed in self._each_change():
            yield _event("runs", await asyncio.to_thread(several.together, self.runs)) if changed else _SIGN_OF_LIFE

    async def _each_change(self) -> AsyncIterator[bool]:
        """True at once, after each change, and at the end; False after a long time without a change."""
        self._open += 1
        self._somebody.set()
        try:
            seen = -1
            while True:
                changed, seen = self._version != seen, self._version
                yield changed
                if self.over.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._after(seen), HEARTBEAT_SECONDS)
        finally:
            self._open -= 1
            if not self._open:
                self._somebody.clear()

    async def _after(self, seen: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._version != seen or self.over.is_set())

    # ---- reading the ledgers ----

    async def follow(self) -> None:
        """Read the ledgers while a page is open, until `over` is set."""
        gathering: asyncio.Task[None] | None = None
        told: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        while not self.over.is_set():
            await self._somebody.wait()
            start = loop.time()
            for run in self.runs:
                await asyncio.to_thread(run.look)
            if gathering is None or gathering.done():
                gathering = asyncio.create_task(self._gather_due())
            took = loop.time() - start
            # Requests for pages read the ledgers too, so this compares with what was last told.
            states = [run.state for run in self.runs]
            if states != told:
                told = states
                await self._tell()
            pause = min(max(SECONDS_BETWEEN_LOOKS, took / LOOKING), MOST_SECONDS_BETWEEN_LOOKS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.over.wait(), pause)
        await self._tell()

    async def _gather_due(self) -> None:
        for run in self.runs:
            if run.is_due():
                # The error is in the state of the run.
                with contextlib.suppress(Exception):
                    await asyncio.to_thread(run.gather)
                await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()


def _event(name: str, data: Any, number: str | None = None) -> str:
    head = f"id: {number}\n" if number is not None else ""
    return f"event: {name}\n{head}data: {json.dumps(data)}\n\n"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the program that serves."""
        yield


async def serve(
    runs: Sequence[LiveRun], port: int | None, say: Callable[[str], None], until: Callable[[], Awaitable[Any]]
) -> None:
    """Serve the pages of some runs until `until()` returns. Calls `say(address)` when they can be opened.

    Raises UserError if there is no free port.
    """
    token = secrets.token_urlsafe(16)
    listening = listen(port)
    number = listening.getsockname()[1]
    live = LivePages(runs)
    configuration = uvicorn.Config(
        live.app(number, token),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = _Server(configuration)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    following = asyncio.create_task(live.follow())
    say(f"http://{ADDRESS}:{number}/{token}/")
    try:
        await until()
    finally:
        live.end()
        await following
        server.should_exit = True
        await serving
