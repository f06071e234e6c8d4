"""How a checkpoint of a run is saved: the ledger first, then all of it or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from slimpajama_hf import files, screen
from slimpajama_hf.errors import SaidByTheFirst
from slimpajama_hf.model import averaging
from slimpajama_hf.record import checkpoints
from slimpajama_hf.record.run_folder import GROWING, RunFolder, sums
from slimpajama_hf.training import saved_model
from slimpajama_hf.training.processes import OthersLost, is_about_others

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Cursor
    from slimpajama_hf.training.processes import Processes
    from slimpajama_hf.training.recorder import StepRecorder


class Saving:
    """Saves checkpoints of the run in `run`: staged, given a manifest, renamed.

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
        self._said = False

    def save(self, step: int, cursor: Cursor, write: Callable[[Path], None]) -> None:
        """The checkpoint of `step`, after which reading goes on at `cursor`. `write` fills `checkpoint-<step>` of the
        folder that it is given. A disk that does not take it is said, and training goes on."""
        try:
            self._stage(step, cursor, write)
            self.failure = None
        except OthersLost:
            raise
        except (OSError, RuntimeError, SafetensorError, SaidByTheFirst) as error:
            # torch and safetensors have errors of their own for a disk that is full.
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
                self._recorder.sync()
                for name in GROWING:
                    files.sync(self._run / name)
                now = {"chain": self._recorder.chain, "beside": sums(RunFolder(run))}
                return staged.enter_context(checkpoints.staged(run, step, about | now))

            self.staging = team.first_does(stage)
            try:
                write(checkpoints.path_of(self.staging, step))
                if team.is_first:
                    state = {"cursor": dataclasses.asdict(cursor)}
                    path = checkpoints.path_of(self.staging, step) / checkpoints.DATA_STATE
                    path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
                    self._complete(path.parent)
            except (OSError, RuntimeError, SafetensorError) as error:
                if is_about_others(error):
                    raise
                failure = error
            finally:
                self.staging = None
            # All have written: now the first renames, and all wait for it.
            team.agree(failure)
        team.first_does(lambda: checkpoints.keep_newest(run, self._limit))

    def _complete(self, checkpoint: Path) -> None:
        """What other programs need beside what transformers writes; what one of them will not load is said once."""
        why = saved_model.complete(checkpoint)
        saved_model.complete(checkpoint / averaging.FOLDER)
        if why is not None and not self._said:
            self._said = True
            screen.say(f"transformers 4 will not load the tokenizer of this run: {why}; transformers 5 does")
