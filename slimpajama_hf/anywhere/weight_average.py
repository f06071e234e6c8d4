"""`WeightAverage`: an average of the weights for any Trainer, saved with each checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.model import averaging
from slimpajama_hf.record import checkpoints


class WeightAverage(TrainerCallback):
    """An exponential average of a model's weights, which does not influence training.

        average = WeightAverage()
        trainer = Trainer(model, args, train_dataset=data, callbacks=[average, RunRecord("runs/mine", stream)])
        trainer.train()
        with average.applied():
            trainer.evaluate()

    `half_life`: after so many steps, a step counts half as much; below 1, that share of the steps so far. Each
    checkpoint has the average in its folder `averaged`, which `from_pretrained` loads, and a resumed Trainer goes on
    with it. It must come before `RunRecord` or `ExactCheckpoints` in `callbacks`, so that they verify it too. It costs
    4 bytes per parameter and, at every tenth step, one pass over the weights. Raises UsageError for a half-life that is
    not above 0."""

    def __init__(self, half_life: float = 0.1) -> None:
        if not half_life > 0:
            raise UsageError(f"WeightAverage(half_life={half_life}): expected steps, or a share of them, above 0")
        self._half_life = half_life
        self._average: averaging.WeightAverage | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = checkpoints.path_of(Path(args.output_dir), state.global_step) if state.global_step else None
            self._average = averaging.begin(kwargs["model"], self._half_life, checkpoint)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._average is not None:
            self._average.step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._average is None or not self._average.is_there:
            return
        folder = checkpoints.path_of(Path(args.output_dir), state.global_step)
        if (folder / checkpoints.MANIFEST).is_file():
            raise UserError(
                "WeightAverage stands behind RunRecord or ExactCheckpoints, which have verified the checkpoint "
                "already; put it before them in callbacks=[...]"
            )
        self._average.save(folder, kwargs.get("processing_class"))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights; afterwards it has its own again, bit for bit. Raises
        UserError if nothing has been averaged yet."""
        if self._average is None or not self._average.is_there:
            raise UserError("WeightAverage: nothing has been averaged yet; the first time is after ten steps or fewer")
        with self._average.applied():
            yield
