"""`verify`: prove that a run is what its ledger says, or that two runs are the same."""

from __future__ import annotations

import argparse
import json
import sys

from slimpajama_hf.errors import UsageError

HELP = "prove that a run is what its ledger says, or that two are the same"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `verify`."""
    parser.add_argument("run", help="a run folder")
    parser.add_argument("other", nargs="?", help="a second run folder: are the two the same run?")
    parser.add_argument(
        "--replay", metavar="A:B", help="train steps A to B-1 again from the nearest checkpoint, compare bit by bit"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    from slimpajama_hf.lookback import checks, replay, side_by_side
    from slimpajama_hf.screen import Waiting

    if options.replay is not None:
        if options.other is not None:
            raise UsageError("--replay: of one run; leave the second folder out")
        # No Waiting here, because the training that this starts shows its own progress.
        report = replay.replay(options.run, *replay.parse_range(options.replay))
    else:
        with Waiting("reading the ledger and the checkpoints"):
            report = side_by_side.compare(options.run, options.other) if options.other else checks.verify(options.run)
    text = json.dumps(report.data, indent=1) if options.json else "\n".join(report.lines)
    sys.stdout.write(text + "\n")
    return 0 if report.ok else 1
