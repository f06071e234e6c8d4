"""`forget RUN --documents FILE`: train the run without some documents, with a certificate (`lookback/forget.py`)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

HELP = "the run as if it had never read some documents, with a certificate of that"

#: Number of documents that are shown by name.
SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `forget`."""
    parser.add_argument("run", help="a run folder")
    parser.add_argument(
        "--documents", required=True, metavar="FILE", help="one document per line: shard#row, or the SHA-1 of its text"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the new run [RUN-forgotten]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Run `forget RUN --documents FILE`."""
    from pathlib import Path

    from slimpajama_hf.lookback import forget
    from slimpajama_hf.screen import format_time

    found = forget.forget(options.run, forget.read_list(Path(options.documents).expanduser()), options.output_dir)
    if options.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        return 0
    begin = f"checkpoint-{found.start}" if found.start else "the very start"
    lines = [f"{found.output_dir}: {found.run} without {len(found.documents):,} documents, from {begin} on, "
             f"{found.steps:,} steps; {format_time(found.seconds)}"]  # fmt: skip
    for name, document in list(found.documents.items())[:SHOWN]:
        steps = ", ".join(f"{step:,}" for step in document["steps"][:5])
        lines.append(f"forgotten: {name} (it was learned at step {steps}{', ...' if document['steps'][5:] else ''})")
    if len(found.documents) > SHOWN:
        lines.append(f"... and {len(found.documents) - SHOWN:,} more; forgotten.json has them all")
    if found.never_read:
        few = ", ".join(found.never_read[:SHOWN]) + (", ..." if found.never_read[SHOWN:] else "")
        lines.append(f"never read by this run: {len(found.never_read):,} ({few})")
    lines.append(f"certificate: {Path(found.output_dir) / 'forgotten.json'}; python -m slimpajama_hf verify "
                 f"{found.output_dir} holds it against the run")  # fmt: skip
    lines += [f"note: {note}" for note in found.notes]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
