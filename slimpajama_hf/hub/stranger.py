"""A run that another user or another machine began: what is taken from its folder, and what is not.

What decides its numbers is taken: model, tokenizer, corpus, seed, rates. File names are not, because they mean nothing
here. The tokenizer and the model's configuration come from its checkpoint, and whoever goes on with it names a corpus
of local files again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf.corpus import local_files
from slimpajama_hf.corpus.shards import printable, url_of
from slimpajama_hf.errors import UserError
from slimpajama_hf.settings import what_matters
from slimpajama_hf.settings.settings import Stranger
from slimpajama_hf.settings.what_matters import what_decides

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder


#: Beginnings of the names of a tokenizer's files in a checkpoint.
_OF_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")


def look_at(
    folder: RunFolder, config: Mapping[str, Any], checkpoint: Path | None, dataset: str | None
) -> tuple[dict[str, Any], Stranger]:
    """Return the configuration of a foreign run, reduced to what decides its numbers, and a `Stranger` that says what
    was taken. `dataset`: the corpus that the user named now. Files that it needs are copied from the checkpoint into
    the folder."""
    taken = what_decides(config)
    left = sorted(config.keys() - taken.keys())
    record = folder.read_record()
    if record.get("config_sha256", what_matters.digest(config)) != what_matters.digest(config):
        raise UserError(
            f"{folder.config}: what decides the numbers of this run was changed in it; put it back, and change a run "
            "that goes on by flags and --allow_changes"
        )
    if dataset is not None:
        taken["dataset"] = dataset
    if checkpoint is not None:
        taken |= names_here(taken, record, checkpoint, folder.path)
    return taken, Stranger(dataset, tuple(sorted(taken)), tuple(left))


def names_here(config: Mapping[str, Any], record: dict[str, Any], checkpoint: Path, folder: Path) -> dict[str, str]:
    """Return replacements for a tokenizer and a model that were files elsewhere: copies from the checkpoint, in
    `folder`."""
    changed: dict[str, str] = {}
    if _was_a_path(str(config.get("tokenizer", "auto")), str(record.get("tokenizer"))):
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        for path in checkpoint.iterdir():
            if path.name.startswith(_OF_TOKENIZER) and not path.is_symlink():
                shutil.copyfile(path, folder / "tokenizer" / path.name)
        changed["tokenizer"] = str(folder / "tokenizer")
    if str(config.get("model", "")).endswith(".json"):
        shutil.copyfile(checkpoint / "config.json", folder / "model_config.json")
        changed["model"] = str(folder / "model_config.json")
    return changed


def _was_a_path(asked: str, recorded: str) -> bool:
    """Whether a tokenizer was a folder or a file. A Hub id and `builtin` are the same everywhere."""
    name = recorded if asked == "auto" else asked
    if name in ("builtin", "gpt2"):
        return False
    return name.endswith((".model", ".json")) or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or os.path.exists(name)


def corpus_here(corpus: dict[str, Any], dataset: str | None, asked: str) -> dict[str, Any]:
    """Return the corpus of its `run.json` with the files of this machine. `asked`: what the user typed to go on.

    Raises UserError if local files are not named again, and for urls outside the corpus' own repository.
    """
    try:
        entries = [[str(entry[0]), str(entry[1]), *entry[2:]] for entry in corpus["files"]]
        mirror = str(corpus["mirror"])
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{asked}: its run.json does not say which corpus it reads; the run cannot go on") from None
    if mirror == "local":
        here = _find_local([entry[0] for entry in entries], dataset, asked)
        files = [[name, here[name], *rest] for name, _, *rest in entries]
        return corpus | {"files": files, "name": dataset}
    if mirror == "embedded":
        # The path does not exist, so the corpus is built again from this Python, and compared.
        return corpus | {"files": [[name, f"/nowhere/{name}", *rest] for name, _, *rest in entries]}
    repo = mirror.partition("@")[0]
    for _, url, *_ in entries:
        match = re.fullmatch(r"hf://datasets/([^@]+)@[\w.-]+/(.+)", url)
        if match is None or match[1] != repo or ".." in match[2].split("/"):
            raise UserError(
                f"{asked}: its run.json says that it reads {repo}, and names {url!r}; it is not gone on with"
            )
    return corpus


def _find_local(names: list[str], dataset: str | None, asked: str) -> dict[str, str]:
    """Shard name -> file on this machine, matched by the ends of their paths. Opening checks that they are the same."""
    found = local_files.find(dataset).paths if dataset else []
    here = {
        name: [path for path in found if Path(printable(path)).parts[-len(Path(name).parts) :] == Path(name).parts]
        for name in names
    }
    missing = [name for name, paths in here.items() if len(paths) != 1]
    if missing:
        raise UserError(
            f"{asked}: this run was begun elsewhere, or before this program marked whose a run is, and reads "
            f"{len(names):,} local files ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); name them on "
            "this machine with --dataset 'folder/*.jsonl.zst'"
        )
    return {name: url_of(os.path.abspath(paths[0])) for name, paths in here.items()}
