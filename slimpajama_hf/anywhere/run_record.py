"""`RunRecord`: the ledger, the exact resume and the report, for any Trainer or training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from slimpajama_hf import files, screen
from slimpajama_hf.anywhere import loaders, run_of_script
from slimpajama_hf.anywhere.exact_checkpoints import StagedSaves
from slimpajama_hf.anywhere.exact_stream import ExactStream
from slimpajama_hf.anywhere.seen_numbers import SeenNumbers, SeenStep
from slimpajama_hf.errors import UserError
from slimpajama_hf.model.presets import vocabulary
from slimpajama_hf.record import checkpoints
from slimpajama_hf.record.ledger import Ledger
from slimpajama_hf.record.run_folder import GROWING, RunFolder, lengths, sums
from slimpajama_hf.session.resume import ResumePoint
from slimpajama_hf.training.clock import TrainingClock
from slimpajama_hf.training.recorder import StepRecorder
from slimpajama_hf.training.step_numbers import StepNumbers

#: The active record of each folder in this process. A run that ended with an error left its folder locked.
_ON: dict[Path, RunRecord] = {}

#: Folder for the notes of a loader's workers; the underscore keeps it out of uploads.
_NOTES = "_notes"
_RNG = "rng_state_of_loop.pth"


class RunRecord(TrainerCallback):
    """Writes a ledger row for each step of a run over an `ExactStream`, and makes the run exactly resumable.

        trainer = Trainer(model, args, train_dataset=stream, callbacks=[RunRecord("runs/mine", stream)])
        trainer.train(resume_from_checkpoint=RunRecord.newest("runs/mine"))

    `folder` is the `output_dir` of the Trainer. Checkpoints are staged, given a manifest and renamed. They have the
    place after the last learned document, and a resumed Trainer begins there without reading earlier ones again
    (`ignore_data_skip`). At the end charts and report are drawn, unless `report=False`. The commands `report`, `views`,
    `verify`, `inspect` and `compare` take the folder.

    A row's loss and accuracy are means over the tokens that the step predicted, taken from what the model returns; its
    `samples` are the documents of the batch. What a step teaches, noise, passports and surprisals are missing: they
    need the step of run_clm_slimpajama.py. Numbers are read some steps later, so that nothing waits for the device.

    A loop of your own has no callbacks: it calls `begin`, `batches`, `step`, `saving` and `close`.

    Raises UserError, from the Trainer's `__init__` or `train`, if something cannot be exact: see `loaders.py`.
    """

    def __init__(self, folder: str | Path, stream: ExactStream, *, report: bool = True) -> None:
        self.path = Path(folder).expanduser()
        self.stream = stream
        self.clock = TrainingClock()
        self.steps, self._world = 0, 1
        """How many steps the run has made."""
        self._report = report
        self._saves = StagedSaves()
        self._seen = SeenNumbers()
        self._joined = False
        """Whether the Trainer was told in time not to skip batches."""
        self._folder: RunFolder | None = None
        """None: this process keeps no record."""
        self._recorder: StepRecorder | None = None
        self._at_end = contextlib.ExitStack()
        self._handing: loaders.Handing | None = None
        self._batches = 0
        """Batches of the current step."""
        self._device = torch.device("cpu")
        self._rate = 0.0
        self._max_steps: int | None = None
        self._record: dict[str, Any] = {}
        self._resumed_from: Path | None = None

    @staticmethod
    def newest(folder: str | Path) -> str | None:
        """The newest whole checkpoint of a run folder, for `train(resume_from_checkpoint=...)`, or None."""
        from slimpajama_hf.anywhere.exact_checkpoints import newest

        return newest(folder)

    def attach(self, trainer: Any) -> Any:
        """Make an existing Trainer train on the stream with this record; returns the Trainer."""
        trainer.train_dataset = self.stream
        trainer.args.ignore_data_skip = self._joined = True
        trainer.add_callback(self)
        return trainer

    # ---- a Trainer's events ----

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer reads this before on_train_begin, when it counts the batches to skip.
        args.ignore_data_skip = self._joined = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._refuse(args)
        checkpoint = checkpoints.path_of(self.path, state.global_step) if state.global_step else None
        loader = kwargs["train_dataloader"]
        self._handing = loaders.of_loader(loader, self.stream)
        settings = {
            "seed": args.seed, "learning_rate": float(args.learning_rate), "max_steps": int(state.max_steps),
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }  # fmt: skip
        self._begin(kwargs["model"], state.max_steps, checkpoint, state.global_step, settings)
        self._device = args.device
        self._is_over(state, loader)
        self._begin_reading(loader)
        self._seen.begin(kwargs["model"])
        self.clock.start()

    def _is_over(self, state: Any, loader: Any) -> None:
        """Whether a resumed run has nothing left to do: a Trainer makes one more step before it checks that."""
        has_steps = state.global_step >= state.max_steps
        self.stream.is_over = has_steps or (self._resumed_from is not None and not self.stream.has_more())
        if self.stream.is_over:
            self.stream.fills_a_batch = hasattr(loader, "skip_batches")
            if self.stream.fills_a_batch:
                loader.skip_batches = 1
            advice = "raise max_steps to go on" if has_steps else "the stream has no more samples"
            screen.say(f"nothing left to do: the run has its {state.global_step:,} steps; {advice}")

    def _refuse(self, args: Any) -> None:
        if not (self._joined or args.ignore_data_skip):
            raise UserError(
                "RunRecord came to a Trainer that was made already; give it in Trainer(callbacks=[...]), or write "
                "RunRecord(folder, stream).attach(trainer)"
            )
        if Path(args.output_dir).expanduser().resolve() != self.path.resolve():
            raise UserError(
                f"RunRecord({str(self.path)!r}, ...): the Trainer saves its checkpoints into {args.output_dir!r}; give "
                "both the same folder"
            )
        if args.save_only_model:
            raise UserError("save_only_model=True: no run can go on from such a checkpoint; leave it out")
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs in one process (DataParallel); start it with accelerate launch, or show it one GPU "
                "(CUDA_VISIBLE_DEVICES=0)"
            )
        self._saves.refuse(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.nothing_saved(args)
        self._batches = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches += 1

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _, world = loaders.processes()
        skipped = bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
        values = self._seen.of_step(self._device, world > 1)
        self._finish_step(self._batches + 1, values, "not finite" if skipped else "")
        self._batches = 0
        self._saves.lead(args, state, control, self._ready_to_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.nothing_saved(args)
        if self._batches:
            screen.say(
                f"the stream ended inside a step: its last {self._batches:,} batches were read and not learned, and "
                "are not in the ledger"
            )
            self._batches = 0
        # A Trainer's epoch is the whole stream, or max_steps of it; a second one would begin it anew.
        control.should_training_stop = True
        self._saves.lead(args, state, control, self._ready_to_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.end(args, state, self._complete)
        self.clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves.nothing_saved(args)
        self._seen.end()
        self.close()

    # ---- a loop of your own ----

    def begin(self, model: torch.nn.Module, max_steps: int | None = None, **settings: Any) -> Path | None:
        """Call this before a loop of your own. Returns the newest whole checkpoint of the folder, from which the loop
        loads what it saved there; None: a new run. `settings`: those of the training, for run_config.yaml."""
        _, world = loaders.processes()
        found = self.newest(self.path) if self.path.is_dir() else None
        checkpoint = Path(found) if found else None
        step = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
        if world > 1:
            torch.distributed.barrier()
        self._begin(model, max_steps, checkpoint, step, settings)
        return checkpoint

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader over the stream, from where training stopped. The documents of a batch count as
        learned when `step` is called after it."""
        self._handing = loaders.of_loader(loader, self.stream)
        self._begin_reading(loader)
        if self._resumed_from is not None:
            _load_generators(self._resumed_from / f"{loaders.processes()[0]}.{_RNG}")
        self.clock.start()
        for batch in loader:
            self._batches += 1
            yield batch
        if self._batches:
            screen.say(f"the last {self._batches:,} batches were read and not learned: no step() came after them")

    def step(
        self, loss: Any, *, learning_rate: float, grad_norm: Any = None, accuracy: Any = None, skipped: str = ""
    ) -> None:
        """Call this after a step of the optimizer with the batches since the last one. `loss`: mean over the predicted
        tokens, nats; tensors are not waited for. `skipped`: why the weights were not changed, if so."""
        values = [loss, 1.0, math.nan if accuracy is None else accuracy, math.nan if grad_norm is None else grad_norm]
        tensors = [each for each in values if isinstance(each, torch.Tensor)]
        device = tensors[0].device if tensors else self._device
        packed = [torch.as_tensor(each, dtype=torch.float32, device=device).detach().reshape(()) for each in values]
        self._rate = learning_rate
        batches, self._batches = self._batches, 0
        self._finish_step(batches, torch.stack(packed), skipped, counted=False)

    @contextlib.contextmanager
    def saving(self) -> Iterator[Path]:
        """Context with a folder for what the loop saves; on leaving, it becomes the checkpoint of this step, complete
        or absent. With several processes all must enter it."""
        rank, world = loaders.processes()
        with contextlib.ExitStack() as staged, self.clock.paused("saving"):
            place = [""]
            if self._folder is not None:
                stage = checkpoints.staged(self.path, self.steps, self._ready_to_save())
                place = [str(staged.enter_context(stage))]
            if world > 1:
                torch.distributed.broadcast_object_list(place)
            folder = checkpoints.path_of(Path(place[0]), self.steps)
            folder.mkdir(exist_ok=True)
            yield folder
            torch.save(_generators(), folder / f"{rank}.{_RNG}")
            if world > 1:
                torch.distributed.barrier()
            if self._folder is not None:
                self._complete(folder)
        if world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Call this at the end of the run: closes the ledger, draws charts and report."""
        self.stream.close()
        if self._recorder is not None and self._folder is not None:
            self._recorder.close()
            self._note_the_end()
            if self._report and self.steps:
                run_of_script.draw(self._folder, self._max_steps or self.steps)
        self.let_go()

    def let_go(self) -> None:
        """Release the folder as it is."""
        self._seen.end()
        self._recorder = None
        self._at_end.close()
        _ON.pop(self.path.resolve(), None)

    # ---- both ----

    def _begin(
        self,
        model: torch.nn.Module,
        max_steps: int | None,
        checkpoint: Path | None,
        step: int,
        settings: dict[str, Any],
    ) -> None:
        rank, world = loaders.processes()
        self._world, self.steps, self._max_steps, self._resumed_from = world, step, max_steps, checkpoint
        point, place = ResumePoint(), self.path.resolve()
        if rank == 0:
            if place in _ON:
                _ON[place].let_go()
            _ON[place] = self
            folder = run_of_script.open_folder(self.path, self._at_end, step)
            point = run_of_script.go_on(folder, self.stream, checkpoint)
            run_of_script.record_run(folder, self.stream, model, point, max_steps, settings)
            self._folder, self._record = folder, folder.read_record()
            ledger = Ledger(folder.ledger, point.chain)
            self._recorder = StepRecorder(ledger, vocabulary(self.stream.tokenizer), point.rows)
        told: list[Any] = [point.cursor, self.stream.corpus]
        if world > 1:
            torch.distributed.broadcast_object_list(told)
        cursor, self.stream.corpus = told
        self.stream.load_state_dict({"cursor": dataclasses.asdict(cursor), "samples": 0, "origin": 0})

    def _begin_reading(self, loader: Any) -> None:
        assert self._handing is not None
        loaders.keep_to_its_own_numbers(loader)
        self.stream.track(self.path / _NOTES, self._handing.workers, self._handing.block, self._folder is not None)

    def _finish_step(self, batches: int, values: torch.Tensor, skipped: str, counted: bool = True) -> None:
        """Record the current step, which had `batches` batches in each process."""
        step, self.steps = self.steps, self.steps + 1
        seconds = self.clock.lap()
        if self._recorder is None:
            return
        assert self._handing is not None
        together = self.stream.take(max(batches * self._handing.samples, 1))
        if not together:
            raise UserError(f"step {step}: no sample of the stream came between the last step and this one")
        skipped_records: dict[str, int] = {}
        for place, each in enumerate(together):
            each.rank = place // self._handing.batch % self._world
            for reason, count in each.skipped.items():
                skipped_records[reason] = skipped_records.get(reason, 0) + count
        sample = dataclasses.replace(
            together[0],
            together=together if len(together) > 1 else [],
            skipped=skipped_records,
            gaps=[gap for each in together for gap in each.gaps],
            after=together[-1].after,
        )
        listens = self._seen.say_if_another if counted else None
        finished = SeenStep(step, sample, self._rate, seconds, skipped, StepNumbers(), listens=listens)
        self._recorder.add(finished, values)

    def _ready_to_save(self) -> dict[str, Any]:
        """Write what a checkpoint refers to to the disk; returns facts about it for the manifest."""
        assert self._recorder is not None and self._folder is not None
        self._recorder.write_all()
        beside = sums(self._folder, lengths(self._folder))
        self._recorder.sync()
        for name in GROWING:
            files.sync(self._folder.path / name)
        return {
            "run_id": self._record["run_id"],
            "chain": self._recorder.chain,
            "beside": beside,
        }

    def _complete(self, checkpoint: Path) -> None:
        run_of_script.write_cursor(checkpoint, self.stream)

    def _note_the_end(self) -> None:
        assert self._folder is not None
        gaps, skipped = self.stream.passed_over_at_end()
        found = {"gaps_after_last_step": gaps, "skipped_after_last_step": skipped}
        record = self._folder.read_record() | {name: value for name, value in found.items() if value}
        with contextlib.suppress(OSError):
            files.write_json(self._folder.record, record, indent=1)


def _generators() -> dict[str, Any]:
    """The states of the random generators, from which dropout and others draw."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state_all()
    return states


def _load_generators(path: Path) -> None:
    if not path.is_file():
        screen.say(f"{path}: missing, because the run had fewer processes: it goes on exactly, but not bit for bit")
        return
    with torch.serialization.safe_globals(_of_numpy()):
        states = torch.load(path, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.random.set_rng_state_all(states["cuda"])


def _of_numpy() -> list[Any]:
    """The numpy types in a saved state of its generator."""
    core = np._core if hasattr(np, "_core") else np.core
    return [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
