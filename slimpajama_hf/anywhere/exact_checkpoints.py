"""`ExactCheckpoints`: the checkpoints of any Trainer are staged, verified and renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from slimpajama_hf import screen
from slimpajama_hf.anywhere.loaders import processes
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints

#: What the Trainer writes its state into.
_TRAINER_STATE = "trainer_state.json"


class StagedSaves:
    """A Trainer's save led into a folder of its own, and into its place when it is whole.

    Trainer writes where `args.output_dir` says. So that is another folder from the end of a step that is to be saved
    until the save is over.
    """

    def __init__(self) -> None:
        self._output_dir: str | None = None
        """Where checkpoints belong while it is led elsewhere."""
        self._staged = contextlib.ExitStack()
        self.about: dict[str, Any] = {}
        """Goes into the manifest."""

    def refuse(self, args: Any) -> None:
        """Raise UserError for a Trainer whose saves cannot be led."""
        if args.push_to_hub and getattr(args.hub_strategy, "value", args.hub_strategy) != "end":
            raise UserError(
                f"hub_strategy={args.hub_strategy.value}: the Trainer would push a checkpoint before it is whole; set "
                "hub_strategy='end', or push checkpoints with python -m slimpajama_hf push"
            )

    def lead(self, args: Any, state: Any, control: Any, before: Callable[[], dict[str, Any]]) -> None:
        """At the end of a step: if it is to be saved, lead the save away. `before` is done first, and its answer goes
        into the manifest."""
        # Whether a step is the best so far is known after its evaluation, which comes later.
        may_be_saved = control.should_save or (_value(args.save_strategy) == "best" and control.should_evaluate)
        if not may_be_saved or self._output_dir is not None:
            return
        self._output_dir = str(args.output_dir)
        rank, world = processes()
        staging = [""]
        if rank == 0:
            self.about = before()
            stage = checkpoints.staged(Path(self._output_dir), state.global_step, self.about)
            staging = [str(self._staged.enter_context(stage))]
        if world > 1:
            torch.distributed.broadcast_object_list(staging)
        args.output_dir = staging[0]

    def end(self, args: Any, state: Any, complete: Callable[[Path], None]) -> Path:
        """After the save: `complete` the folder that it is given, and rename it into its place, which is returned."""
        step = state.global_step
        if self._output_dir is None:
            # Asked for by a callback that comes behind this one.
            raise UserError(
                "a callback behind this one asked for a checkpoint, which then is not staged; put it before this one "
                "in callbacks=[...]"
            )
        run, folder = Path(self._output_dir), checkpoints.path_of(Path(args.output_dir), step)
        self._put_back(args)
        rank, world = processes()
        if world > 1:
            # Each writes something of its own into it.
            torch.distributed.barrier()
        if rank == 0:
            _with_best(state, folder, checkpoints.path_of(run, step))
            complete(folder)
            self._staged.close()
            best = state.best_model_checkpoint
            checkpoints.keep_newest(run, args.save_total_limit, Path(best) if best else None)
        if world > 1:
            torch.distributed.barrier()
        return checkpoints.path_of(run, step)

    def nothing_saved(self, args: Any) -> None:
        """The next step begins: a save that was led away and did not come is forgotten."""
        if self._output_dir is not None:
            self._put_back(args)
            with contextlib.suppress(FileNotFoundError):
                self._staged.pop_all().close()

    def _put_back(self, args: Any) -> None:
        args.output_dir, self._output_dir = self._output_dir, None


def _value(choice: Any) -> Any:
    return getattr(choice, "value", choice)


def _with_best(state: Any, folder: Path, place: Path) -> None:
    """The Trainer's state names the best checkpoint by the place that it will have."""
    if state.best_model_checkpoint and Path(state.best_model_checkpoint) == folder:
        state.best_model_checkpoint = str(place)
        state.save_to_json(str(folder / _TRAINER_STATE))


def newest(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a folder that is whole, for `train(resume_from_checkpoint=...)`; None: there is none.

    One that is not (its bytes are not as its manifest says) is named and passed over.
    """
    found, complaints = checkpoints.newest_good(Path(output_dir))
    for complaint in complaints:
        screen.say(f"{complaint}; passed over")
    return str(found) if found is not None else None


class ExactCheckpoints(TrainerCallback):
    """Checkpoints that are whole or not there, for any Trainer; `RunRecord` does the same by itself.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[ExactCheckpoints()])
        trainer.train(resume_from_checkpoint=ExactCheckpoints.newest(args.output_dir))

    Each is written beside its place, synced, given a manifest with the SHA-256 of every file, and renamed. They are
    kept by step number (`save_total_limit`), never by the clock. Callbacks that ask for checkpoints, or write into
    them, come before it. Raises UserError for `hub_strategy` other than `end`: a push would take what is not whole.
    """

    newest = staticmethod(newest)

    def __init__(self) -> None:
        self._saves = StagedSaves()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.refuse(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.nothing_saved(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.lead(args, state, control, dict)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.nothing_saved(args)
        self._saves.lead(args, state, control, dict)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.end(args, state, lambda folder: None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.nothing_saved(args)
