"""Has metrics, samples and chart drawn beside training, as often as the budget allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.watching import budget

if TYPE_CHECKING:
    from slimpajama_hf.training.trainer import SlimPajamaTrainer
    from slimpajama_hf.watching.view_process import ViewProcess


class DrawViews(TrainerCallback):
    """Has metrics JSON, samples JSON, chart and report made from the ledger, beside training.

    With `obeyed` (the user typed the interval), every `interval` steps. Otherwise chart and report are made after the
    first step and at steps 10, 30, 100, 300, ... if there is time, and a chart every `interval` steps if the budget
    allows; the JSON files every `interval` steps. `seeing_seconds`: what all watchers have taken so far.
    """

    def __init__(
        self,
        trainer: SlimPajamaTrainer,
        views: ViewProcess,
        interval: int,
        obeyed: bool,
        seeing_seconds: Callable[[], float],
    ) -> None:
        self._trainer, self.views = trainer, views
        self._interval, self._obeyed = interval, obeyed
        self._seeing_seconds = seeing_seconds
        self._early: int | None = None
        """The last of steps 10, 30, 100, ... whose chart has not been requested, because another is being drawn."""
        self._said = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if not state.is_world_process_zero:
            return
        in_turn = step % self._interval == 0
        if self._obeyed:
            if in_turn:
                self._request(step)
            return
        if budget.is_half_decade(step):
            self._early = step
        if step == 1:
            self._request(step, with_report=True)
        elif self._early is not None and self._is_left():
            self._request(self._early, with_report=True)
            self._early = None
        elif in_turn:
            self._request(step, with_chart=self._affordable())

    def _request(self, step: int, with_chart: bool = True, with_report: bool = False) -> None:
        with self._trainer.clock.paused():
            self._trainer.recorder.flush()
            self.views.request(step, with_chart=with_chart, with_report=with_report)
            self._say_errors()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say_errors()

    def _say_errors(self) -> None:
        """Report failing charts once."""
        self.views.collect()
        if self.views.errors and not self._said:
            self._said = True
            screen.say(f"charts are not being drawn ({self.views.errors[-1]}); training goes on")

    @property
    def _cost(self) -> float:
        """The expected time of the next chart and of the last one: that of the newest chart, if it is known."""
        return self.views.last_chart_seconds or budget.CHART_SECONDS

    def _is_left(self) -> bool:
        """Whether there is time for a chart at steps 10, 30, 100, ..."""
        self.views.collect()
        return self.views.waiting == 0 and budget.is_left(
            self._trainer, self._seeing_seconds(), self._cost, reserved=self._cost + budget.END_SECONDS
        )

    def _affordable(self) -> bool:
        self.views.collect()
        return self.views.waiting == 0 and budget.affordable(
            self._trainer,
            budget.CHARTS,
            self.views.cpu_seconds,
            self._cost,
            reserved=self._cost + budget.END_SECONDS,
        )
