"""Gathers everything that the page shows from the folder of a run: JSON values and arrays (see `gather`)."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import __version__
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints, evaluations, run_folder
from slimpajama_hf.report import documents, numbers
from slimpajama_hf.report.texts import Texts, pack_passports, prompts_of, samples_of, unusual_documents, with_surprisals
from slimpajama_hf.views import views

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns, Reader
    from slimpajama_hf.record.run_folder import RunFolder


#: How many spikes, skipped updates and passed-over records the page lists, of each kind.
MOST_EVENTS = 2_000
#: Maximum size of the packed content in bytes; passports are left out to keep it. The page is a third larger (base64).
MOST_BYTES = 3_450_000


def gather(folder: RunFolder, reader: Reader, most_passports: int = documents.MOST_PASSPORTS) -> tuple[Any, Any]:
    """(JSON values, arrays by name) of the run as it is; first reads new rows with `reader`.

    `notes` says what is missing in an old, torn or young run. Raises UserError only if there is no run.
    """
    rows = reader.update()
    notes = [_capital(reader.trouble)] if reader.trouble else []
    record = _record(folder, notes)
    if isinstance(counted := record.get("initial_embeddings"), dict) and isinstance(counted.get("documents"), int):
        notes.append(
            f"Neighbours in the first {counted['documents']:,} documents were counted for the initial embeddings, "
            "before these documents were scored."
        )
    carried, every = numbers.carried_rows(rows, folder)
    domains, domain_of = numbers.domains_of(rows)
    nats, nats_note = numbers.surprisals_of(folder, rows)
    if nats_note:
        notes.append(nats_note)
    passports = documents.read_passports(folder.path / documents.PASSPORTS, len(rows))
    passports = [passports[place] for place in documents.spread(len(passports), most_passports)]
    passports = with_surprisals(passports, rows, nats)
    of_passports, vocabulary = pack_passports(passports)
    arrays = numbers.step_arrays(rows, carried, every, domain_of) | of_passports
    meta = {
        **_caption(record, folder),
        **_steps(rows, record, every),
        **_measured(rows, domain_of, domains, nats),
        **_read(folder, rows, record, passports, notes),
        "domains": domains,
        "events": _events(rows, folder, record),
        "passports": [_passport(each) for each in passports],
        "opens_at": documents.late_and_readable(passports, len(rows)),
        "vocabulary": vocabulary,
        "evaluations": _evaluations(folder, len(rows)),
        "config": _config(folder),
        "about": _about(record),
        "resume": _without_home(run_folder.resume_command(folder.path, record)),
        "notes": notes,
    }
    return strict(meta), arrays


def _record(folder: RunFolder, notes: list[str]) -> dict[str, Any]:
    """`run.json`; empty, with a note, if it is missing or torn."""
    try:
        return folder.read_record()
    except UserError as error:
        if not folder.ledger.exists():
            raise UserError(
                f"{folder.path}: no run in it (neither run.json nor ledger.jsonl); expected the folder of a run, "
                "as in python -m slimpajama_hf report runs/embedded-tiny"
            ) from error
    notes.append("run.json is missing or torn: the facts about the run are unknown, its numbers are known.")
    return {}


def _steps(rows: Columns, record: dict[str, Any], every: int) -> dict[str, Any]:
    """Facts about the steps that are needed to read their arrays."""
    meanings = record.get("numbers")
    return {
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "steps": len(rows),
        "every": every,
        "max_steps": record.get("max_steps") if isinstance(record.get("max_steps"), int) else None,
        "uniform_nats": numbers.uniform_nats(rows),
        "shards": [_without_home(name) for name in rows.names["shard"]],
        "mirrors": [_without_home(name) for name in rows.names["mirror"]],
        "packed": {str(step): found for step, found in list(rows.seldom["documents"].items())[:MOST_EVENTS]},
        "added": [
            {"name": name, "meaning": str(meanings.get(name, "")) if isinstance(meanings, dict) else ""}
            for name in rows.added
        ],
    }


def _measured(
    rows: Columns, domain_of: np.ndarray, domains: list[dict[str, Any]], nats: np.ndarray | None
) -> dict[str, Any]:
    """Statistics that follow from the numbers of the steps."""
    return {
        "headline": numbers.headline(rows),
        "noise": numbers.noise_of_gradients(rows),
        "teaching": numbers.what_updates_taught(rows, domain_of, domains),
        "by_domain": numbers.by_domain(rows, domain_of, len(domains)),
        "by_length": numbers.by_length(rows),
        "by_position": numbers.by_position(rows, nats),
        "passed_over": _passed_over(rows),
    }


def _read(
    folder: RunFolder, rows: Columns, record: dict[str, Any], passports: list[dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    """Everything with texts: samples, prompts, unusual documents."""
    texts = Texts(record, rows, passports)
    samples = samples_of(folder, texts, notes)
    unusual = unusual_documents(rows, texts)
    texts.read(samples, unusual)
    return {"samples": samples, "prompts": prompts_of(folder), "unusual": unusual}


def _passport(passport: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": passport["step"],
        "tokens": len(passport["input_ids"]),
        "before": "before" in passport,
        "after": "after" in passport,
        "top": "top_ids" in passport,
    }


def strict(value: Any) -> Any:
    """JSON values with None for numbers that are not finite, and Python numbers for NumPy's."""
    if isinstance(value, dict):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _without_home(text: str) -> str:
    home = str(Path.home())
    # If the home is "/", as for some service users, replacing it would leave nothing.
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if len(home) > 1 else text


