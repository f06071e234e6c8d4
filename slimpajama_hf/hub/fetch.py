"""Bring a pushed run back from the Hub, into a fresh folder: `--resume_from_checkpoint me/run[@revision]`.

The files are collected in `OUTPUT_DIR/_incoming`, checked byte by byte against the checkpoint's manifest and row by row
against the ledger's hash chain, and then moved. After a kill, the same command finishes the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from slimpajama_hf import files
from slimpajama_hf.corpus import hub_files
from slimpajama_hf.corpus.patience import Patience
from slimpajama_hf.errors import UserError
from slimpajama_hf.hub import stranger
from slimpajama_hf.hub.account import why
from slimpajama_hf.hub.staging import STATE
from slimpajama_hf.record import checkpoints, ledger, surprisals
from slimpajama_hf.record.run_folder import GROWING, RunFolder
from slimpajama_hf.screen import Waiting
from slimpajama_hf.settings.yaml_file import read_config

#: Folder in which a run is put together before it is moved to its place.
INCOMING = "_incoming"

#: Notes the last fetch into a folder. A second process of the same launch takes that as it is.
_FETCHED = "_fetched.json"

#: Files of a run that a resume needs, and all files that are fetched if they were pushed.
_NEEDED = ("run.json", "run_config.yaml", ledger.FILE_NAME)
_RUN_FILES = (*_NEEDED, surprisals.FILE_NAME, *GROWING)

#: Seconds to wait for a Hub that fails.
_PATIENCE_SECONDS = 120.0


def is_repo(asked: str) -> bool:
    """Whether `--resume_from_checkpoint` names a repository, as `me/run` or `me/run@revision`, and no folder here."""
    name, _, revision = asked.partition("@")
    if re.search(r"(^|/)checkpoint-\d+$", asked) or os.path.exists(asked) or (not revision and files.looks_local(name)):
        # This is a folder, existing or mistyped, so the Hub is not asked.
        return False
    return re.fullmatch(r"[\w][\w.-]*/[\w.-]+(@[^@\s]+)?", asked) is not None


def folder_for(asked: str) -> str:
    """Where a run from the Hub goes on without `--output_dir`: `runs/<its name>`."""
    return str(Path("runs") / asked.partition("@")[0].rpartition("/")[2])


def fetch(asked: str, output_dir: str, dataset: str | None, token: str | None) -> Path:
    """Fetch the checkpoint of `asked` and the records of its run into `output_dir`. Returns the checkpoint's folder.

    `dataset`: where the corpus is on this machine, for a run on local files. Raises UserError if the folder already
    holds a run, if the repository is missing or has nothing to resume from, and for bytes that are not those that were
    saved.
    """
    folder = Path(output_dir).expanduser()
    with Waiting(f"fetching {asked} from the Hub") as waiting, _one_at_a_time(folder):
        repo, _, revision = asked.partition("@")
        commit, names = _look(repo, revision or None, token)
        already = _already(folder, repo, commit)
        if already is not None:
            return already
        incoming = folder / INCOMING
        if not (incoming / "ready").exists():
            if RunFolder(folder).holds_a_run():
                raise UserError(
                    f"{output_dir} holds a run already; go on with that one: --resume_from_checkpoint true, or fetch "
                    f"{repo} into another --output_dir"
                )
            step = _put_together(incoming, repo, commit, names, token, waiting)
            _settle_here(incoming / "run", folder, step, dataset, asked)
            (incoming / "ready").write_text(str(step), encoding="utf-8")
        return _move(incoming, folder, repo, commit)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of several processes of one launch, let the first fetch the run. The others then find it done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / "_fetching")
        with contextlib.suppress(NotImplementedError):
            lock.acquire()
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def _look(repo: str, revision: str | None, token: str | None) -> tuple[str, list[str]]:
    """Return the commit of a revision, and the names of its files."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi(token=token).model_info(repo, revision=revision, timeout=hub_files.REQUEST_TIMEOUT)

    try:
        info = hub_files.persistently(ask, f"{repo} on the Hub", Patience(_PATIENCE_SECONDS, visible=False))
    except UserError:
        raise
    except Exception as error:
        at = f"@{revision}" if revision else ""
        raise UserError(
            f"--resume_from_checkpoint {repo}{at}: no such folder here, and on the Hub it does not open "
            f"({why(error)}); expected true, a checkpoint-N of a run, or the name of a pushed run as me/run (log in "
            "for a private one: hf auth login)"
        ) from None
    names = [sibling.rfilename for sibling in info.siblings or []]
    if f"{STATE}/{checkpoints.MANIFEST}" not in names or any(name not in names for name in _NEEDED):
        has = "a model" if "config.json" in names else "no model"
        raise UserError(
            f"--resume_from_checkpoint {repo}: it holds {has}, but not what resuming needs ({STATE}/ and the ledger); "
            "expected a run pushed with --hub_strategy checkpoint"
        )
    return str(info.sha), names


