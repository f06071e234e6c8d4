"""From a run folder back to a running trainer: find the checkpoint, and cut everything back to its step."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import devices, files, screen
from slimpajama_hf.corpus import opening, unchanged
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.errors import UserError
from slimpajama_hf.hub import stranger
from slimpajama_hf.record import checkpoints, ledger, run_folder
from slimpajama_hf.record.run_folder import RunFolder, put_aside
from slimpajama_hf.session import held_out_documents
from slimpajama_hf.settings.update_rules import ADAMW
from slimpajama_hf.settings.what_matters import WHAT_MATTERS

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.processes import Processes
    from slimpajama_hf.training.signals import StopSignals


#: Number of rows that the policies on spikes and skipped updates look back at.
ROWS_REMEMBERED = 200


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on. `checkpoint` is None at the very start."""

    checkpoint: Path | None = None
    step: int = 0
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    chain: str = ledger.CHAIN_START
    rows: tuple[dict[str, Any], ...] = ()
    """The last rows before `step`, at most `ROWS_REMEMBERED`."""
    predicted: int = 0
    """Tokens predicted before `step`."""
    not_as_saved: tuple[str, ...] = ()
    """Files beside the ledger that were changed after the checkpoint was saved."""


def is_asked(asked: str | bool | None) -> bool:
    """Whether `--resume_from_checkpoint` asks for a resume."""
    return asked is not None and str(asked).lower() != "false"


def refuse_run_folder(asked: str) -> None:
    """Raise UserError if `--resume_from_checkpoint` names the folder of a run instead of a checkpoint in it."""
    if asked.lower() != "true" and Path(asked).is_dir() and RunFolder(Path(asked)).holds_a_run():
        raise UserError(
            f"--resume_from_checkpoint {asked}: the folder of a run, not one of its checkpoints; to go on with it: "
            f"--output_dir {asked} --resume_from_checkpoint true"
        )


