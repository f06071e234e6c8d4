"""From a run folder back to a running trainer: which checkpoint, and everything cut back to its step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from slimpajama_hf import checkpoints, files, ledger, screen
from slimpajama_hf.corpora import Cursor
from slimpajama_hf.errors import UserError
from slimpajama_hf.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on: `checkpoint` is None at the very start."""

    checkpoint: Path | None = None
    step: int = 0
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    chain: str = ledger.CHAIN_START


def checkpoint_of(asked: str | bool | None, output_dir: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: `true` is the newest good one of the folder, if any.

    Raises UserError for a path that is no good checkpoint.
    """
    if asked in (None, False) or str(asked).lower() == "false":
        return None
    if str(asked).lower() == "true":
        newest, complaints = checkpoints.newest_good(Path(output_dir))
        for complaint in complaints:
            screen.say(f"passed over {complaint}")
        return newest
    folder = Path(str(asked))
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {asked}: no such folder; expected true or a checkpoint-N of a run")
    wrong = checkpoints.problem(folder)
    if wrong is not None:
        raise UserError(f"--resume_from_checkpoint {asked}: not a whole checkpoint: {wrong}")
    if folder.resolve().parent != Path(output_dir).resolve():
        raise UserError(
            f"--resume_from_checkpoint {asked}: it is of the run in {folder.parent}; add --output_dir {folder.parent}"
        )
    return folder


def cut_back_lines(path: Path, keep: Any) -> None:
    """Keep the lines of a JSON-lines file whose object satisfies `keep`; a torn last line goes."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and keep(json.loads(line))]
        files.write_whole(path, "".join(kept))


def go_on(folder: RunFolder, checkpoint: Path | None) -> ResumePoint:
    """Cut the records of a run back to a checkpoint (None: to nothing) and say where reading goes on."""
    point = ResumePoint()
    if checkpoint is not None:
        step = json.loads((checkpoint / checkpoints.MANIFEST).read_text(encoding="utf-8"))["step"]
        state = json.loads((checkpoint / checkpoints.DATA_STATE).read_text(encoding="utf-8"))
        point = ResumePoint(checkpoint, step, Cursor(**state["cursor"]))
    try:
        chain = ledger.cut_back(folder.ledger, point.step)
    except ValueError as error:
        raise UserError(f"{folder.path}: {error}; resume from an older checkpoint or start anew") from None
    cut_back_lines(folder.samples, lambda sample: sample["step"] < point.step)
    cut_back_lines(folder.evaluations, lambda scores: scores["step"] <= point.step)
    return dataclasses.replace(point, chain=chain)
