"""Metrics, samples and chart are drawn beside training, as often as their share allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.watching import budget

if TYPE_CHECKING:
    from slimpajama_hf.training.trainer import SlimPajamaTrainer
    from slimpajama_hf.watching.view_process import ViewProcess


#: What a chart takes when none has been drawn yet, seconds of a core: most of it is importing matplotlib.
FIRST_CHART_SECONDS = 1.0


#: What the end takes beside its chart, seconds of a core: the report, and the search index.
END_SECONDS = 0.6


class DrawViews(TrainerCallback):
    """Every so many steps: metrics JSON, samples JSON and the chart, drawn beside training from the ledger."""

    def __init__(self, trainer: SlimPajamaTrainer, views: ViewProcess, interval: int, obeyed: bool) -> None:
        self._trainer, self.views = trainer, views
        self._interval, self._obeyed = interval, obeyed
        self._said = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if state.global_step % self._interval or not state.is_world_process_zero:
            return
        if not self._obeyed and not self._affordable(trainer):
            return
        with trainer.clock.paused():
            trainer.recorder.flush()
            self.views.request(state.global_step)
            self._say_errors()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say_errors()

    def _say_errors(self) -> None:
        """Say once that charts fail, when it begins."""
        self.views.collect()
        if self.views.errors and not self._said:
            self._said = True
            screen.say(f"charts are not being drawn ({self.views.errors[-1]}); training goes on")

    def _affordable(self, trainer: SlimPajamaTrainer) -> bool:
        views = self.views
        views.collect()
        # Once the process is there a chart costs what the last one did; so will the one at the end.
        cost = views.last_cpu_seconds or FIRST_CHART_SECONDS
        return views.waiting == 0 and budget.affordable(
            trainer, budget.CHARTS, views.cpu_seconds, cost, advance=FIRST_CHART_SECONDS, reserved=cost + END_SECONDS
        )
