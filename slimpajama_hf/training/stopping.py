"""How a run ends before its last step: by a signal or by itself, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints

if TYPE_CHECKING:
    from slimpajama_hf.samples.sample import Sample
    from slimpajama_hf.training.loss_scale import LossScale
    from slimpajama_hf.training.signals import StopSignals

#: After this many skipped updates in a row the weights are lost, rather than a document odd.
MOST_NOT_FINITE_IN_A_ROW = 10

#: The advice when memory runs out.
CURE = "close what else uses the device, or take a smaller --max_seq_length or --model"


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the current step, with a checkpoint; SIGUSR1 saves one and goes on."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saving = args.save_strategy != "no"
        if self._signals.take_save():
            control.should_save = saving
        if self._signals.to_stop():
            control.should_training_stop = True
            control.should_save = saving


class LackOfMemory:
    """Counts steps that did not fit into memory. The first is skipped, because another program may have used the GPU.
    After the second the model is too large."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, step: int, sample: Sample, may_skip: bool) -> None:
        """Count one more step, of which nothing was applied. Says that it is skipped, or raises UserError."""
        self._count += 1
        document = sample.document
        if self._count > 1 or not may_skip:
            again = ", again" if self._count > 1 else ""
            raise UserError(f"out of memory at step {step} ({document.shard} row {document.row}){again}; {CURE}")
        screen.say(
            f"step {step}: out of memory on {document.shard} row {document.row}; it is skipped, the next time the run "
            "stops"
        )


def weights_are_lost(
    rows: list[dict[str, Any]], run: Callable[[], Path], loss_scale: LossScale | None
) -> UserError | None:
    """Why the run must end, or None: too many steps in a row had no update because loss or gradient was not finite.
    `rows`: their rows of the ledger. `run` waits for a checkpoint in progress and returns the run's folder."""
    most = MOST_NOT_FINITE_IN_A_ROW
    if loss_scale is not None and len(rows) >= most and loss_scale.may_be_too_large():
        # A gradient beyond float16's range does not mean lost weights while the scale still falls.
        rows = [row for row in rows if row["loss"] is None or not math.isfinite(row["loss"])]
    if len(rows) < most:
        return None
    places = ", ".join(f"{row['shard']} row {row['row']} (step {row['step']})" for row in rows)
    good = checkpoints.newest_before_trouble(run())
    advice = f"go on from {good} " if good else "no checkpoint is older than this; start again "
    precision = " or with --precision float32" if loss_scale is not None else ""
    return UserError(
        f"{len(rows)} steps in a row had a loss or a gradient that is no number and were skipped; the documents were "
        f"{places}; {advice}with a smaller --learning_rate{precision}"
    )


def memory_ended(step: int, run: Path, in_update: bool) -> str:
    """The message when memory ran out at `step`, or (`in_update`) in the middle of its update."""
    if not in_update:
        return f"out of memory at step {step}; {CURE}"
    newest = max(checkpoints.steps(run), default=None)
    where = f"go on from checkpoint-{newest}" if newest is not None else "start again"
    return f"out of memory in the update of step {step}: it is half made, and not saved; {where}: {CURE}"
