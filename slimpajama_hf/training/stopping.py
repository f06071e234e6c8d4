"""The callback that ends a run after the step that is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from slimpajama_hf.training.signals import StopSignals


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
