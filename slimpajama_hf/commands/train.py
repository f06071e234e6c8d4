"""`train`: the program `run_clm_slimpajama.py` under another name."""

from __future__ import annotations

import argparse

HELP = "train; the same program as run_clm_slimpajama.py, with the same flags"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags are those of the training program, which has its own parser."""
    parser.usage = "slimpajama-hf train [flags of run_clm_slimpajama.py]"


def main(argv: list[str]) -> int:
    import run_clm_slimpajama

    return run_clm_slimpajama.main(argv)
