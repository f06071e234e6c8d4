"""The trainings of `influence RUN --text T`: the last steps of a run, unchanged and without one document each."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import replay, rewind
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.record import checkpoints, ledger

if TYPE_CHECKING:
    from slimpajama_hf.lookback.run import Row


@dataclasses.dataclass
class Candidate:
    """A document in the window."""

    row: Row
    """Its row of the ledger."""
    ids: list[int]
    """Its tokens as they were trained."""
    estimate: float = 0.0
    """From gradients (`model/influence_estimate.py`); above 0, the document helped."""
    effect: float | None = None
    """Nats per token by which the loss of the text is higher without the document; None: not tried."""

    @property
    def name(self) -> str:
        return f"{self.row['shard']}#{self.row['row']}"


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps that are repeated: from a checkpoint to `end`."""

    start: int
    """Step of the checkpoint (0: the very start)."""
    end: int
    rows: list[Row]


def window_of(run: Run, step: int | None, documents: int) -> Window:
    """The steps from the nearest checkpoint that is at least `documents` before `step` (None: the end of the run).

    Raises UserError if the run has no such step, or steps of several documents.
    """
    rows = list(run.whole_rows())
    end = len(rows) if step is None else step
    if not 0 < end <= len(rows):
        raise UserError(f"--step {step}: {run.folder.path} has {len(rows):,} steps; name one from 1 to {len(rows):,}")
    if any(ledger.samples_of(row) > 1 for row in rows[:end]) or run.record["model"]["sample_mode"] != "truncate":
        raise UserError(f"{run.folder.path}: influence looks at runs of one document a step, each its first tokens")
    start, _ = replay.nearest_checkpoint(run, max(0, end - documents))
    return Window(start, end, rows[max(start, end - documents) : end])


def train(run: Run, window: Window, left_out: Sequence[str], folder: Path) -> Path:
    """Train the window again without the documents `left_out`, in `folder`; returns the checkpoint at its end."""
    config = run.config_to_train()
    if left_out:
        config["leave_out"] = [*(config.get("leave_out") or []), *left_out]
    about: dict[str, Any] = {"rewound_from": rewind.origin(run, window.start) | {"left_out": list(left_out)}}
    rewind.lay_out(run, window.start, folder, about)
    end = window.end - len(left_out)
    with tempfile.TemporaryDirectory(prefix="slimpajama_hf-influence-") as place:
        replay.train_again(run, config, end, folder, Path(place) / "run.yaml", replay.SAVED_AT_ITS_END)
    return checkpoints.path_of(folder, end)
