"""The content of a push: the model at the root, the run as it was at that step, and what resuming needs.

    README.md  config.json  model.safetensors  tokenizer.json ...             loads as it is
    ledger.jsonl  run.json  run_config.yaml  report.html  training_viz/ ...   a clone is a run folder
    checkpoint/  (optimizer, schedule, random state, cursor, manifest)        for resuming

The records of a run grow while a checkpoint waits. Here they are cut at its step, chart and report are made from the
rest, and paths of this machine are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from slimpajama_hf import files, report
from slimpajama_hf.model import averaging
from slimpajama_hf.record import checkpoints, evaluations, ledger, run_folder
from slimpajama_hf.record.columns import read_columns
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.training import saved_model
from slimpajama_hf.views import model_card, views

if TYPE_CHECKING:
    from slimpajama_hf.record import columns


#: Folder in the repository for what resuming needs beside the model.
STATE = "checkpoint"

#: Files of a checkpoint that `from_pretrained` asks for. They go to the root.
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "*.spm", "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_templates/*",
)  # fmt: skip

#: Files that an earlier push may have left. They are deleted if this push does not have them, because an old shard of
#: weights or an old tokenizer would still be loaded. Everything else in the repository stays as it is.
OURS = (
    *MODEL_FILES,
    f"{STATE}/*",
    f"{averaging.FOLDER}/*",
    "report.html",
    "evaluations.jsonl",
    "passports.jsonl",
    "prompts.jsonl",
)


class NotOfThisRun(Exception):
    """The checkpoint does not belong to the run's ledger: the run was started anew, or went back and changed."""


@dataclasses.dataclass(frozen=True)
class Push:
    """Everything that is uploaded for one checkpoint."""

    step: int
    chain: str
    run_id: str
    paths: dict[str, Path]
    """Path in the repository -> file here."""
    bytes: int
    trouble: list[str]
    """What could not be made (a chart, a report) and is missing."""


def prepare(
    checkpoint: Path, run: RunFolder, scratch: Path, repo: str, with_state: bool, license: str | None = None
) -> Push:
    """Prepare the upload of `checkpoint` in the folder `scratch`, which is replaced.

    The model card names `repo`. Raises NotOfThisRun, OSError, and UserError for a run folder that cannot be read.
    """
    manifest = files.read_json(checkpoint / checkpoints.MANIFEST)
    step, record = manifest["step"], run.read_record()
    if manifest.get("run_id") != record["run_id"]:
        raise NotOfThisRun(f"checkpoint-{step} is of another run than the one in {run.path}")
    shutil.rmtree(scratch, ignore_errors=True)
    # Named like its repository, because the report shows the name of its folder.
    cut = RunFolder(scratch / repo.rpartition("/")[2])
    cut.viz.mkdir(parents=True)
    columns = _cut_records(run, cut, step, manifest["chain"])
    record = without_paths(record)
    files.write_json(cut.record, record, indent=1)
    if run.config.is_file():
        files.write_whole(cut.config, _config_without_paths(run.config))
    trouble = _draw(cut, record)
    samples = views.read_samples(cut.samples)
    evaluation = next(reversed(evaluations.read(cut.evaluations)), None)
    averaged = _average_is_better(evaluation, checkpoint)
    if evaluation is not None and averaged:
        evaluation |= {"scores": evaluation["averaged"]}
    paths = _model_and_state(checkpoint, manifest, scratch / "made", with_state, averaged)
    about = model_card.About(
        repo=repo,
        record=record,
        columns=columns,
        chain=manifest["chain"],
        samples=samples,
        evaluation=evaluation,
        averaged=averaged,
        config=yaml.safe_load(cut.config.read_text(encoding="utf-8")) if cut.config.is_file() else {},
        license=license,
        has_chart=cut.latest_chart.is_file(),
        resumable=with_state,
    )
    files.write_whole(cut.path / "README.md", model_card.render(about))
    for path in sorted(cut.path.rglob("*")):
        # Only the newest chart is shown, so charts with a step in their name are left out.
        if path.is_file() and not path.name.startswith("training_step_"):
            paths[path.relative_to(cut.path).as_posix()] = path
    size = sum(path.stat().st_size for path in paths.values())
    return Push(step, manifest["chain"], record["run_id"], paths, size, trouble)


