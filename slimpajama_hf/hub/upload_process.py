"""Pushes are made by a process of their own, so that no step waits for the Hub, whatever the Hub does.

Run as `python -m slimpajama_hf.hub.upload_process RUN`. It reads one JSON object per line: first the destination (the
fields of `account.Destination`, because the token must be neither in the command nor in the environment), then
`{"wake": true}` when a checkpoint was put into the outbox, and `{"finish": true}` at the end of training. It writes
one object per event: `{"event": "begun", "step", "bytes", "trouble"}`,
`{"event": "pushed", "step", "commit", "url", "seconds", "bytes"}`,
`{"event": "failed", "step", "why", "refused", "pause"}`, `{"event": "dropped", "step", "why"}`, `{"event": "idle"}`. It
ends when its input ends, so it never outlives its run. What was not pushed stays in the outbox.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slimpajama_hf import child, priority
from slimpajama_hf.corpus import hub_files
from slimpajama_hf.hub import staging
from slimpajama_hf.hub.account import Destination, why
from slimpajama_hf.hub.outbox import Gone, Outbox
from slimpajama_hf.record import checkpoints, run_folder
from slimpajama_hf.record.run_folder import RunFolder

#: Longest pause between two tries: 1, 2, 4 ... s, with jitter, up to this.
LONGEST_PAUSE_SECONDS = 300.0
#: A server may ask for more (`Retry-After`), up to this.
LONGEST_PAUSE_ASKED_SECONDS = 3600.0

#: Seconds without progress after which a request has failed. The client of huggingface_hub would wait for ever.
CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 120.0

Tell = Callable[[dict[str, Any]], None]


class Pusher:
    """Pushes what waits in an outbox, one checkpoint after the other, and counts its failures in a row."""

    def __init__(self, run: Path, destination: Destination, tell: Tell) -> None:
        self.run = RunFolder(run.resolve())
        self.outbox = Outbox(self.run.path, destination.most)
        self.destination = destination
        self.tell = tell
        self._repo: str | None = None
        self._failures = 0
        # Its own generator: nothing else should depend on these draws.
        self._draw = random.Random()
        self.next_try = 0.0
        """Time before which there is no further try (`time.monotonic`)."""
        self.left_alone = False
        """Whether the server asked for the pause."""

    def knock(self) -> None:
        """Open the repository, so that a refusal of the Hub is known before the first checkpoint. Never raises."""
        try:
            self._open_repo()
        except Exception as error:
            self._failed(None, error)

    def push_next(self) -> bool:
        """Push the next checkpoint that waits; False if none does. A failure is reported and moves `next_try`."""
        step = None
        try:
            claimed = self.outbox.claim()
            if claimed is None:
                self.tell({"event": "idle"})
                return False
            step, folder = claimed
            self._push(step, folder)
            self._failures, self.next_try = 0, 0.0
        except Gone:
            # Nobody misses that checkpoint: a newer one is there or coming.
            pass
        except staging.NotOfThisRun as error:
            self.outbox.drop(step or 0)
            self.tell({"event": "dropped", "step": step, "why": str(error)})
        except Exception as error:
            if step is not None:
                self.outbox.give_back(step)
            self._failed(step, error)
        return True

    def _push(self, step: int, folder: Path) -> None:
        began = time.monotonic()
        # Somebody else may have put this into the outbox: only whole files of a checkpoint are uploaded.
        wrong = checkpoints.problem(folder)
        if wrong is not None:
            raise staging.NotOfThisRun(f"checkpoint-{step}: {wrong}")
        run_folder.refuse_links(self.run)
        repo = self._open_repo()
        push = staging.prepare(
            folder, self.run, folder / "_push", repo, self.destination.with_state, self.destination.license
        )
        self.tell({"event": "begun", "step": step, "bytes": push.bytes, "trouble": push.trouble})
        commit = _commit(repo, push, self.destination)
        shutil.rmtree(folder / "_push", ignore_errors=True)
        pushed = {
            "run_id": push.run_id, "repo": repo, "revision": self.destination.revision, "step": step,
            "commit": commit.oid, "url": commit.repo_url.url if commit.repo_url else "", "chain": push.chain,
            "with_state": self.destination.with_state, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }  # fmt: skip
        self.outbox.done(step, pushed)
        self.tell({"event": "pushed", "seconds": time.monotonic() - began, "bytes": push.bytes, **pushed})

    def _open_repo(self) -> str:
        """Return `owner/name` of the repository, which is made if it is missing."""
        if self._repo is None:
            from huggingface_hub import HfApi

            where = self.destination
            api = HfApi(token=where.token)
            made = api.create_repo(where.repo, private=where.private, exist_ok=True)
            if where.revision is not None:
                api.create_branch(made.repo_id, branch=where.revision, exist_ok=True)
            self._repo = made.repo_id
        return self._repo

    def _failed(self, step: int | None, error: Exception) -> None:
        self._failures += 1
        pause = min(2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE_SECONDS) * self._draw.uniform(0.75, 1.0)
        asked = hub_files._seconds_asked(error)
        if asked is not None:
            pause = max(pause, min(asked, LONGEST_PAUSE_ASKED_SECONDS))
        self.next_try, self.left_alone = time.monotonic() + pause, asked is not None
        status = hub_files.status_of(error)
        refused = status is not None and hub_files.passing(error) is None
        self.tell({"event": "failed", "step": step, "why": why(error), "refused": refused, "pause": round(pause, 1)})


def _commit(repo: str, push: staging.Push, destination: Destination) -> Any:
    """Make one commit of everything. Files that the Hub already has are not sent again (LFS, by their hash)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=destination.token)
    there = api.list_repo_files(repo, revision=destination.revision)
    stale = [name for name in there if name not in push.paths and _is_ours(name)]
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in push.paths.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(
        repo,
        operations,
        commit_message=f"Step {push.step:,}",
        commit_description=f"run {push.run_id}, ledger {push.chain}",
        revision=destination.revision,
    )


