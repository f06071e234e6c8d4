"""`compare RUN RUN...`: show runs side by side (`lookback/comparison.py` reads them)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slimpajama_hf import files, terminal
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.screen import Waiting

if TYPE_CHECKING:
    from rich.console import Console

    from slimpajama_hf.lookback.comparison import Comparison


HELP = "runs side by side: a table by step, tokens and time, and a chart with --output FILE.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `compare`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="two or more run folders")
    parser.add_argument("--output", metavar="FILE.png", help="draw a chart too, into this file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(drawn: Console, comparison: Comparison) -> None:
    """Print the table, in pieces if it is too narrow for all runs, and where runs part."""
    from rich.text import Text

    from slimpajama_hf.lookback.comparison import WINDOW, lines_of

    lines = lines_of(comparison)
    names = [terminal.visible(course.name, line_ends=False) for course in comparison.courses]
    widths = [max(len(name), *(len(texts[i]) for _, texts, _ in lines)) + 2 for i, name in enumerate(names)]
    room = drawn.width - max(len(title) for title, _, _ in lines) - 2
    first = 0
    while first < len(names):
        last = first + 1
        while last < len(names) and sum(widths[first : last + 1]) <= room:
            last += 1
        if first:
            drawn.print()
        right = {"justify": "right", "overflow": "fold"}
        table = terminal.grid(
            {"header": "", "no_wrap": True}, *({"header": name, **right} for name in names[first:last])
        )
        for title, texts, best in lines:
            shown = [Text(texts[i], "bold" if i == best else "") for i in range(first, last)]
            table.add_row(Text(title, "dim"), *shown)
        drawn.print(table)
        first = last
    bold = "bold: the best" if comparison.are_as_long else "bold: the best, only where runs are as long as each other"
    drawn.print(
        Text(f"losses and accuracy: mean of the last {WINDOW} steps, or of all where there are fewer; {bold}", "dim")
    )
    for parting in comparison.partings:
        drawn.print(Text(terminal.visible(parting.words(), line_ends=False)))


def main(options: argparse.Namespace) -> int:
    """Run `compare RUN RUN...`. Returns the exit code."""
    from slimpajama_hf.lookback.comparison import compare
    from slimpajama_hf.lookback.comparison_chart import render

    output = options.output
    if output is not None and not output.endswith(".png"):
        raise UsageError(f"--output {output}: expected a name that ends with .png")
    with Waiting("reading the ledgers") as waiting:
        comparison = compare(options.runs)
        if output is not None:
            waiting("drawing the chart")
            try:
                files.write_whole(Path(output), render(comparison))
            except OSError as error:
                raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another file") from None
    if options.json:
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
        return 0
    show(terminal.console(), comparison)
    sys.stderr.write(f"{output}\n" if output is not None else "add --output FILE.png to draw it as a chart too\n")
    return 0
