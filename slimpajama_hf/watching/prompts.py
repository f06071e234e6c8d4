"""Writes `prompts.jsonl`: how the model continues the same prompts while it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slimpajama_hf.model import generation
from slimpajama_hf.watching import budget
from slimpajama_hf.watching.keeper import Keeper

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


PROMPTS = "prompts.jsonl"

#: How many seconds of their share prompts may use early: a run changes fastest at its beginning.
PROMPTS_AHEAD_SECONDS = 0.5

#: The prompts: prose, a list of facts, code.
FIXED_PROMPTS = ("The most important thing about", "In the year 1815, the", "def main(")


NEW_TOKENS = 32


class FixedPrompts(Keeper):
    """Continues the same prompts at steps 0, 10, 30, 100, 300, ..., at checkpoints and at the end.

    A line of `prompts.jsonl`: `step` (the weights are those of checkpoint-<step>) and `texts`, one object per prompt
    with `prompt` and `output`. `interval`: steps between lines, whatever they cost; None: within the budget.
    """

    def __init__(
        self,
        trainer: SlimPajamaTrainer,
        folder: RunFolder,
        encoder: Encoder,
        seeing_seconds: Callable[[], float],
        interval: int | None = None,
    ) -> None:
        super().__init__(trainer, folder.path / PROMPTS, budget.PROMPTS, PROMPTS_AHEAD_SECONDS, seeing_seconds)
        self._encoder, self._interval = encoder, interval
        self._prompts = [encoder.encode(prompt)[0] for prompt in FIXED_PROMPTS]
        self._at_checkpoint = False
        self._last = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed session begins at a checkpoint."""
        self._at_checkpoint = state.global_step > 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Written at the next step, before its update, so that a resume from this checkpoint writes the same line.
        self._at_checkpoint = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write with the weights before the update."""
        step = state.global_step
        regular = step % self._interval == 0 if self._interval else budget.is_half_decade(step)
        if self._able() and (self._at_checkpoint or regular) and (self._interval is not None or self._affordable()):
            self._guarded(step, "fixed prompts", lambda: self._write(step))
        self._at_checkpoint = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last line of a run is always written."""
        if self._able() and state.global_step > self._last and state.global_step > 0:
            self._guarded(state.global_step, "fixed prompts", lambda: self._write(state.global_step))

    def _write(self, step: int) -> None:
        texts = []
        for prompt, ids in zip(FIXED_PROMPTS, self._prompts, strict=True):
            written = generation.write_after(self._model, ids, NEW_TOKENS)
            opening = self._encoder.decode(ids)
            texts.append({"prompt": prompt, "output": self._encoder.decode(ids + written)[len(opening) :]})
        self._last = step
        self._append({"step": step, "texts": texts}, "fixed prompts")
