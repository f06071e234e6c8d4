"""One session of training, from its plan to its summary and exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from slimpajama_hf import devices, files, screen
from slimpajama_hf.corpus.patience import StopRequested
from slimpajama_hf.errors import SaidByTheFirst, UserError
from slimpajama_hf.model import products
from slimpajama_hf.record import run_folder
from slimpajama_hf.session import plan
from slimpajama_hf.training.backward import refuse_reduce_dtype
from slimpajama_hf.training.processes import OthersLost, is_about_others, lost
from slimpajama_hf.training.shared_gradient import SharedGradient

if TYPE_CHECKING:
    from slimpajama_hf.hub.background import Uploads
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.session.resume import ResumePoint
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.signals import StopSignals
    from slimpajama_hf.training.trainer import SlimPajamaTrainer
    from slimpajama_hf.watching.watchers import Watchers


class _SayPrecision(TrainerCallback):
    """When training begins, say and record the precision that was seen in the model, and what sums gradients."""

    def __init__(self, trainer: SlimPajamaTrainer, folder: RunFolder) -> None:
        self._trainer, self._folder = trainer, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = self._trainer.computes_in
        by = "autograd's operators"
        if self._trainer.why_autograd() is None:
            by = products.library(self._trainer.args.device, getattr(torch, seen))
        sums = self._trainer.gradients_summed_by
        summed = f"; gradients summed by {sums}" if sums else ""
        screen.say(f"{'computes':>10}  in {seen}, seen in the layers of the model; products by {by}{summed}")
        record = self._folder.read_record()
        if sums and state.global_step:
            self._say_if_summed_otherwise(record["model"].get("gradients_summed_by", SharedGradient.MESSAGES), sums)
        record["model"] |= {"computed_in": seen, "products_by": by} | ({"gradients_summed_by": sums} if sums else {})
        try:
            files.write_json(self._folder.record, record, indent=1)
        except OSError as error:
            # A full disk stops the saving, not the training.
            screen.say(f"not saved: the precision in {self._folder.record} ({error.strerror})")

    def _say_if_summed_otherwise(self, before: str, now: str) -> None:
        if before != now:
            screen.say(
                f"gradients are summed by {now} where the run had {before}: it goes on exactly, but not bit for bit"
            )


@dataclasses.dataclass
class Session:
    """One start of the program, from its plan to its summary."""

    settings: Settings
    trainer: SlimPajamaTrainer
    folder: RunFolder
    point: ResumePoint
    signals: StopSignals
    watchers: Watchers
    precision: str
    tokenizer_name: str
    uploads: Uploads
    _together: bool = False
    """Whether all processes have reached the end of training."""

    def run(self) -> int:
        """Train to the end, to a signal or to an error. Leaves checkpoint, views and summary. Returns the exit code."""
        trainer = self.trainer
        refuse_reduce_dtype(trainer.args, trainer.why_autograd(), self.settings.model.reduce_dtype)
        if trainer.args.save_strategy != "no":
            trainer.team.first_does(self._refuse_full_disk)
        try:
            code = self._lead() if trainer.team.is_first else self._follow()
        except UserError:
            if self._together:
                # A launcher ends all processes as soon as one fails. Leave together, so that the first can say why.
                trainer.team.leave()
            raise
        trainer.team.leave()
        return code

    def _on_first_row(self, row: dict[str, Any]) -> None:
        """The first row is written, so this run now takes the place of the run that was in the folder before."""
        self.trainer.recorder.listeners.remove(self._on_first_row)
        with self.trainer.clock.paused():
            run_folder.settle_replaced(self.folder)

    def _refuse_full_disk(self) -> None:
        run_folder.refuse_full_disk(self.folder, self.folder.read_record()["model"]["checkpoint_bytes"])

    def _lead(self) -> int:
        """The part of the first or only process."""
        trainer, point = self.trainer, self.point
        self.watchers.listen_to(trainer.recorder)
        trainer.add_callback(_SayPrecision(trainer, self.folder))
        plan.show(self.settings, trainer, self.precision, self.tokenizer_name, self.folder)
        self.uploads.announce()
        if point.checkpoint is not None:
            screen.say(f"{'resumed':>10}  {point.checkpoint}, at step {point.step:,}")
        if point.step >= self.settings.training.max_steps:
            screen.say(f"nothing left to do: the run has its {point.step:,} steps; raise --max_steps to go on")
            trainer.state.global_step = point.step
            return self._finish(None)
        trainer.recorder.listeners.append(self._on_first_row)
        failure = self._train()
        trainer.saving.wait()
        trainer.recorder.flush()
        self.watchers.progress.close()
        return self._finish(failure)

    def _train(self) -> Exception | None:
        """Train, and save where it ended. Returns what went wrong, or None."""
        trainer, point = self.trainer, self.point
        failure: Exception | None = None
        try:
            trainer.train(resume_from_checkpoint=str(point.checkpoint) if point.checkpoint else None)
        except StopRequested:
            # The signal came between two steps, while the stream was waiting for the network.
            pass
        except Exception as error:
            failure = error
        if failure is not None and trainer.team.world_size > 1:
            # It is not known where the others are. The last checkpoint is the state that all of them have.
            return OthersLost(lost(failure)) if is_about_others(failure) else failure
        trainer.recorder.flush()
        failed = trainer.team.most([float(trainer.failure is not None)])[0]
        self._together = True
        if failed:
            return failure or trainer.failure or SaidByTheFirst("the first process stops the run")
        if failure is None or isinstance(failure, UserError):
            # A stream breaks between two steps, so what was learned is whole and is kept.
            trainer.save_now()
        return failure

    def _follow(self) -> int:
        """The part of all other processes: the same training, without output."""
        if self.point.step < self.settings.training.max_steps:
            failure = self._train()
            if failure is not None:
                raise failure
        return self.signals.exit_code

    def _finish(self, failure: Exception | None) -> int:
        """Make the last views and the summary. Returns the exit code, or raises the failure."""
        trainer, watchers, views = self.trainer, self.watchers, self.watchers.views
        trainer.recorder.close()
        unsaved = trainer.saving.failure or watchers.flush()
        if trainer.recorder.unwritten:
            unsaved = unsaved or "rows of the ledger"
        if unsaved and failure is None:
            failure = UserError(
                f"the end of the run is not saved ({unsaved}); make room and go on from the last checkpoint"
            )
        steps = trainer.state.global_step
        stream = trainer.stream
        ended = trainer.stream_ended or (failure is not None and failure is stream.error)
        # No row of the ledger comes after these records. A session that stops earlier has none.
        gaps, skipped = (stream.gaps_at_end, stream.skipped_at_end) if ended else ([], {})
        trainer.skipped_records.update(skipped)
        self._note_in_record({"gaps_after_last_step": gaps, "skipped_after_last_step": skipped})
        unmade: UserError | None = None
        not_drawn = views.errors
        if watchers.draws:
            before = len(views.errors)
            with screen.Waiting("drawing the last chart and the report"):
                drawn = views.finish(steps)
            watchers.show_end()
            if not drawn:
                not_drawn = views.errors[:before]
                unmade = UserError(
                    f"the final chart was not drawn ({views.errors[-1]}), so charts and metrics are of an earlier step "
                    "or missing; the run itself is saved: when this is mended, type python -m slimpajama_hf views "
                    f"{shlex.quote(str(self.folder.path))}"
                )
        for what, errors in (("chart", not_drawn), ("sample", watchers.samples.failures)):
            if errors:
                screen.say(f"{len(errors)} {what}s failed, the first at {errors[0]}")
        outcome = self._outcome(failure)
        # Read now: Ctrl-C while the last push is waited for is not a Ctrl-C of the run.
        code = self.signals.exit_code
        if unmade is not None and (failure is not None or code):
            # The exit code is that of what came first.
            screen.say(str(unmade))
            unmade = None
        for line in plan.summary(self.folder, trainer, outcome, watchers.seconds, self.settings.run.lr_find):
            screen.say(line)
        if self.settings.run.lr_find:
            from slimpajama_hf.session import range_test_result

            for line in range_test_result.conclude(self.folder, self.settings.training.max_steps):
                screen.say(line)
            if unmade is not None:
                raise unmade
            # This test ends at rates that are far too high, so a loss that is not a number is no failure.
            return code
        for line in self.uploads.finish(done=outcome in ("done", "the corpus ended")):
            screen.say(line)
        saved_whole = trainer.args.save_strategy != "no" and not trainer.args.save_only_model
        if outcome != "done" and saved_whole and steps:
            screen.say(f"         go on  {run_folder.resume_command(self.folder.path, self.folder.read_record())}")
        if failure is not None:
            raise failure
        if steps == 0:
            raise UserError(
                f"{self.settings.data.dataset}: no document to learn from in this corpus{trainer.stream.why_nothing()}"
            )
        if unmade is not None:
            raise unmade
        return code

    def _note_in_record(self, at_end: dict[str, Any]) -> None:
        """Write what is known only at the end of a session into `run.json`, unless the disk is full."""
        found: dict[str, Any] = {"memory": devices.peak_memory(), **at_end}
        if self.trainer.args.should_save:
            with contextlib.suppress(OSError):
                record = {name: value for name, value in self.folder.read_record().items() if name not in found}
                said = {name: value for name, value in found.items() if value}
                files.write_json(self.folder.record, record | said, indent=1)

    def _outcome(self, failure: Exception | None) -> str:
        if failure is not None:
            return "stopped by an error"
        if self.signals.received is not None:
            return "stopped by Ctrl-C" if self.signals.exit_code == 130 else f"stopped by {self.signals.received.name}"
        if self.trainer.stream_ended and self.trainer.state.global_step < self.settings.training.max_steps:
            return "the corpus ended"
        return "done"
