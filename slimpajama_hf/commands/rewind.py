"""`rewind RUN --to N --drop STEP`: show what one document did (`lookback/rewind.py` finds it out)."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimpajama_hf import palette, terminal
from slimpajama_hf.settings.arguments import positive

if TYPE_CHECKING:
    from rich.console import Console

    from slimpajama_hf.lookback.rewind import Change, Rewound


HELP = "the run again from a checkpoint, without one document: what it did"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `rewind`."""
    parser.add_argument("run", help="a run folder")
    parser.add_argument(
        "--to", type=int, metavar="N", help="begin at the nearest checkpoint at or before step N [STEP]"
    )
    parser.add_argument("--drop", type=int, metavar="STEP", help="leave the document of this step out; default: none")
    parser.add_argument("--steps", type=positive, metavar="K", help="steps after it; default: all that the run has")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the new run; default: beside the old one")
    parser.add_argument("--json", action="store_true", help="print JSON")


#: How many documents are shown, of those whose loss changed most.
SHOWN = 10


# ---- showing ----


def show(drawn: Console, found: Rewound) -> None:
    """Print what was done, and what came of it."""
    from rich.text import Text

    for line in _words(found):
        drawn.print(Text(terminal.visible(line, line_ends=False)))
    if found.changes:
        drawn.print()
        drawn.print(Text("loss without it less loss with it, nats per token (above 0: it had helped)", "bold"))
        _show_groups(drawn, found)
        _show_documents(drawn, found)
    for note in found.notes:
        drawn.print(Text(f"note: {note}", "italic"))


def _words(found: Rewound) -> list[str]:
    from slimpajama_hf.lookback import side_by_side

    begin = f"checkpoint-{found.start}" if found.start else "the very start"
    lines = [f"{found.output_dir}: {found.run} again from {begin}, {found.end - found.start:,} steps"]
    if found.parted:
        step, fields = found.parted[0]
        more = f"; {len(found.parted) - 1:,} more steps differ" if len(found.parted) > 1 else ""
        lines.append(f"FAILED  step {step} is not as it was: {side_by_side.side_by_side(fields)}{more}")
    elif found.repeated:
        last = found.start + found.repeated - 1
        lines.append(f"ok      steps {found.start:,} to {last:,} done again: bit-equal")
    else:
        lines.append("ok      the document was the first behind the checkpoint: nothing before it to do again")
    if found.left_out is not None:
        row = found.left_out
        steps = ", ".join(f"{step:,}" for step in found.left_out_steps)
        lines.append(
            f"left out: step {steps}: {row['shard']} row {row['row']:,}, {palette.domain_name(row['domain'])}, loss "
            f"{terminal.number(row['loss'])}"
        )
        earlier = "1 step" if len(found.left_out_steps) == 1 else f"up to {len(found.left_out_steps):,} steps"
        lines.append(f"followed by the same {len(found.changes):,} documents, each {earlier} earlier")
    return lines


def _show_groups(drawn: Console, found: Rewound) -> None:
    from rich.text import Text

    from slimpajama_hf.lookback.rewind import SPANS, by_domain, summary

    right = {"justify": "right", "no_wrap": True}
    table = terminal.grid(
        {"header": "documents that followed", "no_wrap": True}, {"header": "number", **right},
        {"header": "mean", **right}, {"header": "mean size", **right},
        {"header": "least", **right}, {"header": "greatest", **right},
    )  # fmt: skip
    groups: list[tuple[str, Sequence[Change]]] = [("all", found.changes)]
    groups += [(f"the next {span:,}" if span > 1 else "the next one", found.changes[:span])
               for span in SPANS if span < len(found.changes)]  # fmt: skip
    groups += [(palette.domain_name(domain), own) for domain, own in by_domain(found.changes)]
    for name, changes in groups:
        numbers = summary(changes)
        table.add_row(
            Text(terminal.visible(name, line_ends=False)),
            f"{numbers['documents']:,}",
            _signed(numbers["mean"]),
            terminal.number(numbers["mean_size"], ".5f"),
            _signed(numbers["least"]),
            _signed(numbers["greatest"]),
        )
    drawn.print(table)


def _show_documents(drawn: Console, found: Rewound) -> None:
    from rich.text import Text

    known = [change for change in found.changes if change.difference is not None]
    known.sort(key=lambda change: -abs(change.difference or 0.0))
    chosen = sorted(known[:SHOWN], key=lambda change: change.step)
    if not chosen:
        return
    drawn.print()
    every = len(chosen) == len(found.changes)
    drawn.print(Text("every document" if every else f"the {len(chosen)} that changed most", "bold"))
    right = {"justify": "right", "no_wrap": True}
    table = terminal.grid(
        {"header": "step", **right}, {"header": "with it", **right}, {"header": "without", **right},
        {"header": "change", **right}, {"header": "document", "overflow": "fold"},
    )  # fmt: skip
    for change in chosen:
        part = f" part {change.part}" if change.part else ""
        name = f"{palette.domain_name(change.domain)}, {change.shard} row {change.row:,}{part}"
        table.add_row(
            f"{change.step:,}",
            terminal.number(change.loss),
            terminal.number(change.loss_without),
            _signed(change.difference),
            Text(terminal.visible(name, line_ends=False)),
        )
    drawn.print(table)


def _signed(value: float | None) -> Any:
    from rich.text import Text

    if value is None or not math.isfinite(value):
        return Text("—")
    # Above 0 the loss is higher without the document: the colour for worse.
    return Text(f"{value:+.5f}", terminal.MORE if value > 0 else terminal.LESS if value < 0 else "")


def main(options: argparse.Namespace) -> int:
    """Run `rewind RUN --to N --drop STEP`. Returns 1 if the steps before the document came out differently."""
    from slimpajama_hf.lookback.rewind import rewind

    found = rewind(options.run, options.to, options.drop, options.steps, options.output_dir)
    if options.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
    else:
        show(terminal.console(), found)
    return 0 if found.ok else 1
