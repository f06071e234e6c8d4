"""`ExactCheckpoints`: stages, verifies and renames the checkpoints of any Trainer."""

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

#: The file with the Trainer's state.
_TRAINER_STATE = "trainer_state.json"


class StagedSaves:
    """Redirects a Trainer's save to a staging folder, and moves it into place when it is complete.

    A Trainer saves into `args.output_dir`. So this is set to another folder from the end of a step that may be saved
    until the save is over.
    """

    def __init__(self) -> None:
        self._output_dir: str | None = None
        """The real output folder while saves are redirected."""
        self._staged = contextlib.ExitStack()
        self.about: dict[str, Any] = {}
        """Goes into the manifest."""

    def refuse(self, args: Any) -> None:
        """Raise UserError for a Trainer whose saves cannot be redirected."""
        if args.push_to_hub and getattr(args.hub_strategy, "value", args.hub_strategy) != "end":
            raise UserError(
                f"hub_strategy={args.hub_strategy.value}: the Trainer would push a checkpoint before it is whole; set "
                "hub_strategy='end', or push checkpoints with python -m slimpajama_hf push"
            )

    def lead(self, args: Any, state: Any, control: Any, before: Callable[[], dict[str, Any]]) -> None:
        """At the end of a step that may be saved, redirect the save. `before` is called first; the manifest includes
        what it returns."""
        # Whether this step is the best so far is only known after its evaluation.
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
        """After the save: call `complete` with the folder, and move that into its place, which is returned."""
        step = state.global_step
        if self._output_dir is None:
            # A later callback has requested this save.
            raise UserError(
                "a callback behind this one asked for a checkpoint, which then is not staged; put it before this one "
                "in callbacks=[...]"
            )
        run, folder = Path(self._output_dir), checkpoints.path_of(Path(args.output_dir), step)
        self._put_back(args)
        rank, world = processes()
        if world > 1:
            # Every process writes files of its own into the folder.
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
        """At the beginning of the next step, undo a redirection if no save came."""
        if self._output_dir is not None:
            self._put_back(args)
            with contextlib.suppress(FileNotFoundError):
                self._staged.pop_all().close()

    def _put_back(self, args: Any) -> None:
        args.output_dir, self._output_dir = self._output_dir, None


def _value(choice: Any) -> Any:
    return getattr(choice, "value", choice)


def _with_best(state: Any, folder: Path, place: Path) -> None:
    """Correct the Trainer's state, which names the best checkpoint by its path: it must have the final one."""
    if state.best_model_checkpoint and Path(state.best_model_checkpoint) == folder:
        state.best_model_checkpoint = str(place)
        state.save_to_json(str(folder / _TRAINER_STATE))


def newest(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in a folder, for `train(resume_from_checkpoint=...)`; None if there is none.

    Checkpoints whose bytes are not as their manifest says are named and passed over.
    """
    found, complaints = checkpoints.newest_good(Path(output_dir))
    for complaint in complaints:
        screen.say(f"{complaint}; passed over")
    return str(found) if found is not None else None


class ExactCheckpoints(TrainerCallback):
    """Checkpoints that are complete or absent, for any Trainer; `RunRecord` includes this.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[ExactCheckpoints()])
        trainer.train(resume_from_checkpoint=ExactCheckpoints.newest(args.output_dir))

    Each is written beside its place, synced, given a manifest with the SHA-256 of every file, and renamed. The newest
    are kept by step number (`save_total_limit`), never by the clock. Callbacks that request checkpoints or write into
    them must come before this one. Raises UserError for a `hub_strategy` other than `end`: it would push incomplete
    checkpoints.
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
