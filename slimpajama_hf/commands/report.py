"""`report`: write one HTML file about a run, or an animation of it, or serve pages that follow several runs."""

from __future__ import annotations

import argparse
import sys

from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings.arguments import positive

HELP = "one HTML file that shows everything about a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; with --watch several, side by side")
    parser.add_argument(
        "--watch", action="store_true", help="show it in a browser as the run goes on (127.0.0.1 alone)"
    )
    parser.add_argument("--animate", action="store_true", help="an animation of the run instead, RUN/training.gif")
    parser.add_argument("--port", type=positive, help="with --watch: the port; default: 8642, or the next that is free")


def main(options: argparse.Namespace) -> int:
    from pathlib import Path

    from slimpajama_hf import screen
    from slimpajama_hf.report import write

    if options.port is not None and not options.watch:
        raise UsageError("--port: it belongs to --watch; add that, or leave it out")
    if options.animate and options.watch:
        raise UsageError("--animate and --watch: one or the other")
    folders = [Path(run).expanduser() for run in options.runs]
    if options.watch:
        from slimpajama_hf.report import watch

        return watch.serve(folders, options.port, screen.say)
    for folder in folders:
        if options.animate:
            from slimpajama_hf.views import animation

            with screen.Waiting("drawing"):
                path = animation.write(folder)
        else:
            path = write(folder)
        sys.stdout.write(f"{path}\n")
    return 0