def _is_ours(name: str) -> bool:
    import fnmatch

    return any(fnmatch.fnmatch(name, pattern) and ("/" in pattern or "/" not in name) for pattern in staging.OURS)


def quiet_and_bounded() -> None:
    """Set up a process that pushes: libraries show no bars and no warnings, and no request waits for ever."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars, logging
    from huggingface_hub.utils._http import default_client_factory

    logging.set_verbosity_error()
    disable_progress_bars()

    def bounded() -> Any:
        client = default_client_factory()
        client.timeout = type(client.timeout)(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        return client

    set_client_factory(bounded)


def serve(run: str, lines: Iterable[str], tell: Tell) -> None:
    """Push until the input ends."""
    child.begin()
    priority.stand_back()
    inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            inbox.put(json.loads(line))
        # Training is over or dead. A push that is cut short here loses nothing: the checkpoint is still in the outbox,
        # and what the Hub already has of it is not sent again.
        os._exit(0)

    threading.Thread(target=read, name="inbox", daemon=True).start()
    first = inbox.get()
    assert first is not None
    destination = Destination(**first)
    quiet_and_bounded()
    with Outbox(Path(run).resolve()).lock() as held:
        if not held:
            tell({"event": "failed", "step": None, "why": "another process pushes from this folder", "refused": True,
                  "pause": 0.0})  # fmt: skip
            while True:
                inbox.get()
        pusher = Pusher(Path(run), destination, tell)
        pusher.knock()
        _push_for_ever(pusher, inbox)


def _push_for_ever(pusher: Pusher, inbox: queue.Queue[dict[str, Any] | None]) -> None:
    while True:
        left = pusher.next_try - time.monotonic()
        if left <= 0 and pusher.outbox.waiting():
            pusher.push_next()
            continue
        try:
            message = inbox.get(timeout=left if left > 0 and pusher.outbox.waiting() else None) or {}
        except queue.Empty:
            continue
        if message.get("finish"):
            # Training does not need the processor any more.
            priority.come_forward(os.getpid())
            if not pusher.outbox.waiting():
                pusher.tell({"event": "idle"})
            elif not pusher.left_alone:
                # Try again now, because somebody is waiting.
                pusher.next_try = 0.0


def fields(destination: Destination) -> dict[str, Any]:
    """The fields of a destination, for the first line of the input."""
    return dataclasses.asdict(destination)


if __name__ == "__main__":
    serve(sys.argv[1], sys.stdin, child.answer)