def _caption(record: dict[str, Any], folder: RunFolder) -> dict[str, str]:
    try:
        title, subtitle = views.caption_of(record)
    except (KeyError, TypeError, ValueError):
        title, subtitle = folder.path.resolve().name, "run.json does not describe this run"
    return {
        "title": _without_home(title),
        "subtitle": _without_home(subtitle),
        "folder": _without_home(str(folder.path)),
    }


def _events(rows: Columns, folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    sessions = record.get("sessions")
    resumed = [each.get("step") for each in sessions if isinstance(each, dict)] if isinstance(sessions, list) else []
    return {
        "spikes": sorted(rows.seldom["spike"].items(), key=lambda pair: -pair[1])[:MOST_EVENTS],
        "skipped_updates": list(rows.seldom["update_skipped"].items())[:MOST_EVENTS],
        "passed_over": list(rows.seldom["skipped"].items())[:MOST_EVENTS],
        "gaps": [[step, _places(found)] for step, found in list(rows.seldom["gaps"].items())[:MOST_EVENTS]],
        "checkpoints": checkpoints.steps(folder.path),
        "resumes": sorted({step for step in resumed if isinstance(step, int) and step > 0}),
    }


def _places(gaps: Any) -> list[str]:
    if not isinstance(gaps, list):
        return []
    return [
        _without_home(f"{gap.get('shard')} from row {gap.get('row')} on: {gap.get('reason')}")
        for gap in gaps
        if isinstance(gap, dict)
    ]


def _passed_over(rows: Columns) -> list[list[Any]]:
    """[reason, records] of the records passed over, the most frequent first."""
    total: dict[str, int] = {}
    for found in rows.seldom["skipped"].values():
        for reason, count in found.items() if isinstance(found, dict) else ():
            total[reason] = total.get(reason, 0) + int(count)
    return [[reason, count] for reason, count in sorted(total.items(), key=lambda pair: -pair[1])]


def _evaluations(folder: RunFolder, steps: int) -> list[dict[str, Any]]:
    """Held-out scores of all domains together, by step: of the weights, and under `averaged` of the averaged ones."""

    def whole(scores: dict[str, Any]) -> dict[str, Any]:
        return {name: scores["all"][name] for name in ("loss", "accuracy", "bits_per_byte")}

    return [
        {
            "step": entry["step"],
            "documents": entry["scores"]["all"]["samples"],
            **whole(entry["scores"]),
            "averaged": whole(entry["averaged"]) if entry.get("averaged") else None,
        }
        for entry in evaluations.read(folder.evaluations, steps)[-MOST_EVENTS:]
    ]


# ---- the run -------------------------------------------------------------------------------------------------------


def _config(folder: RunFolder) -> list[list[str]]:
    """[key, value] pairs of run_config.yaml, as written there."""
    if not folder.config.is_file():
        return []
    lines = folder.config.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.partition(":") for line in lines if re.match(r"(# )?\w+:", line)]
    return [[key, _without_home(value.strip())] for key, _, value in pairs]


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _about(record: dict[str, Any]) -> list[list[str]]:
    """[name, value] pairs about the run and its machine, as far as run.json has them."""
    corpus, model = _object(record, "corpus"), _object(record, "model")
    libraries = record.get("libraries")
    parameters = model.get("parameters")
    found: list[tuple[str, Any]] = [
        ("run", record.get("run_id")),
        ("started", record.get("started")),
        ("command", " ".join(map(str, record["command"])) if isinstance(record.get("command"), list) else None),
        ("corpus", corpus.get("name")),
        ("mirror", corpus.get("mirror")),
        ("revision", corpus.get("revision")),
        ("model", f"{model.get('name')}, {parameters:,} parameters" if isinstance(parameters, int) else None),
        ("precision", model.get("precision")),
        (
            "tokenizer",
            f"{record.get('tokenizer')}, {record.get('tokenizer_size', model['vocab_size']):,} tokens"
            if "vocab_size" in model
            else None,
        ),
        (
            "sample",
            f"{model.get('sample_mode')}, {model.get('max_seq_length')} tokens" if "sample_mode" in model else None,
        ),
        ("slimpajama_hf", record.get("version")),
        *(libraries.items() if isinstance(libraries, dict) else ()),
        ("python", record.get("python")),
        ("platform", record.get("platform")),
        ("cores", record.get("cores")),
        ("torch threads", record.get("torch_threads")),
    ]
    return [[name, _without_home(str(value))] for name, value in found if value is not None]
