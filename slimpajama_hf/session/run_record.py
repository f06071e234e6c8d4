"""Write `run.json` and `run_config.yaml` at each start, check that a resume is still the same run, and make the
recorder of its steps."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from slimpajama_hf import __version__, files, screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback.reread import vocabulary_sha256
from slimpajama_hf.model.presets import checkpoint_bytes, vocabulary
from slimpajama_hf.record import ownership
from slimpajama_hf.record.ledger import Ledger
from slimpajama_hf.record.surprisals import Surprisals
from slimpajama_hf.samples.stream import SHORT_TEXT_CHARACTERS
from slimpajama_hf.screen import redacted
from slimpajama_hf.session import own_tokenizer
from slimpajama_hf.session.resume import is_asked
from slimpajama_hf.settings import what_matters
from slimpajama_hf.training.recorder import StepRecorder
from slimpajama_hf.training.step_numbers import StepNumbers

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.session.initial_embeddings import InitialEmbeddings
    from slimpajama_hf.session.resume import ResumePoint
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.processes import Processes


def recorder_of_run(folder: RunFolder, point: ResumePoint, vocab_size: int, team: Processes) -> StepRecorder:
    """Make the recorder of a run that begins or goes on at `point`. Only the first process writes files."""
    if not team.is_first:
        return StepRecorder(None, vocab_size, point.rows)
    surprisals = Surprisals(folder.surprisals, point.predicted)
    return StepRecorder(Ledger(folder.ledger, point.chain), vocab_size, point.rows, surprisals)


def new_record(corpus: dict[str, Any]) -> dict[str, Any]:
    """The `run.json` of a run that starts: what it is, and the machine and libraries that it starts with."""
    from importlib.metadata import version

    return {
        "run_id": uuid.uuid4().hex,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [redacted(word) for word in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "version": __version__,
        "libraries": {
            name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "tokenizers")
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "corpus": corpus,
        # It decides which documents of a step each process looks at (`SampleStream`).
        "short_text_characters": SHORT_TEXT_CHARACTERS,
        # Sharded matrices learn as `--hidden_optim` says. In older runs they learned by AdamW.
        "muon_on_shards": True,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def record_run(
    settings: Settings,
    folder: RunFolder,
    corpus: Corpus,
    tokenizer_name: str,
    tokenizer: Any,
    model: Any,
    precision: str,
    point: ResumePoint,
    embeddings: InitialEmbeddings | None = None,
) -> dict[str, Any]:
    """Write `run.json` and `run_config.yaml`, and return the record. A resumed run keeps its identity. `embeddings`:
    those that a run begins with, if they were counted.

    Raises UserError if the tokenizer or the model's configuration is not the one with which the run was begun.
    """
    described = _model(settings, model, precision)
    tokenizer_sha256 = vocabulary_sha256(tokenizer)
    if is_asked(settings.training.resume_from_checkpoint) and folder.record.is_file():
        record = folder.read_record()
        _refuse_another(
            settings, record, tokenizer_name, tokenizer_sha256, {described["sha256"], _config_sha256(model)}
        )
        if point.checkpoint is not None and record["model"]["sha256"] != described["sha256"]:
            _refuse_other_shapes(model, point.checkpoint)
        _say_what_differs(settings, record)
        if settings.stranger is not None or re.search("txt_documents|eval_fraction", settings.run.allow_changes or ""):
            record["corpus"] = corpus.describe()
    else:
        project = settings.training.project if "project" in settings.typed else folder.path.resolve().name
        record = new_record(corpus.describe()) | {"tracker_project": project}
    # Steps after the checkpoint are done again, so starts that lie there are dropped.
    earlier = [each for each in record.get("sessions", []) if each["step"] < point.step]
    started: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": point.step}
    if point.not_as_saved:
        started["not_as_saved"] = list(point.not_as_saved)
    record |= {
        "sessions": [*earlier, started],
        "max_steps": settings.training.max_steps,
        "tokenizer": tokenizer_name,
        "tokenizer_sha256": tokenizer_sha256,
        # The first token of a text is coded with this size. The model may be padded to more (`model.vocab_size`).
        "tokenizer_size": vocabulary(tokenizer),
        "model": described,
        # Another number of threads changes the order of sums, so bit-for-bit equality needs the same number.
        "torch_threads": torch.get_num_threads(),
        "processes": settings.training.world_size,
        "documents_a_step": settings.training.world_size * settings.training.gradient_accumulation_steps,
        # What the additional numbers of each step mean.
        "numbers": StepNumbers.meanings(),
    }
    own_tokenizer.keep(folder, tokenizer_name, tokenizer)
    if embeddings is not None and embeddings.described is not None:
        embeddings.keep(folder)
        record["initial_embeddings"] = embeddings.described
    config = settings.to_yaml()
    record["config_sha256"] = what_matters.digest(yaml.safe_load(config))
    files.write_json(folder.record, record, indent=1)
    files.write_whole(folder.config, config)
    ownership.sign(folder)
    return record


def _model(settings: Settings, model: Any, precision: str) -> dict[str, Any]:
    """The part of `run.json` about the model."""
    return {
        "name": settings.model.model,
        "architecture": model.config.model_type,
        "parameters": model.num_parameters(),
        "checkpoint_bytes": checkpoint_bytes(model, settings.model.average_weights > 0, settings.rules),
        "vocab_size": model.config.vocab_size,
        "precision": precision,
        # Filled in when training begins.
        "computed_in": None,
        "max_seq_length": settings.data.max_seq_length,
        "sample_mode": settings.data.sample_mode,
        "sha256": _config_sha256(model, "n_ctx"),
    }


def _config_sha256(model: Any, *left_out: str) -> str:
    """SHA-256 of a model's configuration. `n_ctx` is another name for the number of positions, which checkpoints have
    for converters to other formats. Older runs included it if their config.json had it."""
    passed_over = {"transformers_version", "use_cache", *left_out}
    return _digest({name: value for name, value in model.config.to_dict().items() if name not in passed_over})


def _refuse_another(
    settings: Settings, record: dict[str, Any], tokenizer_name: str, tokenizer_sha256: str, model_sha256: set[str]
) -> None:
    """Raise UserError if tokenizer or model are not those of the run, unless `--allow_changes` names them."""
    allowed = set((settings.run.allow_changes or "").split(","))
    if record["tokenizer_sha256"] != tokenizer_sha256 and "tokenizer" not in allowed:
        raise UserError(
            f"--tokenizer {tokenizer_name}: its vocabulary is not the one that this run was begun with; "
            "bring that one back, or add --allow_changes tokenizer"
        )
    if record["model"]["sha256"] not in model_sha256 and not {"model", "config_overrides", "tokenizer"} & allowed:
        raise UserError(
            f"--model {settings.model.model}: its configuration is not the one that this run was begun with; "
            "bring that one back, or add --allow_changes model"
        )


def _refuse_other_shapes(model: Any, checkpoint: Path) -> None:
    """Raise UserError if the weights of a checkpoint do not fit a model that a resume was allowed to change."""
    from safetensors import safe_open

    saved: dict[str, list[int]] = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            saved |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    wanted = {name: list(weight.shape) for name, weight in model.named_parameters()}
    own = model.state_dict().keys()
    for name in [*wanted, *(name for name in saved if name not in own)]:
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{checkpoint}: its {name} is {saved.get(name, 'not there')}, and that of the model is "
                f"{wanted.get(name, 'not there')} with what --allow_changes allowed; such weights cannot go on: leave "
                "that out, or start anew in another --output_dir"
            )


def _say_what_differs(settings: Settings, record: dict[str, Any]) -> None:
    """Say on screen if the number of threads or of processes is not that of the run."""
    threads, now = record.get("torch_threads"), torch.get_num_threads()
    if settings.training.device.type == "cpu" and threads not in (None, now):
        screen.say(
            f"{now} threads where the run had {threads}: it goes on exactly, but not bit for bit; "
            f"for that set OMP_NUM_THREADS={threads} (accelerate: --num_cpu_threads_per_process {threads})"
        )
    processes, here = record.get("processes", 1), settings.training.world_size
    if processes != here:
        screen.say(
            f"{here} processes where the run had {processes}: it goes on with the next document, and takes so many at "
            "a step from here on; none is lost and none comes twice"
        )
