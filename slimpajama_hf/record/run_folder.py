"""The folder of a run: which files it has, and whether a new start may use it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimpajama_hf import TRAINING_PROGRAM, files, screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints, ledger, lock, surprisals
from slimpajama_hf.record.lock import FolderLock

EVALUATIONS = "evaluations.jsonl"

#: Marks the run as this user's (`ownership.py`). The underscore keeps it out of uploads.
MARK = "_made_here"

#: Files besides ledger and surprisals that a run appends to: one JSON object per line, with its `step`.
GROWING = ("samples.jsonl", "passports.jsonl", "prompts.jsonl", EVALUATIONS)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def ledger(self) -> Path:
        return self.path / ledger.FILE_NAME

    @property
    def surprisals(self) -> Path:
        return self.path / surprisals.FILE_NAME

    @property
    def samples(self) -> Path:
        """Generated samples, one JSON object per line, append-only; `text_samples.json` is a view of it."""
        return self.path / "samples.jsonl"

    @property
    def passports(self) -> Path:
        """Documents before and after the step that learned them, one JSON object per line, append-only."""
        return self.path / "passports.jsonl"

    @property
    def prompts(self) -> Path:
        """What the model generates after fixed prompts, one JSON object per line, append-only."""
        return self.path / "prompts.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def evaluations(self) -> Path:
        """Held-out scores, one JSON object per line, append-only."""
        return self.path / EVALUATIONS

    @property
    def record(self) -> Path:
        """Facts about the run: corpus as opened, versions, command."""
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        return self.path / "run_config.yaml"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that was trained for the run, if one was; every checkpoint has a copy."""
        return self.path / "tokenizer"

    @property
    def initial_embeddings(self) -> Path:
        """The embeddings that the run began with, if they were not drawn at random."""
        return self.path / "initial_embeddings.safetensors"

    @property
    def forgotten(self) -> Path:
        """The certificate of `forget`, if documents were forgotten."""
        return self.path / "forgotten.json"

    @property
    def viz(self) -> Path:
        return self.path / "training_viz"

    @property
    def latest_chart(self) -> Path:
        return self.viz / "training_latest.png"

    def holds_a_run(self) -> bool:
        return any(path.exists() for path in (self.record, self.ledger)) or bool(checkpoints.steps(self.path))

    def read_record(self) -> dict[str, Any]:
        """The content of `run.json`. Raises UserError if it is missing or torn."""
        try:
            record = files.strict_json(self.record.read_text(encoding="utf-8"))
            _refuse_another_shape(record)
            return record
        except FileNotFoundError:
            raise UserError(f"{self.path}: no run.json in it; expected the folder of a run") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.record}: cannot be read ({error})") from None


#: `made_by` in the `run.json` of a run that somebody else's script made (`anywhere/run_record.py`).
OF_A_SCRIPT = "RunRecord"


def refuse_of_a_script(path: Path, record: dict[str, Any], what: str) -> None:
    """Raise UserError if only the script that made a run could do `what`."""
    if record.get("made_by") == OF_A_SCRIPT:
        raise UserError(
            f"{path}: a script of its own trained this run (RunRecord), so {what} needs that script: start it again "
            "with resume_from_checkpoint, on a copy of the folder if this one shall stay as it is"
        )


#: Entries of a `run.json` with their types; a dot separates nested names. The first six are required.
_SHAPE: dict[str, type | tuple[type, ...]] = {
    "corpus": dict, "corpus.name": str, "corpus.mirror": str, "model": dict, "model.name": str, "tokenizer": str,
    "run_id": str, "model.parameters": int, "sessions": list, "command": list, "max_steps": int,
}  # fmt: skip


