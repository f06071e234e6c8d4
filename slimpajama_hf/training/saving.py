"""Saves the checkpoints of a run: the ledger first, then the whole checkpoint or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from slimpajama_hf import files, screen
from slimpajama_hf.errors import SaidByTheFirst, one_line
from slimpajama_hf.model import averaging
from slimpajama_hf.record import checkpoints, run_folder
from slimpajama_hf.record.run_folder import GROWING, RunFolder
from slimpajama_hf.training import saved_model
from slimpajama_hf.training.processes import OthersLost, is_about_others

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Cursor
    from slimpajama_hf.training.processes import Processes
    from slimpajama_hf.training.recorder import StepRecorder


#: Errors of torch and safetensors when a disk does not take something, and what another process reports of one.
_OF_THE_DISK = (OSError, RuntimeError, SafetensorError, SaidByTheFirst)


class Saving:
    """Saves checkpoints of the run in `run`: staged, given a manifest, renamed.

    With `behind` a step only stages and copies; a thread of the first process writes, hashes and renames. One
    checkpoint at a time is written. Errors of the thread are reported at the next step (`look`) or by the next `wait`.

    `about`: facts for each manifest. `parameters`: of the model, to recognise a disk that is too full.
    """

    def __init__(
        self,
        run: Path,
        recorder: StepRecorder,
        team: Processes,
        about: dict[str, Any],
        limit: int | None,
        parameters: int,
    ) -> None:
        self._run, self._recorder, self._team = run, recorder, team
        self._about, self._limit, self._parameters = about, limit, parameters
        self.staging: Path | None = None
        """Where the current checkpoint is written."""
        self.failure: str | None = None
        """Why the last save failed, if it did."""
        self.is_behind = False
        """Whether the current checkpoint is written from copies while training goes on."""
        self.listeners: list[Callable[[int], None]] = []
        """Called with the step of each checkpoint that is complete."""
        self._jobs: list[Callable[[], None]] = []
        self._under_way: _UnderWay | None = None
        self._said = False

    def save(self, step: int, cursor: Cursor, write: Callable[[Path], None], behind: bool = False) -> None:
        """Save the checkpoint of `step`, after which reading goes on at `cursor`. `write` fills `checkpoint-<step>` in
        the folder that it is given; with `behind`, jobs that it adds by `later` may do so. If the disk does not take
        the checkpoint, that is reported and training goes on."""
        self.wait()
        self._jobs, self.is_behind = [], behind
        try:
            self._stage(step, cursor, write)
        except OthersLost:
            raise
        except _OF_THE_DISK as error:
            self._note(step, error)
        else:
            if self._under_way is None:
                self._note(step, None)
        finally:
            self._jobs, self.is_behind = [], False

    def later(self, job: Callable[[], None]) -> None:
        """Add a job that writes into the current checkpoint while training goes on; it needs copies of its data."""
        self._jobs.append(job)

    def look(self) -> None:
        """Called after each step: report the checkpoint in progress if it is complete or has failed."""
        if self._under_way is not None and not self._under_way.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until no checkpoint is in progress, and report what went wrong."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            if under_way.is_alive():
                with screen.Waiting(f"writing checkpoint-{under_way.step}"):
                    under_way.join()
            self._note(under_way.step, under_way.error)

    def finished(self) -> Path:
        """Wait; returns the run's folder, which then has exactly the checkpoints that a run can go on from."""
        self.wait()
        return self._run

    def _note(self, step: int, error: Exception | None) -> None:
        if error is None:
            self.failure = None
            for listener in self.listeners:
                listener(step)
            return
        if not isinstance(error, _OF_THE_DISK):
            raise error
        self.failure = f"checkpoint-{step}: {self._in_words(error)}"
        screen.say(f"not saved: {self.failure}; training goes on, and the next interval tries again")

    def _in_words(self, error: Exception) -> str:
        # torch says of a full disk: "[enforce fail at inline_container.cc] . unexpected pos 528576 vs 528464".
        free = shutil.disk_usage(self._run).free
        if free < 12 * self._parameters:
            return f"{free / 1e6:.1f} MB are free on the disk, too few for a checkpoint"
        return one_line(error)

    def _stage(self, step: int, cursor: Cursor, write: Callable[[Path], None]) -> None:
        """The first process makes the folder and renames it. Each process writes its own part: random generators, and
        its shards of a sharded model."""
        run, team = self._run, self._team
        about = self._about | {"not_finite_in_a_row": len(self._recorder.not_finite)}
        failure: Exception | None = None
        with contextlib.ExitStack() as staged:

            def stage() -> Path:
                self._recorder.write_all()
                about["chain"] = self._recorder.chain
                return staged.enter_context(checkpoints.staged(run, step, about))

            self.staging = team.first_does(stage)
            lengths = run_folder.lengths(RunFolder(run)) if team.is_first else {}
            checkpoint = checkpoints.path_of(self.staging, step)
            jobs = self._jobs

            def finish() -> None:
                """In the first process, in the step or in the thread: write other files and facts for the manifest."""
                for job in jobs:
                    job()
                self._complete(checkpoint)
                self._recorder.sync()
                for name in GROWING:
                    files.sync(run / name)
                about["beside"] = run_folder.sums(RunFolder(run), lengths)

            try:
                write(checkpoint)
                if team.is_first:
                    state = {"cursor": dataclasses.asdict(cursor)}
                    path = checkpoint / checkpoints.DATA_STATE
                    path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
                    if not self.is_behind:
                        finish()
            except (OSError, RuntimeError, SafetensorError) as error:
                if is_about_others(error):
                    raise
                failure = error
            finally:
                self.staging = None
            # All have written. Unless that happens in a thread, the first renames now and all wait.
            team.agree(failure)
            if self.is_behind:
                if team.is_first:
                    self._under_way = _UnderWay(step, finish, staged.pop_all(), self._keep_newest)
                return
        team.first_does(self._keep_newest)

    def _keep_newest(self) -> None:
        checkpoints.keep_newest(self._run, self._limit)

    def _complete(self, checkpoint: Path) -> None:
        """Add what other programs need. If transformers 4 cannot load the tokenizer, say so once."""
        why = saved_model.complete(checkpoint)
        saved_model.complete(checkpoint / averaging.FOLDER)
        if why is not None and not self._said:
            self._said = True
            screen.say(f"transformers 4 will not load the tokenizer of this run: {why}; transformers 5 does")


class _UnderWay(threading.Thread):
    """Writes a checkpoint while training goes on: `finish` fills the folder, leaving `staged` renames it."""

    def __init__(
        self, step: int, finish: Callable[[], None], staged: contextlib.ExitStack, keep_newest: Callable[[], None]
    ) -> None:
        # A daemon, so that exiting does not wait for it: a half-written checkpoint is as after a kill.
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.step = step
        self.error: Exception | None = None
        self._finish, self._staged, self._keep_newest = finish, staged, keep_newest
        self.start()

    def run(self) -> None:
        try:
            with self._staged:
                self._finish()
            self._keep_newest()
        except Exception as error:
            self.error = error
