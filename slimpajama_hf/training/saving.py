"""How a checkpoint of a run is saved: the ledger first, then all of it or nothing."""

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
from slimpajama_hf.errors import SaidByTheFirst
from slimpajama_hf.model import averaging
from slimpajama_hf.record import checkpoints, run_folder
from slimpajama_hf.record.run_folder import GROWING, RunFolder
from slimpajama_hf.training import saved_model
from slimpajama_hf.training.processes import OthersLost, is_about_others

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Cursor
    from slimpajama_hf.training.processes import Processes
    from slimpajama_hf.training.recorder import StepRecorder


#: What torch and safetensors raise where a disk does not take something, and what another process says of it.
_OF_THE_DISK = (OSError, RuntimeError, SafetensorError, SaidByTheFirst)


class Saving:
    """Saves checkpoints of the run in `run`: staged, given a manifest, renamed.

    One that is saved `behind` is staged and copied in the step; a thread of the first process writes it, hashes it and
    renames it. One at a time is under way. What went wrong there is said at the next step (`look`) or by who waits.

    `about` goes into each manifest. `parameters`: of the model, by which a disk that is too full is recognised.
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
        """Where the checkpoint that is being saved is written."""
        self.failure: str | None = None
        """Why the last save did not succeed, if it did not."""
        self.is_behind = False
        """Whether the checkpoint that is being saved is written from copies while training goes on."""
        self.listeners: list[Callable[[int], None]] = []
        """Told of the step of each checkpoint that is there now."""
        self._jobs: list[Callable[[], None]] = []
        self._under_way: _UnderWay | None = None
        self._said = False

    def save(self, step: int, cursor: Cursor, write: Callable[[Path], None], behind: bool = False) -> None:
        """The checkpoint of `step`, after which reading goes on at `cursor`. `write` fills `checkpoint-<step>` of the
        folder that it is given, or leaves jobs that do (`later`), where `behind`. A disk that does not take it is said,
        and training goes on."""
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
        """Write something into the checkpoint that is being saved, from copies of its own, when training goes on."""
        self._jobs.append(job)

    def look(self) -> None:
        """After each step: whether the checkpoint that was under way is there now, or why it is not."""
        if self._under_way is not None and not self._under_way.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until no checkpoint is under way. What went wrong is said."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            if under_way.is_alive():
                with screen.Waiting(f"writing checkpoint-{under_way.step}"):
                    under_way.join()
            self._note(under_way.step, under_way.error)

    def finished(self) -> Path:
        """The run's folder, with no checkpoint under way in it: what is there now is what a run can go on from."""
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
        return " ".join(str(error).split())[:200]

    def _stage(self, step: int, cursor: Cursor, write: Callable[[Path], None]) -> None:
        """The first process makes the folder and renames it; what is each process' own (the random generators, and the
        shards of a sharded model) each writes into it itself."""
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
                """What the first process does, behind the step or in it: other files, and what vouches for all."""
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
            # All have written: now the first renames, and all wait for it, where it is not done behind.
            team.agree(failure)
            if self.is_behind:
                if team.is_first:
                    self._under_way = _UnderWay(step, finish, staged.pop_all(), self._keep_newest)
                return
        team.first_does(self._keep_newest)

    def _keep_newest(self) -> None:
        checkpoints.keep_newest(self._run, self._limit)

    def _complete(self, checkpoint: Path) -> None:
        """What other programs need beside what transformers writes; what one of them will not load is said once."""
        why = saved_model.complete(checkpoint)
        saved_model.complete(checkpoint / averaging.FOLDER)
        if why is not None and not self._said:
            self._said = True
            screen.say(f"transformers 4 will not load the tokenizer of this run: {why}; transformers 5 does")


class _UnderWay(threading.Thread):
    """A checkpoint that is written while training goes on: `finish` fills the folder, leaving `staged` renames it."""

    def __init__(
        self, step: int, finish: Callable[[], None], staged: contextlib.ExitStack, keep_newest: Callable[[], None]
    ) -> None:
        # Not waited for by an interpreter that ends: what is half written is as if the process had been killed.
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
