"""`StepCharts`: the chart of this program for any Trainer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.errors import UsageError
from slimpajama_hf.record.columns import Columns

#: The largest share of a run's time for drawing.
SHARE = 0.02


class StepCharts(TrainerCallback):
    """Draws loss, learning rate and gradient norm of a Trainer during training, into `FOLDER/training_latest.png`.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[StepCharts("runs/mine")])

    It shows what the Trainer logs: each step with `logging_steps=1`. It draws every `every` steps if drawing has taken
    no more than 2 % of the time so far, and at the end. A failure is reported once, and training goes on. `RunRecord`
    does not need it: that draws more, from its ledger. Raises UsageError if `every` is below 1.
    """

    def __init__(self, folder: str | Path, every: int = 500) -> None:
        if every < 1:
            raise UsageError(f"StepCharts(every={every}): expected 1 or more")
        self.folder, self._every = Path(folder).expanduser(), every
        self._columns = Columns()
        self._began = time.perf_counter()
        self._drawing_seconds = self._last_seconds = 0.0
        self._said = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        row = {"step": state.global_step - 1}
        names = ("loss", "learning_rate", "grad_norm")
        self._columns.append(row | {name: float(logs[name]) for name in names if logs.get(name) is not None})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Only now has the step before been logged.
        step = state.global_step
        if step and step % self._every == 0 and self._is_left():
            self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def _is_left(self) -> bool:
        return self._drawing_seconds + self._last_seconds <= SHARE * (time.perf_counter() - self._began)

    def _draw(self, state: Any) -> None:
        if not state.is_world_process_zero or not len(self._columns):
            return
        start = time.perf_counter()
        try:
            from slimpajama_hf.views import charts

            self.folder.mkdir(parents=True, exist_ok=True)
            caption = charts.Caption(self.folder.resolve().name, "as the Trainer logged it", max(state.max_steps, 1))
            charts.write(self.folder, self._columns, [], caption)
        except Exception as error:
            if not self._said:
                self._said = True
                screen.say(f"charts are not being drawn ({type(error).__name__}: {error}); training goes on")
        self._last_seconds = time.perf_counter() - start
        self._drawing_seconds += self._last_seconds
