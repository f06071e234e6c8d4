"""Checkpoints that are complete or absent: staged, verified by a manifest, renamed; chosen by step number."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimpajama_hf import files, screen
from slimpajama_hf.errors import UserError

MANIFEST = "manifest.json"
DATA_STATE = "data_state.json"

#: Folders with this prefix are being written or were set aside. Uploads and the search for checkpoints ignore them.
STAGING = "_staging"

#: A checkpoint that is being removed has this prefix in its name, so that half of one is never taken for a whole one.
REMOVING = "_removing"


def path_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def sum_of(path: Path, first_bytes: int | None = None) -> dict[str, Any]:
    """`bytes` and `sha256` of a file, or of its first `first_bytes`. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(2**20 if first_bytes is None else min(2**20, first_bytes - size)):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _members(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


@contextlib.contextmanager
def staged(run: Path, step: int, about: dict[str, Any]) -> Iterator[Path]:
    """Context to write `checkpoint-<step>`; on leaving, it is synced, given its manifest and renamed into place.

    Yields the parent of that folder, as transformers needs it. After an error nothing of it remains. The manifest
    includes `about` as it is on leaving.
    """
    parent = run / f"{STAGING}.{os.getpid()}"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir(parents=True)
    try:
        yield parent
        folder = path_of(parent, step)
        content = {}
        for path in _members(folder):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            content[str(path.relative_to(folder))] = sum_of(path)
        files.write_json(folder / MANIFEST, {"step": step, **about, "files": content}, indent=1)
        files.sync_folder(folder)
        target = path_of(run, step)
        if target.exists():
            # The same step saved again: the old one is moved only when the new one is complete.
            os.rename(target, parent / "replaced")
        os.rename(folder, target)
        files.sync_folder(run)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def is_plain(name: Any) -> bool:
    """Whether the name of a file leads to a place inside its folder; a manifest may come from somebody else."""
    parts = name.split("/") if isinstance(name, str) else [""]
    return "\\" not in name and "\0" not in name and not {"..", ".", ""} & set(parts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError, in a few words, if there is no valid one.

    `files`: the sum (`sum_of`) of each file of the checkpoint; `beside`: those of the files that the run appends to.
    """
    try:
        manifest = files.strict_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("it has no manifest") from None
    except (OSError, ValueError):
        raise ValueError("its manifest cannot be read") from None
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    beside = manifest.get("beside", {}) if isinstance(manifest, dict) else None
    if not (isinstance(entries, dict) and isinstance(beside, dict) and type(manifest.get("step")) is int):
        raise ValueError("its manifest is not one of ours")
    for name, entry in (*entries.items(), *beside.items()):
        if not is_plain(name):
            raise ValueError(f"its manifest names {name!r}, which is no file of it")
        if not (isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)):
            raise ValueError(f"its manifest does not say what {name} holds")
    return manifest


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every byte is as its manifest says."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.name != f"checkpoint-{manifest['step']}":
        return f"its manifest is of step {manifest['step']}"
    for name, expected in manifest["files"].items():
        path = folder / name
        linked = next((each for each in (path, *path.parents) if each != folder and each.is_symlink()), None)
        if linked is not None and folder in linked.parents:
            return f"{linked.relative_to(folder)} is a link"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if sum_of(path)["sha256"] != expected["sha256"]:
            return f"{name} is not what was saved (its SHA-256 differs)"
    return None


def lacks(folder: Path) -> list[str]:
    """What a checkpoint lacks for an exact resume; empty if nothing."""
    optimizer = any(path.name.startswith("optimizer") for path in folder.iterdir())
    schedule = (folder / "scheduler.pt").is_file()
    return ["the optimizer's state"] * (not optimizer) + ["scheduler.pt"] * (not schedule)


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, ascending."""
    found = (
        re.fullmatch(r"checkpoint-(0|[1-9]\d{0,11})", path.name) for path in run.glob("checkpoint-*") if path.is_dir()
    )
    return sorted(int(match.group(1)) for match in found if match)


def newest_good(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None if there is none), and what was wrong with the newer ones."""
    complaints: list[str] = []
    for step in reversed(steps(run)):
        folder = path_of(run, step)
        wrong = problem(folder)
        if wrong is None:
            return folder, complaints
        complaints.append(f"{folder}: {wrong}")
    return None, complaints


def newest_before_trouble(run: Path) -> Path | None:
    """The newest checkpoint that was not saved while losses or gradients were not finite; None if there is none."""
    for step in reversed(steps(run)):
        try:
            manifest = read_manifest(path_of(run, step))
        except ValueError:
            continue
        if not manifest.get("not_finite_in_a_row"):
            return path_of(run, step)
    return None


def keep_newest(run: Path, limit: int | None, spared: Path | None = None) -> None:
    """Remove all but the `limit` newest checkpoints, by step number, and `spared`. One that cannot be removed is
    reported and tried again by the next call."""
    if limit is None or limit <= 0:
        return
    for step in steps(run)[:-limit]:
        if path_of(run, step) != spared:
            try:
                os.rename(path_of(run, step), run / f"{REMOVING}.{step}")
            except OSError as error:
                screen.say(f"{path_of(run, step)}: cannot be removed ({error.strerror}); the next save tries again")
    remove_halves(run)


def remove_halves(run: Path) -> None:
    """Remove what is left of checkpoints that were being removed; what cannot be removed is reported."""
    for going in sorted(run.glob(f"{REMOVING}.*")):
        try:
            shutil.rmtree(going)
        except OSError as error:
            screen.say(f"{going}: cannot be removed ({error.strerror}); the next save tries again")


def resolve(place: str) -> Path:
    """The checkpoint folder at `place`, or the newest good one of the run folder there. Raises UserError."""
    folder = Path(place)
    if not folder.is_dir():
        raise UserError(f"{place}: no such folder; expected a run folder or one of its checkpoint-N")
    if (folder / "config.json").is_file():
        return folder
    newest, complaints = newest_good(folder)
    if newest is None:
        found = "; ".join(complaints) or "it holds no checkpoint-N"
        raise UserError(f"{place}: no checkpoint to load ({found})")
    return newest
