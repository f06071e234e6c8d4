"""How a run ends before its last step: by a signal, and in which words by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints

if TYPE_CHECKING:
    from slimpajama_hf.training.signals import StopSignals

#: Against a lack of memory.
CURE = "close what else uses the device, or take a smaller --max_seq_length or --model"


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step that is on, with a checkpoint; SIGUSR1 saves one and goes on."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saving = args.save_strategy != "no"
        if self._signals.take_save():
            control.should_save = saving
        if self._signals.to_stop():
            control.should_training_stop = True
            control.should_save = saving


def weights_are_lost(rows: list[dict[str, Any]], run: Path, float16: bool) -> UserError:
    """What to say of steps in a row (their rows of the ledger) whose update could not be made."""
    places = ", ".join(f"{row['shard']} row {row['row']} (step {row['step']})" for row in rows)
    good = checkpoints.newest_before_trouble(run)
    advice = f"go on from {good} " if good else "no checkpoint is older than this; start again "
    return UserError(
        f"{len(rows)} steps in a row had a loss or a gradient that is no number and were skipped; the documents were "
        f"{places}; {advice}with a smaller --learning_rate{' or with --precision float32' if float16 else ''}"
    )


def half_made(step: int, run: Path) -> str:
    """What to say where memory ended in the update of `step`."""
    newest = max(checkpoints.steps(run), default=None)
    where = f"go on from checkpoint-{newest}" if newest is not None else "start again"
    return f"out of memory in the update of step {step}: it is half made, and not saved; {where}: {CURE}"
