"""A progress bar for notebooks, with the newest chart below; both are redrawn in place."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.views import in_notebook

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder

#: Seconds between two redraws: few enough for a notebook, and at no cost to training.
SECONDS_BETWEEN = 0.5

#: Width of the chart in CSS pixels; the image has twice as many.
CHART_WIDTH = 860


def is_here() -> bool:
    """Whether this program runs in the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class NotebookDisplay(TrainerCallback):
    """Bar, numbers and chart in the output of the cell. Listens to the recorder, like the bar in a terminal."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._bar: Any = None
        self._chart: Any = None
        self._chart_stamp = _stamp(folder)
        self._next = 0.0
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        self._done = self._total = 0
        self._row: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from IPython.display import HTML, display

        self._done, self._total = state.global_step, state.max_steps
        self._bar = display(HTML(self._html()), display_id=True)
        self._chart = display(HTML(""), display_id=True)

    def on_row(self, row: dict[str, Any]) -> None:
        """Take a new row of the ledger."""
        self._done, self._row = row["step"] + 1, row
        self._steps, self._tokens = self._steps + 1, self._tokens + row["tokens"]
        self._seconds += row["step_seconds"]
        if self._bar is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN
            self.draw()

    def draw(self) -> None:
        """Redraw the bar, and the chart if there is a new one; may be called after training."""
        if self._bar is None:
            return
        from IPython.display import HTML, Image

        self._bar.update(HTML(self._html()))
        stamp = _stamp(self._folder)
        if stamp not in (None, self._chart_stamp):
            self._chart_stamp = stamp
            self._chart.update(Image(filename=str(self._folder.latest_chart), width=CHART_WIDTH))

    def _html(self) -> str:
        pairs: list[tuple[str, str]] = []
        if self._row is not None:
            loss = self._row["loss"]
            left = self._seconds / self._steps * (self._total - self._done)
            pairs = [
                ("loss", "nan" if loss is None else f"{loss:.4f}"),
                ("accuracy", f"{self._row['accuracy']:.1%}"),
                ("learning rate", f"{self._row['learning_rate']:.2e}"),
                ("tokens per second", f"{self._tokens / self._seconds:,.1f}" if self._seconds else "0"),
                ("time left", screen.format_time(left)),
            ]
        return in_notebook.progress(self._done, self._total, pairs)


def _stamp(folder: RunFolder) -> int | None:
    try:
        return folder.latest_chart.stat().st_mtime_ns
    except OSError:
        return None
