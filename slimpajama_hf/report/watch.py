"""The report of runs in progress: pages on this machine only, which add new rows of the ledgers.

`python -m slimpajama_hf report RUN... --watch` calls `serve`. A run with `--watch` starts
`python -m slimpajama_hf.report.watch RUN` as a `Child`. It answers `{"address": ...}` or `{"error": ...}` and ends when
its input or its parent ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from slimpajama_hf import child
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.report import machine, server
from slimpajama_hf.report.live import LiveRun


def serve(folders: Sequence[Path], port: int | None, say: Callable[[str], None]) -> int:
    """Show the report of runs at 127.0.0.1 until Ctrl-C; returns the exit code, 130.

    `port` None: `server.PORT` or the next free one. Raises UserError if there is no run or no free port.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("--watch: the same folder is named twice; name each run once")
    runs = follow(folders)
    for run in runs:
        run.look()
        run.gather()
    what = str(folders[0]) if len(folders) == 1 else f"{len(folders)} runs"
    step_aside()
    try:
        asyncio.run(
            server.serve(
                runs, port, lambda address: say(f"watching {what}: {address} (Ctrl-C ends it)"), asyncio.Event().wait
            )
        )
    except KeyboardInterrupt:
        return 130
    return 0


def follow(folders: Sequence[Path]) -> list[LiveRun]:
    """The runs in some folders. Each is named by the last parts of its path that distinguish it from the others."""
    gpus = machine.Gpus()
    parts = [folder.resolve().parts for folder in folders]
    count = 1
    while len({each[-count:] for each in parts}) < len(parts):
        count += 1
    return [
        LiveRun(RunFolder(folder), "/".join(each[-count:]), gpus) for folder, each in zip(folders, parts, strict=True)
    ]


def step_aside() -> None:
    """Let training go first: at `nice` 10 a thread gets a tenth of the time of one at 0.

    `priority.stand_back` would be too much: with all cores busy, a page would wait for seconds.
    """
    if hasattr(os, "nice"):
        os.nice(10)


def main(folder: str) -> None:
    """Serve the page of one run beside its training, until the input ends."""
    child.begin()
    step_aside()

    async def input_ends() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def wait() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=wait, daemon=True).start()
        await ended.wait()

    try:
        asyncio.run(
            server.serve(follow([Path(folder)]), None, lambda address: child.answer({"address": address}), input_ends)
        )
    except UserError as error:
        child.answer({"error": str(error)})


if __name__ == "__main__":
    main(sys.argv[1])