def _refuse_another_shape(record: Any) -> None:
    """Raise ValueError if a value is not a `run.json` of this program; all entries must have the right type."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, not {type(record).__name__}")
    for number, (name, kind) in enumerate(_SHAPE.items()):
        value: Any = record
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"its {name} is not what this program writes there")
        if value is None and number < 6 and "run_id" in record:
            raise ValueError(f"it has no {name}")


def prepare(path: str, at_end: contextlib.ExitStack, resume: bool, overwrite: bool) -> RunFolder:
    """The folder of a starting run, created, tested for writing and locked; `at_end` unlocks it.

    Raises UserError if the folder already holds a run, if another run is using it, or if it cannot be written.
    """
    folder = RunFolder(Path(path).expanduser())
    try:
        refuse_links(folder)
        if not resume and not overwrite:
            _refuse_a_run(folder, path)
        folder.path.mkdir(parents=True, exist_ok=True)
        held = FolderLock(folder.path)
        at_end.callback(held.release)
        held.take()
        # Only with the lock: two starts at once would remove each other's file.
        files.write_whole(folder.path / "_writable", b"")
        (folder.path / "_writable").unlink(missing_ok=True)
        # A start that was killed while it replaced a run leaves something to settle.
        settle_replaced(folder)
        if not resume:
            _refuse_what_is_no_run(folder, path)
        if not resume and not overwrite:
            _refuse_a_run(folder, path)
        folder.viz.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path}: cannot be written ({error.strerror}); choose another folder") from None
    at_end.callback(settle_replaced, folder)
    return folder


def _refuse_a_run(folder: RunFolder, path: str) -> None:
    if folder.path.is_dir() and folder.holds_a_run():
        raise UserError(
            f"{path} holds a run already; go on with it: --resume_from_checkpoint true, "
            "or delete it and start anew: --overwrite_output_dir"
        )


def refuse_links(folder: RunFolder) -> None:
    """Raise UserError if a file that a run writes is a symbolic link: the run would write to its target."""
    for found in [*_written(folder, links=True), folder.path / lock.FILE_NAME, folder.path / "_outbox"]:
        if found.is_symlink():
            raise UserError(
                f"{found}: a link (to {os.readlink(found)}), and no file of a run; remove it, or choose another "
                "--output_dir"
            )


def _refuse_what_is_no_run(folder: RunFolder, path: str) -> None:
    """Raise UserError if files are there that a run would write or delete, but no `run.json` of ours shows that they
    are a run's."""
    with contextlib.suppress(UserError):
        if "run_id" in folder.read_record():
            return
    foreign = [found for found in _written(folder) if not (found.is_dir() and not any(found.iterdir()))]
    if foreign:
        raise UserError(
            f"{path} holds {foreign[0].name} and no run.json of this program: it is not known whose that is, and it is "
            "left alone; choose another --output_dir, or remove it by hand"
        )


def refuse_full_disk(folder: RunFolder, checkpoint_bytes: int) -> None:
    """Raise UserError if not even one checkpoint fits on the disk."""
    free = shutil.disk_usage(folder.path).free + _bytes_of(folder.path / REPLACED)
    if free < 1.1 * checkpoint_bytes:
        raise UserError(
            f"{folder.path}: {free / 1e6:,.0f} MB free, a checkpoint is {checkpoint_bytes / 1e6:,.0f} MB; "
            "make room, choose another folder, or add --no-checkpoint"
        )


#: Where a run that is being replaced is kept until the new one has made a step. One rename leads from each state to the
#: next, so that a kill at any moment loses nothing. The underscores keep these folders out of uploads.
REPLACED, MOVING, DELETED = "_replaced", "_moving", "_deleted"


def _written(folder: RunFolder, links: bool = False) -> list[Path]:
    """Everything that a run has written into its folder, and nothing else; with `links`, broken links too."""
    made = [checkpoints.path_of(folder.path, step) for step in checkpoints.steps(folder.path)]
    made += [
        folder.viz, folder.path / "_index", folder.path / "tensorboard", folder.ledger, folder.surprisals,
        *(folder.path / name for name in GROWING), folder.record, folder.config, folder.report,
        folder.path / MARK, folder.tokenizer, folder.initial_embeddings, folder.forgotten,
    ]  # fmt: skip
    return [path for path in made if path.exists() or (links and path.is_symlink())]


def begin_alike(old: RunFolder, new: RunFolder) -> None:
    """Let a run in `new` begin with the same embeddings as that in `old`."""
    if old.initial_embeddings.is_file():
        files.link_or_copy(str(old.initial_embeddings), str(new.initial_embeddings))


def put_aside(folder: RunFolder) -> None:
    """Make room for a new run. When that has a row in its ledger, `settle_replaced` deletes the old run; otherwise it
    restores the old one."""
    moving = folder.path / MOVING
    moving.mkdir(exist_ok=True)
    for path in _written(folder):
        path.rename(moving / path.name)
    moving.rename(folder.path / REPLACED)
    folder.viz.mkdir()


