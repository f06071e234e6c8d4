"""The run folder of another script: the facts about the run, written at each start, and where the run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from slimpajama_hf import files, screen
from slimpajama_hf.anywhere.loaders import processes
from slimpajama_hf.corpus import unchanged
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback.reread import vocabulary_sha256
from slimpajama_hf.model.presets import vocabulary
from slimpajama_hf.record import checkpoints, ownership, run_folder
from slimpajama_hf.record.run_folder import OF_A_SCRIPT, RunFolder
from slimpajama_hf.session import resume
from slimpajama_hf.session.run_record import new_record

if TYPE_CHECKING:
    from slimpajama_hf.anywhere.exact_stream import ExactStream
    from slimpajama_hf.session.resume import ResumePoint


def open_folder(path: Path, at_end: contextlib.ExitStack, step: int) -> RunFolder:
    """Prepare and lock the folder of a run that is at `step`. Raises UserError if it has a run that this one does not
    continue, or if another run is using it."""
    folder = RunFolder(path)
    if step == 0 and folder.path.is_dir() and checkpoints.steps(folder.path):
        raise UserError(
            f"{path} holds a run with checkpoints, and this one begins anew; go on with it "
            "(trainer.train(resume_from_checkpoint=True)), or name another folder"
        )
    run_folder.prepare(str(path), at_end, resume=True, overwrite=False)
    return folder


def go_on(folder: RunFolder, stream: ExactStream, checkpoint: Path | None) -> ResumePoint:
    """Cut the records of the run back to `checkpoint` (None: to nothing) and move the stream to its next document.
    Returns the resume point. Raises UserError for a checkpoint that is not whole, or another stream."""
    if checkpoint is not None:
        wrong = checkpoints.problem(checkpoint)
        if wrong is not None:
            good, _ = checkpoints.newest_good(checkpoint.parent)
            advice = f"resume_from_checkpoint={str(good)!r}" if good else "there is none that is whole: begin anew"
            raise UserError(f"{checkpoint}: not a whole checkpoint of this run ({wrong}); {advice}")
        _same_stream(folder, stream)
    elif folder.ledger.is_file() and folder.ledger.stat().st_size:
        screen.say(f"{folder.path}: the steps of an earlier start are dropped, because it saved no checkpoint")
    for left in folder.path.glob(f"{checkpoints.STAGING}.*"):
        shutil.rmtree(left, ignore_errors=True)
    checkpoints.remove_halves(folder.path)
    point = resume.go_on(folder, checkpoint)
    # Single tokens are not recorded here.
    folder.surprisals.unlink(missing_ok=True)
    return point


def _same_stream(folder: RunFolder, stream: ExactStream) -> None:
    """Give the stream the corpus of the record. Raises UserError if a setting that decides the order differs."""
    record = folder.read_record()
    if record.get("made_by") != OF_A_SCRIPT:
        raise UserError(f"{folder.path}: a run of run_clm_slimpajama.py, which goes on with it; name another folder")
    stream.corpus = unchanged.check_unchanged(unchanged.recorded(record["corpus"]))
    now, before = settings_of(stream), record["stream"]
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{folder.path}: this run was begun with ExactStream({name}={before[name]!r}), not {value!r}; bring "
                "that back, or name another folder"
            )
    if vocabulary_sha256(stream.tokenizer) != record["tokenizer_sha256"]:
        raise UserError(
            f"{folder.path}: this run was begun with another tokenizer; bring that back, or name another folder"
        )


def settings_of(stream: ExactStream) -> dict[str, Any]:
    """The settings besides the corpus that decide which samples a stream gives, and in which order."""
    return {name: getattr(stream, name) for name in ("mode", "max_length", "shuffle_buffer", "seed", "epochs")}


def record_run(
    folder: RunFolder,
    stream: ExactStream,
    model: Any,
    point: ResumePoint,
    max_steps: int | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write `run.json` and `run_config.yaml`; returns the former. `settings`: those of the script's training, with the
    names of TrainingArguments."""
    _, world = processes()
    if point.checkpoint is not None:
        record = folder.read_record()
        before = record.get("torch_threads")
        if before not in (None, torch.get_num_threads()) and not torch.cuda.is_available():
            screen.say(
                f"{torch.get_num_threads()} threads where the run had {before}: it goes on exactly, but not bit for "
                f"bit; for that set OMP_NUM_THREADS={before}"
            )
    else:
        record = new_record(stream.corpus.describe()) | {"made_by": OF_A_SCRIPT, "stream": settings_of(stream)}
    earlier = [each for each in record.get("sessions", []) if each["step"] < point.step]
    record |= {
        "sessions": [*earlier, {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": point.step}],
        "max_steps": max_steps or 0,
        "tokenizer": stream.tokenizer_name,
        "tokenizer_sha256": vocabulary_sha256(stream.tokenizer),
        "tokenizer_size": vocabulary(stream.tokenizer),
        "model": _model(model, stream),
        "torch_threads": torch.get_num_threads(),
        "processes": world,
        "numbers": {},
    }
    files.write_json(folder.record, record, indent=1)
    names = {"mode": "sample_mode", "max_length": "max_seq_length"}
    own = {names.get(name, name): value for name, value in settings_of(stream).items()}
    described = {"dataset": stream.corpus.name, "tokenizer": stream.tokenizer_name, **own, **settings}
    words = (
        "# What decides the order of the documents, and what a script of somebody else's trained with (RunRecord).\n"
    )
    files.write_whole(folder.config, words + yaml.safe_dump(described, sort_keys=False))
    ownership.sign(folder)
    return record


def _model(model: Any, stream: ExactStream) -> dict[str, Any]:
    parameters = list(model.parameters())
    config = getattr(model, "config", None)
    kinds = {str(each.dtype).removeprefix("torch.") for each in parameters}
    return {
        "name": getattr(config, "model_type", None) or type(model).__name__,
        "parameters": sum(each.numel() for each in parameters),
        "vocab_size": getattr(config, "vocab_size", stream.encoder.size),
        "precision": kinds.pop() if len(kinds) == 1 else "mixed",
        "max_seq_length": stream.max_length,
        "sample_mode": stream.mode,
    }


def write_cursor(checkpoint: Path, stream: ExactStream) -> None:
    """Write into a checkpoint where reading goes on, and the tokenizer if it is not there."""
    state = {"cursor": dataclasses.asdict(stream.cursor)}
    files.write_json(checkpoint / checkpoints.DATA_STATE, state, indent=1)
    if not (checkpoint / "tokenizer_config.json").is_file():
        stream.tokenizer.save_pretrained(str(checkpoint))


def draw(folder: RunFolder, max_steps: int) -> None:
    """Draw the last chart and the report. A failure is reported; the run is complete without them."""
    from slimpajama_hf import report
    from slimpajama_hf.views import views

    try:
        views.Views(folder).redraw(None, *views.caption_of(folder.read_record()), max_steps=max_steps)
        path = report.write(folder.path)
    except Exception as error:
        screen.say(
            f"the report was not drawn ({type(error).__name__}: {error}); python -m slimpajama_hf report {folder.path}"
        )
    else:
        screen.say(f"{'report':>10}  {path}")