def _put_together(incoming: Path, repo: str, commit: str, names: list[str], token: str | None, waiting: Waiting) -> int:
    """Download into `incoming/files`, make a run folder in `incoming/run`, check it. Returns the checkpoint's step."""
    shutil.rmtree(incoming / "run", ignore_errors=True)

    def get(name: str) -> Path:
        waiting(f"fetching {name} of {repo}")
        return _download(repo, commit, name, incoming / "files", token)

    manifest_path = get(f"{STATE}/{checkpoints.MANIFEST}")
    try:
        manifest = checkpoints.read_manifest(manifest_path.parent)
    except ValueError as error:
        raise UserError(f"--resume_from_checkpoint {repo}: {STATE}/ cannot be gone on with: {error}") from None
    step: int = manifest["step"]
    run = incoming / "run"
    checkpoint = checkpoints.path_of(run, step)
    checkpoint.mkdir(parents=True)
    for name in manifest["files"]:
        # Take the file as it was saved, if the root has a more portable form of it.
        source = f"{STATE}/{name}" if f"{STATE}/{name}" in names else name
        if source not in names:
            raise UserError(
                f"--resume_from_checkpoint {repo}@{commit[:12]}: {source} is missing; try the commit before it, as "
                f"{repo}@COMMIT"
            )
        target = checkpoint / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(get(source), target)
    os.replace(manifest_path, checkpoint / checkpoints.MANIFEST)
    for name in _RUN_FILES:
        if name in names:
            os.replace(get(name), run / name)
    waiting(f"checking {repo}")
    wrong = checkpoints.problem(checkpoint) or _wrong_in_ledger(run / ledger.FILE_NAME, step, manifest.get("chain"))
    if wrong is not None:
        shutil.rmtree(incoming, ignore_errors=True)
        raise UserError(
            f"--resume_from_checkpoint {repo}@{commit[:12]}: {wrong}; try again, or the commit before it, as "
            f"{repo}@COMMIT"
        )
    return step


def _download(repo: str, commit: str, name: str, into: Path, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    def ask() -> str:
        return hf_hub_download(repo, name, revision=commit, local_dir=into, token=token)

    try:
        return Path(hub_files.persistently(ask, f"{repo}: {name}", Patience(_PATIENCE_SECONDS)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--resume_from_checkpoint {repo}: {name} cannot be fetched ({why(error)}); try again"
        ) from None


def _wrong_in_ledger(path: Path, step: int, chain: str | None) -> str | None:
    """What is wrong with the fetched ledger; None if each row's hash is right and they lead to the checkpoint's."""
    try:
        last = ledger.check(path, step).chain
    except ledger.Damaged as error:
        return str(error)
    if chain is not None and last != chain:
        return f"its ledger is not that of its checkpoint (step {step:,})"
    return None


def _settle_here(run: Path, folder: Path, step: int, dataset: str | None, asked: str) -> None:
    """Replace names of files on the other machine by files on this one: the corpus, the tokenizer, the model."""
    config_path = run / "run_config.yaml"
    try:
        record, config = RunFolder(run).read_record(), read_config(str(config_path))
    except UserError as error:
        shutil.rmtree(run.parent, ignore_errors=True)
        # Name the file as in the repository, because the folder on this machine is gone.
        said = str(error).removeprefix("--config ").replace(f"{run}/", "")
        raise UserError(
            f"--resume_from_checkpoint {asked}: {said}; try again, or the commit before it, as "
            f"{asked.partition('@')[0]}@COMMIT"
        ) from None
    changed: dict[str, str] = {}
    record["corpus"] = stranger.corpus_here(record["corpus"], dataset, f"--resume_from_checkpoint {asked}")
    if record["corpus"]["mirror"] == "local":
        changed["dataset"] = record["corpus"]["name"]
    # These files are moved into the folder with all others.
    found = stranger.names_here(config, record, checkpoints.path_of(run, step), run)
    changed |= {name: str(folder / Path(path).name) for name, path in found.items()}
    record["tokenizer"] = changed.get("tokenizer", record["tokenizer"])
    record["model"]["name"] = changed.get("model", record["model"]["name"])
    files.write_json(run / "run.json", record, indent=1)
    lines = [
        line if (name := line.partition(": ")[0]) not in changed else f"{name}: {json.dumps(changed[name])}"
        for line in config_path.read_text(encoding="utf-8").splitlines()
    ]
    files.write_whole(config_path, "\n".join(lines) + "\n")


def _move(incoming: Path, folder: Path, repo: str, commit: str) -> Path:
    """Move all of `incoming/run` into the run folder, the checkpoint last. Finishes an interrupted move too."""
    step = int((incoming / "ready").read_text(encoding="utf-8"))
    run = incoming / "run"
    checkpoint = checkpoints.path_of(folder, step)
    for path in sorted(run.iterdir(), key=lambda path: path.name.startswith("checkpoint-")):
        os.rename(path, folder / path.name)
    files.write_json(
        folder / _FETCHED,
        {"repo": repo, "commit": commit, "step": step, "ledger": _sha1(folder / ledger.FILE_NAME)},
    )
    shutil.rmtree(incoming, ignore_errors=True)
    files.sync_folder(folder)
    return checkpoint


def _already(folder: Path, repo: str, commit: str) -> Path | None:
    """The checkpoint, if this commit was fetched into the folder already and no step was trained since; else None."""
    try:
        fetched = files.read_json(folder / _FETCHED)
        same = (fetched["repo"], fetched["commit"]) == (repo, commit)
        if same and fetched["ledger"] == _sha1(folder / ledger.FILE_NAME):
            checkpoint = checkpoints.path_of(folder, fetched["step"])
            return checkpoint if checkpoint.is_dir() else None
    except (OSError, ValueError, KeyError):
        pass
    return None


def _sha1(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha1(file.read()).hexdigest()
