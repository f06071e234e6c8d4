"""`push RUN`: upload checkpoints that were not pushed, now and in the foreground."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.screen import format_bytes

if TYPE_CHECKING:
    from slimpajama_hf.hub import account
    from slimpajama_hf.hub.upload_process import Pusher


HELP = "push the newest checkpoint to the Hub, or finish what was not pushed"


def main(options: argparse.Namespace) -> int:
    """Push the newest checkpoint and all that wait. Raises UserError when the Hub refuses or does not come back."""
    from slimpajama_hf.hub import account
    from slimpajama_hf.hub.outbox import Outbox
    from slimpajama_hf.hub.upload_process import Pusher, quiet_and_bounded
    from slimpajama_hf.record import checkpoints, ownership, run_folder
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.settings.yaml_file import read_config

    folder = RunFolder(Path(options.run).expanduser())
    record = folder.read_record()
    run_folder.refuse_links(folder)
    config: dict[str, Any] = {}
    before = Outbox(folder.path).pushed()
    if not ownership.is_own(folder):
        # The record of a push in this folder was written by somebody else.
        before = before if before.get("repo") == options.hub_model_id else {}
        if options.hub_model_id is None:
            raise UserError(
                f"{folder.path}: this run was begun elsewhere, or before this program marked whose a run is; say where "
                "it goes, with --hub_model_id me/run"
            )
    elif folder.config.is_file():
        config = read_config(str(folder.config))

    def chosen(name: str, default: Any = None) -> Any:
        typed = getattr(options, name)
        return typed if typed is not None else config.get(name, default)

    outbox = Outbox(folder.path)
    quiet_and_bounded()
    destination = account.resolve(
        chosen("hub_model_id") or before.get("repo") or folder.path.resolve().name,
        None,
        private=chosen("hub_private_repo"),
        revision=chosen("hub_revision"),
        strategy=chosen("hub_strategy", "checkpoint"),
        license=chosen("hub_license"),
    )
    with outbox.lock() as held:
        if not held:
            raise UserError(f"{folder.path}: a run is on in this folder and pushes by itself; wait for its end")
        newest, complaints = checkpoints.newest_good(folder.path)
        for complaint in complaints:
            screen.say(f"passed over: {complaint}")
        if newest is not None and not _is_there(before, record["run_id"], destination, newest):
            outbox.add(newest)
        if not outbox.waiting():
            if not before:
                raise UserError(f"{folder.path}: no checkpoint to push; expected a run that saved one")
            sys.stdout.write(f"{before['url']} has step {before['step']:,} already (commit {before['commit'][:12]})\n")
            return 0
        _push_all(Pusher(folder.path, destination, _Screen()), options.hub_patience)
    pushed = outbox.pushed()
    sys.stdout.write(f"{pushed['url']}, step {pushed['step']:,} (commit {pushed['commit'][:12]})\n")
    return 0


def _is_there(pushed: dict[str, Any], run_id: str, destination: account.Destination, newest: Path) -> bool:
    """Whether the Hub already has this checkpoint of this run, as it would be pushed now."""
    wanted = (run_id, destination.repo, destination.revision, destination.with_state, newest.name)
    return wanted == (
        pushed.get("run_id"), pushed.get("repo"), pushed.get("revision"), pushed.get("with_state"),
        f"checkpoint-{pushed.get('step')}",
    )  # fmt: skip


class _Screen:
    """Shows the events of a push and keeps its last failure."""

    def __init__(self) -> None:
        self.failure: dict[str, Any] | None = None
        self.dropped: str | None = None
        self.waiting: screen.Waiting | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "begun":
            if self.waiting is not None:
                self.waiting(f"pushing step {event['step']:,}, {format_bytes(event['bytes'])}")
            for trouble in event["trouble"]:
                screen.say(f"pushed without {trouble}")
        elif event["event"] == "failed":
            self.failure = event
            if self.waiting is not None:
                self.waiting(f"{event['why']}; the next try in {event['pause']:.0f} s")
        elif event["event"] == "pushed":
            self.failure = None
        elif event["event"] == "dropped":
            self.dropped = event["why"]


def _push_all(pusher: Pusher, patience_seconds: float) -> None:
    told: Any = pusher.tell
    failing_since: float | None = None
    with screen.Waiting("getting ready to push") as waiting:
        told.waiting = waiting
        while pusher.outbox.waiting():
            pusher.push_next()
            if told.failure is None:
                failing_since = None
                continue
            now = time.monotonic()
            failing_since = failing_since or now
            pause = pusher.next_try - now
            if told.failure["refused"] or now + pause - failing_since > patience_seconds:
                raise UserError(
                    f"not pushed to {pusher.destination.repo}: {told.failure['why']}; it waits in "
                    f"{pusher.outbox.path}: type the same again when that is mended"
                )
            time.sleep(max(pause, 0.0))
    if told.dropped is not None:
        raise UserError(f"not pushed: {told.dropped}; go on with the run, and its next checkpoint can be")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `push`."""
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--hub_model_id", metavar="OWNER/NAME", help="repository to push to; default: that of the run")
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="make a private repository")
    parser.add_argument("--hub_revision", metavar="BRANCH", help="branch; default: as the run, else main")
    parser.add_argument("--hub_strategy", choices=("checkpoint", "every_save"), help="with what resuming needs, or not")
    parser.add_argument("--hub_license", metavar="LICENCE", help="licence on the card; default: none is stated")
    parser.add_argument("--hub_patience", type=float, default=600.0, help="seconds to wait for a Hub that fails [600]")
