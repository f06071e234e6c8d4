"""`views`: make metrics, samples and chart again from the ledger."""

from __future__ import annotations

import argparse

HELP = "make metrics, samples and chart again from the ledger"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `views`."""
    parser.add_argument("run", help="a run folder")


def main(options: argparse.Namespace) -> int:
    from slimpajama_hf.views import views

    return views.main(options.run)
