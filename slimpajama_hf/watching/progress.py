"""The progress bar, and the lines above it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.bars import TrainingBar


class ShowProgress(TrainerCallback):
    """The progress bar. It listens to the recorder, so it shows what the ledger has."""

    def __init__(self, has_bar: bool) -> None:
        self._has_bar = has_bar
        self.bar: TrainingBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_bar:
            self.bar = TrainingBar(state.max_steps, state.global_step)

    def on_row(self, row: dict[str, Any]) -> None:
        """Take a new row of the ledger (null: not finite)."""
        if self.bar is not None:
            loss = float("nan") if row["loss"] is None else row["loss"]
            self.bar.update(loss, row["accuracy"], row["learning_rate"], row["tokens"], row["step_seconds"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics:
            line = (
                f"held out @ {state.global_step}: {metrics['eval_bits_per_byte']:.4f} bits per byte, loss "
                f"{metrics['eval_loss']:.4f}, perplexity {_perplexity(metrics['eval_perplexity'])}, accuracy "
                f"{metrics['eval_accuracy']:.1%}"
            )
            if "eval_averaged_loss" in metrics:
                bits, loss = metrics["eval_averaged_bits_per_byte"], metrics["eval_averaged_loss"]
                line += f"; averaged weights: {bits:.4f} bits per byte, loss {loss:.4f}"
            screen.say(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _perplexity(value: float) -> str:
    """`123.4`, or `1.6e+49` from a million on."""
    return f"{value:.1f}" if value < 1e6 else f"{value:.1e}"
