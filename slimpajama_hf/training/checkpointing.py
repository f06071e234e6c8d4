"""How the Trainer saves checkpoints: what is written within the step, and what from copies while training goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from slimpajama_hf import screen
from slimpajama_hf.model import averaging, memory, presets
from slimpajama_hf.record import checkpoints
from slimpajama_hf.training import saved_model
from slimpajama_hf.training.host_copies import HostCopies

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Cursor
    from slimpajama_hf.settings.update_rules import UpdateRules
    from slimpajama_hf.training.clock import TrainingClock
    from slimpajama_hf.training.processes import Processes
    from slimpajama_hf.training.saving import Saving


class Checkpointing(Trainer):
    """A Trainer whose checkpoints are staged, given a manifest and renamed (`saving.py`).

    A step waits until weights, their average and the optimizer's state are copied to host memory. A thread writes the
    copies, hashes and renames them. A sharded model is written within the step, because all processes must take part.
    So is a model whose copies do not fit into memory.
    """

    saving: Saving
    average: averaging.WeightAverage | None
    cursor: Cursor
    clock: TrainingClock
    team: Processes
    rules: UpdateRules
    run_path: Path
    _updating: bool
    _copies: HostCopies | None = None
    _copies_fit: bool | None = None
    """Whether there is memory for the copies; None: not checked yet."""

    def tell_now(self) -> None:
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        staging = self.saving.staging
        return str(staging) if staging is not None else super()._get_output_dir(trial)

    def _load_scaler(self, checkpoint: str | None) -> None:
        # The checkpoint of a run that began in float16 has one, but in another precision there is no scaler to load.
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        # After the first update everything that a checkpoint holds exists.
        if self._copies_fit is None and self.args.save_strategy != "no":
            self._is_behind()
        super()._maybe_log_save_evaluate(*arguments, **named)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Stage, write or copy, add the manifest, rename. The ledger is on the disk before the checkpoint, which refers
        to it."""
        self.tell_now()
        self.saving.wait()

        def write(folder: Path) -> None:
            super(Checkpointing, self)._save_checkpoint(model, trial)
            if self.average is None or not self.average.is_there:
                return
            if not self.saving.is_behind:
                self.average.save(folder, self.processing_class)
                return
            place = folder / averaging.FOLDER
            self._save_behind(self.average.weights, place)
            self.average.save_age(place)

        with self.clock.paused("saving"), screen.Waiting(f"saving checkpoint-{self.state.global_step}"):
            behind = self._is_behind()
            if self._copies is not None:
                self._copies.begin()
            self.saving.save(self.state.global_step, self.cursor, write, behind=behind)

    def _is_behind(self) -> bool:
        """Whether checkpoints are written from copies while training goes on."""
        if self.is_fsdp_enabled:
            return False
        if self._copies_fit is None:
            model = self.accelerator.unwrap_model(self.model)
            copies = presets.checkpoint_bytes(model, self.average is not None, self.rules)
            free = memory.free_bytes(torch.device("cpu"))
            self._copies_fit = free is None or free > 1.25 * copies
            if not self._copies_fit:
                screen.say(
                    f"training waits while a checkpoint is written: a copy of it takes {screen.format_bytes(copies)}, "
                    f"and {screen.format_bytes(free or 0)} of memory are free"
                )
            elif self.args.should_save:
                self._copies = HostCopies(copies, pinned=self.args.device.type == "cuda")
        return self._copies_fit

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, configuration and tokenizer. The saved configuration says that the model uses a cache."""
        folder = Path(output_dir or self.run_path)
        if self.saving.is_behind and state_dict is None:
            if self.args.should_save:
                self._save_behind(list(self.accelerator.unwrap_model(self.model).parameters()), folder)
            return
        with saved_model.with_a_cache(self.accelerator.unwrap_model(self.model).config):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            # It pickles all arguments, the Hub token among them; run_config.yaml has them without the token.
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _save_behind(self, weights: list[torch.Tensor], folder: Path) -> None:
        """Copy `weights`, in the order of the model's parameters; their files are written later."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self._copies is not None
        made = saved_model.like(self.accelerator.unwrap_model(self.model), self._copies.of(weights))
        tokenizer = self.processing_class

        def write() -> None:
            made().save_pretrained(str(folder))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))

        self.saving.later(write)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.saving.is_behind:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None and self.lr_scheduler is not None
            assert self._copies is not None
            state = self._copies.of(self.optimizer.state_dict())
            self.saving.later(lambda: torch.save(state, os.path.join(output_dir, "optimizer.pt")))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def save_now(self) -> None:
        """Save the state after the last finished step and wait for it. Does nothing if this checkpoint exists, or if
        an update was interrupted and the weights no longer belong to that step."""
        step = self.state.global_step
        self.saving.wait()
        if step == 0 or self.args.save_strategy == "no" or self._updating:
            return
        if not self.team.first_does(checkpoints.path_of(self.run_path, step).exists):
            self._save_checkpoint(self.model, trial=None)
            self.saving.wait()
