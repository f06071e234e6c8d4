"""Base class of callbacks that append to a file within their share of the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.files import GrowingFile
from slimpajama_hf.model import memory
from slimpajama_hf.watching import budget

if TYPE_CHECKING:
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


#: What each may take in any run, in seconds, so that the shortest run has something to show.
LEAST_SECONDS = 0.25


class Keeper(TrainerCallback):
    """Appends entries to a file, within its budget. Reports the first failure and never stops training."""

    def __init__(
        self,
        trainer: SlimPajamaTrainer,
        path: Path,
        share: float,
        ahead_seconds: float,
        seeing_seconds: Callable[[], float],
    ) -> None:
        """`seeing_seconds`: what all watchers have taken so far."""
        self._trainer, self._seeing_seconds = trainer, seeing_seconds
        self.file = GrowingFile(path)
        self._share, self._ahead_seconds = share, ahead_seconds
        self._last_seconds = 0.0
        self.seconds = 0.0
        """Time that it has taken in this session."""
        self._said = False

    def _able(self) -> bool:
        """Whether this process can do it: rank 0, and not with a sharded model."""
        # A forward of a sharded model needs all ranks, but only this one would run it.
        return self._trainer.is_world_process_zero() and not self._trainer.is_fsdp_enabled

    def _affordable(self) -> bool:
        own = budget.affordable(
            self._trainer,
            self._share,
            self.seconds,
            next_cost=self._last_seconds,
            advance=self._ahead_seconds,
            least=LEAST_SECONDS,
        )
        # The common budget counts too: other watchers may have used it early.
        return own and budget.is_left(self._trainer, self._seeing_seconds(), self._last_seconds)

    def _guarded(self, step: int, what: str, act: Callable[[], None]) -> None:
        """Run `act` with the training clock paused; report the first failure."""
        with self._trainer.clock.paused() as pause:
            try:
                with self._trainer.seeing():
                    act()
            except Exception as error:
                self._say(f"the {what} of step {step} failed ({memory.in_words(error)}); training goes on")
        self._last_seconds = pause.seconds
        self.seconds += self._last_seconds

    def _append(self, entry: dict[str, Any], what: str) -> None:
        problem = self.file.append(entry)
        if problem is not None:
            self._say(f"not saved: the {what} of step {entry['step']} ({problem}); the next one tries again")

    def _say(self, text: str) -> None:
        if not self._said:
            self._said = True
            screen.say(text)

    @property
    def _model(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)