def _cut_records(run: RunFolder, cut: RunFolder, step: int, chain: str) -> columns.Columns:
    """Copy the run's records up to `step`. Returns its ledger as arrays. Raises NotOfThisRun."""
    try:
        found = run_folder.cut_to(run, cut, step).chain
    except ledger.Damaged as error:
        raise NotOfThisRun(f"checkpoint-{step} does not fit the ledger that lies in {run.path} ({error})") from None
    if found != chain:
        raise NotOfThisRun(f"checkpoint-{step} is not of the ledger that lies in {run.path}")
    return read_columns(cut.ledger)


def _draw(cut: RunFolder, record: dict[str, Any]) -> list[str]:
    """Make chart, metrics, samples and report of the run as it was at that step. Returns what failed."""
    trouble = []
    try:
        views.Views(cut).redraw(None, *views.caption_of(record), max_steps=record["max_steps"])
    except Exception as error:
        trouble.append(f"the chart: {type(error).__name__}: {error}")
    try:
        with _inside(cut.path.parent):
            report.write(Path(cut.path.name))
    except Exception as error:
        trouble.append(f"the report: {type(error).__name__}: {error}")
    return trouble


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Enter `folder`. The report shows the folder of its run as it was given, which is then a name without a path."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _model_and_state(
    checkpoint: Path,
    manifest: dict[str, Any],
    made: Path,
    with_state: bool,
    averaged: bool,
) -> dict[str, Path]:
    """Path in the repository -> file, for the files of the checkpoint.

    If a file at the root is replaced by its portable form or by averaged weights, the file as it was saved is uploaded
    too, because the manifest lists that one.
    """
    paths: dict[str, Path] = {}
    # A checkpoint of an older version may lack something.
    portable = saved_model.files_for(checkpoint)
    for name in [*manifest["files"], checkpoints.MANIFEST]:
        if name.startswith(f"{averaging.FOLDER}/"):
            # The average is a model of its own: `from_pretrained(repo, subfolder="averaged")`.
            paths[name] = checkpoint / name
            continue
        at_root = any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)
        replaced = averaged and name.endswith((".safetensors", ".safetensors.index.json"))
        if at_root and replaced:
            paths[name] = checkpoint / averaging.FOLDER / name
        if at_root and not replaced and name not in portable:
            paths[name] = checkpoint / name
        elif with_state:
            paths[f"{STATE}/{name}"] = checkpoint / name
    made.mkdir(exist_ok=True)
    for name, content in portable.items():
        (made / name).write_bytes(content)
        paths[name] = made / name
    return paths


def _average_is_better(evaluation: dict[str, Any] | None, checkpoint: Path) -> bool:
    """Whether the averaged weights had the better held-out loss when both were last scored."""
    if evaluation is None or not evaluation.get("averaged") or not (checkpoint / averaging.FOLDER).is_dir():
        return False
    raw, averaged = (evaluation[name]["all"]["loss"] for name in ("scores", "averaged"))
    return raw is not None and averaged is not None and averaged < raw


# ---- paths of this machine -----------------------------------------------------------------------------------------


def without_path(word: str) -> str:
    """A word of a command or a configuration. A path of this machine is reduced to its last part."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if re.match(r"(/|~|\.\.(/|$)|[A-Za-z]:[\\/])", value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1] or "."
    return f"{flag}{equals}{value}"


def without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """`run.json` for the upload: what was typed and opened, without the folders of this machine."""
    corpus = dict(record["corpus"])
    corpus["name"] = without_path(corpus["name"])
    # Local files keep the names that the ledger uses. With these, `fetch` finds them on another machine.
    corpus["files"] = [
        [name, url if url.startswith("hf://") else name, *rest] for name, url, *rest in corpus.get("files", [])
    ]
    changed = {
        "corpus": corpus,
        "command": [without_path(word) for word in _without_token(record["command"])],
        "tokenizer": without_path(record["tokenizer"]),
        "model": record["model"] | {"name": without_path(record["model"]["name"])},
    }
    return record | changed


def _without_token(command: list[str]) -> list[str]:
    """The words of a command without tokens, which need not begin with hf_."""
    words, skip = [], False
    for word in command:
        if skip:
            skip = False
        elif word.replace("-", "_").startswith("__hub_token"):
            skip = "=" not in word
        else:
            words.append(word)
    return words


def _config_without_paths(path: Path) -> str:
    """`run_config.yaml` for the upload: without the run's folder, and with other paths reduced to their last part."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, colon, value = line.partition(": ")
        if name in ("output_dir", "hub_token"):
            continue
        if colon and value.startswith('"'):
            value = json.dumps(without_path(json.loads(value)), ensure_ascii=False)
        lines.append(f"{name}{colon}{value}")
    return "\n".join(lines) + "\n"
