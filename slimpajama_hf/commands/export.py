"""`export`: write a run's model or its ledger in a format of other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slimpajama_hf.errors import UserError

HELP = "a model as GGUF, for llama.cpp, or a ledger as a Parquet table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `export`."""
    parser.add_argument("run", help="a run folder; for gguf also a checkpoint-N (a run folder: its newest) or averaged")
    parser.add_argument(
        "--to", required=True, choices=("gguf", "parquet"), help="gguf: the model; parquet: the ledger, a row per step"
    )
    parser.add_argument(
        "--output", help="the file to write [RUN/checkpoint-N.gguf, RUN/ledger.parquet]; an existing one is replaced"
    )


def main(options: argparse.Namespace) -> int:
    from slimpajama_hf.screen import Waiting

    given = Path(options.run).expanduser()
    asked = Path(options.output).expanduser() if options.output else None
    if asked is not None and asked.is_dir():
        raise UserError(
            f"--output {asked}: a folder; expected the name of a file, such as {asked / 'run'}.{options.to}"
        )
    with Waiting(f"writing {options.to}"):
        try:
            lines = _gguf(given, asked) if options.to == "gguf" else _parquet(given, asked)
        except OSError as error:
            raise UserError(
                f"{error.filename or given}: {error.strerror or error}; name a file that can be written with --output"
            ) from None
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _gguf(given: Path, asked: Path | None) -> list[str]:
    from slimpajama_hf.lookback import gguf_file
    from slimpajama_hf.record import checkpoints

    folder = checkpoints.resolve(str(given))
    # Beside the checkpoint, not inside it, because its manifest lists all files inside.
    parts = [folder.parent.name, folder.name] if folder.name == "averaged" else [folder.name]
    target = asked or folder.resolve().parents[len(parts) - 1] / f"{'-'.join(parts)}.gguf"
    written = gguf_file.write(folder, target)
    lines = [f"{target}: {folder}, {written.parameters:,} parameters as float32, {written.tokens:,} tokens"]
    if folder.name != "averaged" and (folder / "averaged").is_dir():
        lines.append(
            f"the averaged weights are another model: python -m slimpajama_hf export {folder}/averaged --to gguf"
        )
    return lines


def _parquet(given: Path, asked: Path | None) -> list[str]:
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.views import ledger_table

    target = asked or given / "ledger.parquet"
    written = ledger_table.write(RunFolder(given), target)
    lines = [f"{target}: {written.rows:,} steps, {written.columns} columns"]
    if written.torn:
        lines.append("the last row of the ledger is half written (a run is on, or was killed); it is not in the table")
    if written.left_out:
        lines.append(f"left out, for they are no numbers: {', '.join(written.left_out)}")
    return lines