def settle_replaced(folder: RunFolder) -> None:
    """Keep either the new run, if it has made a step, or the run that it was to replace."""
    replaced, moving, deleted = (folder.path / name for name in (REPLACED, MOVING, DELETED))
    try:
        shutil.rmtree(deleted, ignore_errors=True)
        if replaced.exists() and _has_a_row(folder.ledger):
            replaced.rename(deleted)
            shutil.rmtree(deleted)
        elif replaced.exists() or moving.exists():
            _put_back(folder)
            screen.say(f"{folder.path}: the run that was to be replaced is back; the new one did not make a step")
    except OSError as error:
        screen.say(f"{folder.path}: the run that was to be replaced lies in {replaced.name} still ({error.strerror})")


def _put_back(folder: RunFolder) -> None:
    replaced, moving = folder.path / REPLACED, folder.path / MOVING
    if replaced.exists():
        for path in _written(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        replaced.rename(moving)
    for path in moving.iterdir():
        place = folder.path / path.name
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        path.rename(place)
    moving.rmdir()


def _has_a_row(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return file.readline().endswith(b"\n")


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resume_command(folder: Path, record: dict[str, Any]) -> str:
    """The command that continues a run, or the script if somebody else's made it. `record`: its `run.json`, which has
    the number of threads; accelerate by itself would use one on a CPU."""
    if record.get("made_by") == OF_A_SCRIPT:
        return " ".join(["python", *record.get("command", [])])
    threads = record.get("torch_threads")
    launch = f"accelerate launch --num_cpu_threads_per_process {threads}" if threads else "accelerate launch"
    processes = record.get("processes", 1)
    if processes > 1:
        launch += f" --multi_gpu --num_processes {processes}"
    return f"{launch} {TRAINING_PROGRAM} --config {folder / 'run_config.yaml'} --resume_from_checkpoint true"


def cut_to(source: RunFolder, target: RunFolder, steps: int) -> ledger.Kept:
    """Copy the records of the first `steps` steps of `source` into `target`, which may be the same folder: ledger,
    surprisals, and the lines of `GROWING`. Lines that cannot be read are left out, counted and reported.

    Raises `ledger.Damaged`, and changes nothing, if the ledger is not as it was written.
    """
    refuse_links(source)
    if source == target:
        kept = ledger.cut_back(target.ledger, steps)
    else:
        kept = ledger.check(source.ledger, steps)
        with open(source.ledger, "rb") as whole:
            target.ledger.write_bytes(whole.read(kept.bytes))
        if source.surprisals.is_file():
            shutil.copyfile(source.surprisals, target.surprisals)
    if target.surprisals.is_file() or source == target:
        damaged = surprisals.cut_back(target.surprisals, kept)
        if damaged:
            screen.say(
                f"{target.surprisals}: the tokens of {len(damaged):,} steps do not have their loss as their mean (the "
                f"first: step {damaged[0]}); their surprisals are dropped, the ledger is whole"
            )
    for name in GROWING:
        if (source.path / name).is_file():
            _cut_lines(source.path / name, target.path / name, steps)
    return kept


def lengths(folder: RunFolder) -> dict[str, int]:
    """The length of each file of `GROWING`, in bytes."""
    return {name: (folder.path / name).stat().st_size for name in GROWING if (folder.path / name).is_file()}


def sums(folder: RunFolder, first_bytes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """For the manifest of a checkpoint: the length and SHA-256 of each file of `GROWING` up to that length."""
    return {name: checkpoints.sum_of(folder.path / name, size) for name, size in first_bytes.items()}


def not_as_saved(folder: RunFolder, manifest: dict[str, Any]) -> list[str]:
    """The files of `GROWING` that no longer begin with the bytes that they had when a checkpoint was saved."""
    return [
        name
        for name, saved in manifest.get("beside", {}).items()
        if name in GROWING
        and not ((path := folder.path / name).is_file() and checkpoints.sum_of(path, saved["bytes"]) == saved)
    ]


def _cut_lines(source: Path, target: Path, steps: int) -> None:
    passed_over: list[str] = []
    kept = [line for line, entry in files.json_lines(source, passed_over) if _is_before(source.name, entry, steps)]
    content = b"".join(kept)
    if source != target or len(content) != source.stat().st_size:
        files.write_whole(target, content)
    if passed_over:
        screen.say(
            f"{source}: {len(passed_over):,} lines cannot be read and are left out (the first: {passed_over[0]}); "
            "what is computed does not depend on them"
        )


def _is_before(name: str, entry: dict[str, Any], steps: int) -> bool:
    step = entry.get("step")
    # Scores are taken after a step: those of step N belong to checkpoint N.
    return isinstance(step, int) and (step < steps or (name == EVALUATIONS and step == steps))