def checkpoint_of(asked: str | bool | None, output_dir: str) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` means. `true` is the newest good one of the folder, if any.

    With `true`, checkpoints that do not verify are renamed, and the screen says so. Raises UserError for a path that is
    not a good checkpoint.
    """
    if not is_asked(asked):
        return None
    if str(asked).lower() == "true":
        newest = _newest_good(Path(output_dir))
        if newest is not None:
            _refuse_model_alone(newest)
        return newest
    folder = Path(str(asked))
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {asked}: no such folder; expected true or a checkpoint-N of a run")
    wrong = checkpoints.problem(folder) or _unloadable(folder)
    if wrong is not None:
        raise UserError(f"--resume_from_checkpoint {asked}: not a whole checkpoint: {wrong}")
    if folder.resolve().parent != Path(output_dir).resolve():
        raise UserError(
            f"--resume_from_checkpoint {asked}: it is of the run in {folder.parent}; add --output_dir {folder.parent}"
        )
    _refuse_model_alone(folder)
    return folder


def _refuse_model_alone(folder: Path) -> None:
    """Raise UserError for a checkpoint without its optimizer or schedule, which would silently begin anew."""
    lacking = checkpoints.lacks(folder)
    if lacking:
        raise UserError(
            f"{folder}: it lacks {' and '.join(lacking)} (--save_only_model true saves the model alone), so the run "
            "cannot go on from it; name an older whole checkpoint, or start anew in another --output_dir"
        )


def _newest_good(run: Path) -> Path | None:
    for unfinished in run.glob(f"{checkpoints.STAGING}.*"):
        shutil.rmtree(unfinished, ignore_errors=True)
        done = "cannot be removed" if unfinished.exists() else "removed"
        screen.say(f"{unfinished}: {done}; it is a save that was cut short, and the checkpoint before it is whole")
    checkpoints.remove_halves(run)
    for step in reversed(checkpoints.steps(run)):
        folder = checkpoints.path_of(run, step)
        wrong = checkpoints.problem(folder) or _unloadable(folder)
        if wrong is None:
            return folder
        aside = run / f"_bad-{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        os.rename(folder, aside)
        screen.say(f"{folder}: {wrong}; set aside as {aside.name}, going on from the one before it")
    return None


def _unloadable(folder: Path) -> str | None:
    """What is wrong with a checkpoint whose bytes match its manifest but which cannot be loaded; None: nothing."""
    import torch

    try:
        cursor_of(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{checkpoints.DATA_STATE} does not say where reading goes on"
    for name in ("optimizer.pt", "scheduler.pt"):
        if (folder / name).is_file():
            try:
                # weights_only runs no code from the file; mmap reads nothing large.
                torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                return f"{name} cannot be loaded ({type(error).__name__})"
    return None


def cursor_of(folder: Path) -> Cursor:
    """Return where reading goes on after a checkpoint. Raises OSError, ValueError, KeyError or TypeError."""
    state = files.strict_json((folder / checkpoints.DATA_STATE).read_text(encoding="utf-8"))
    cursor = Cursor(**state["cursor"])
    numbers = (value for name, value in dataclasses.asdict(cursor).items() if name != "shard")
    if not isinstance(cursor.shard, str | None) or not all(type(each) in (int, bool) and each >= 0 for each in numbers):
        raise ValueError("a place that is none")
    return cursor


def flags_of_run(config: Mapping[str, Any], folder: RunFolder) -> list[str]:
    """Turn a run's `run_config.yaml` into flags.

    Older versions lacked some flags, so their defaults of that time are added. Whatever an older run says of
    `--hidden_optim`, its sharded matrices learned by AdamW.
    """
    from slimpajama_hf.settings.flags import config_to_argv

    if "embedding_moment" not in config and config.get("optim", ADAMW[0]) not in ADAMW:
        # Beside another optimizer it had no effect then.
        config = {name: value for name, value in config.items() if name != "hidden_rate"}
    flags = config_to_argv(dict(config), str(folder.config))
    if "embedding_moment" not in config:
        flags = ["--embedding_moment", "element", *flags]
    if "init_embeddings" not in config:
        flags = ["--init_embeddings", "random", *flags]
    if "hidden_optim" in config:
        by_adamw = devices.is_sharded() and "muon_on_shards" not in folder.read_record()
        return [*flags, "--hidden_optim", "adamw"] if by_adamw else flags
    return ["--hidden_optim", "adamw", *([] if "hidden_rate" in config else ["--hidden_rate", "1"]), *flags]


def refuse_changes(settings: Settings, recorded: Settings) -> None:
    """Raise UserError if a resume changes what matters. The message has the name and both values of each change."""
    allowed = {name.strip() for name in (settings.run.allow_changes or "").split(",") if name.strip()}
    unknown = allowed - set(WHAT_MATTERS)
    if unknown:
        raise UserError(f"--allow_changes {sorted(unknown)[0]}: expected one or more of {', '.join(WHAT_MATTERS)}")
    changes = []
    for name in WHAT_MATTERS:
        before, now = recorded.value(name), settings.value(name)
        if name == "embedding_moment":
            before, now = recorded.rules.embedding_moment, settings.rules.embedding_moment
        if before != now and name in ("hidden_optim", "embedding_moment"):
            raise UserError(
                f"--{name} {now}: this run was begun with {before}, and what that has kept of the gradients is "
                "of no use to another; leave it out to go on, or start a run in another --output_dir"
            )
        if before != now and name == "init_embeddings":
            raise UserError(
                f"--init_embeddings {now}: this run has begun, with {before}; leave it out to go on, or start a run in "
                "another --output_dir"
            )
        if before != now and name not in allowed:
            changes.append((name, before, now))
    if changes:
        listed = ", ".join(f"--{name} {now} (begun with {before})" for name, before, now in changes)
        names = ",".join(name for name, _, _ in changes)
        raise UserError(
            f"{settings.output_dir}: this run was begun otherwise: {listed}; leave them out to go on with it as it is, "
            f"or add --allow_changes {names}"
        )


def corpus_of(settings: Settings, folder: RunFolder, waiting: Callable[[str], None]) -> Corpus:
    """Return the corpus of a run that starts, or the one that a resumed run recorded, if it is unchanged."""
    data = settings.data
    if is_asked(settings.training.resume_from_checkpoint) and folder.record.is_file():
        described = folder.read_record()["corpus"]
        if settings.stranger is not None:
            described = stranger.corpus_here(described, settings.stranger.dataset, str(folder.path))
        # Changes of these two were refused already, unless they were allowed by name.
        allowed = {name.strip() for name in (settings.run.allow_changes or "").split(",")}
        if "txt_documents" in allowed:
            described = described | {"txt_documents": data.txt_documents}
        if "eval_fraction" in allowed:
            described = described | {"held_out_fraction": data.eval_fraction}
        return unchanged.check_unchanged(unchanged.recorded(described), waiting)
    corpus = opening.open_corpus(
        data.dataset,
        text_column=data.text_column,
        split=data.dataset_split,
        config_name=data.dataset_config_name,
        revision=data.dataset_revision,
        skip_broken_shards=data.skip_broken_shards,
        txt_documents=data.txt_documents,
        waiting=waiting,
    )
    if held_out_documents.holds_out(settings, corpus):
        return dataclasses.replace(corpus, held_out_fraction=data.eval_fraction)
    return corpus


def stream_of(
    settings: Settings,
    record: dict[str, Any],
    corpus: Corpus,
    encoder: Encoder,
    team: Processes,
    point: ResumePoint,
    signals: StopSignals,
) -> SampleStream:
    """Return the samples of a run from where it begins or goes on. `record`: its `run.json`."""
    return stream_as_asked(
        settings,
        corpus,
        encoder,
        world_size=team.world_size,
        rank=team.rank,
        accumulated=settings.training.gradient_accumulation_steps,
        short_text_characters=record.get("short_text_characters"),
        machine=team.machine() if settings.data.sample_mode != "truncate" else None,
        start=point.cursor,
        stop=lambda: signals.received is not None and team.world_size == 1,
    )


def stream_as_asked(settings: Settings, corpus: Corpus, encoder: Encoder, **more: Any) -> SampleStream:
    """Return the samples of a corpus as the flags of a run ask, for one process unless `more` says otherwise."""
    from slimpajama_hf.samples.stream import SampleStream

    data = settings.data
    return SampleStream(
        corpus,
        encoder,
        data.sample_mode,
        data.max_seq_length,
        shuffle_buffer=data.shuffle_buffer,
        seed=settings.training.seed,
        epochs=data.epochs,
        skip_broken_shards=data.skip_broken_shards,
        patience_seconds=data.stream_patience,
        leave_out=data.leave_out or (),
        **more,
    )


def precision_of(settings: Settings, folder: RunFolder, model: Any) -> str:
    """Return the precision of a run that starts, or the one in which a resumed run was computed so far.

    In a resumed run `auto` means the precision that the run began with, on whatever device it goes on.
    """
    from slimpajama_hf import precision
    from slimpajama_hf.training.backward import why_autograd

    training, run = settings.training, settings.run
    goes_on = is_asked(training.resume_from_checkpoint) and folder.record.is_file()
    if not goes_on or "precision" in (run.allow_changes or "").split(","):
        return precision.choose(settings.model.precision, training.device)
    described = folder.read_record()["model"]
    # Older versions did not look: they recorded bfloat16, but autograd's steps were computed in float32.
    looked = "computed_in" in described
    if looked or described["precision"] == "float32" or why_autograd(training, model, settings.model.backward) is None:
        return described["precision"]
    screen.say("this run was computed in float32, whatever its plan said, and goes on in float32")
    return "float32"


def begin(folder: RunFolder) -> ResumePoint:
    """Begin a run in its folder. A run that is there already is put aside (`--overwrite_output_dir`)."""
    if folder.holds_a_run():
        put_aside(folder)
    return ResumePoint()


def go_on(folder: RunFolder, checkpoint: Path | None) -> ResumePoint:
    """Cut the records of a run back to a checkpoint (None: to nothing), and return where reading goes on."""
    point = ResumePoint()
    if checkpoint is not None:
        manifest = checkpoints.read_manifest(checkpoint)
        changed = tuple(run_folder.not_as_saved(folder, manifest))
        point = ResumePoint(checkpoint, manifest["step"], cursor_of(checkpoint), not_as_saved=changed)
        for name in changed:
            screen.say(
                f"{folder.path / name}: what it held at {checkpoint.name} was changed, or is gone; what is computed "
                "does not depend on it, and run.json notes it"
            )
    try:
        kept = run_folder.cut_to(folder, folder, point.step)
    except ledger.Damaged as error:
        raise UserError(f"{error}; {_before(folder, error.step)}") from None
    rows = tuple(ledger.last_rows(folder.ledger, ROWS_REMEMBERED))
    return dataclasses.replace(point, chain=kept.chain, predicted=int(kept.predicted.sum()), rows=rows)


def _before(folder: RunFolder, damaged: int) -> str:
    """What to type to go on from before a step whose row is damaged."""
    good = [step for step in checkpoints.steps(folder.path) if step <= damaged]
    if good:
        return f"go on from before it: --resume_from_checkpoint {checkpoints.path_of(folder.path, good[-1])}"
    return "no checkpoint lies before it; start anew with --overwrite_output_dir"
