"""`forget RUN --documents FILE`: trains a run as if it had never read some documents, and certifies that.

The run is trained again from the last checkpoint before the first of these documents, with all of them left out; from
the very start if one of them was counted for its initial embeddings (`--init_embeddings`). Ledger and weights are bit
for bit those of a run that was told from the start to leave them out: before the checkpoint none of them was read, and
after it none is. `forgotten.json` in the new folder has the documents and the sums that prove this; `verify` compares
it with the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import files, screen
from slimpajama_hf.corpus.documents import Cursor, Document
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import replay, reread, rewind
from slimpajama_hf.lookback.findings import Finding, Problems
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.record import checkpoints, ledger

if TYPE_CHECKING:
    from slimpajama_hf.lookback.findings import Watch


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """What was forgotten, and the new run."""

    run: str
    output_dir: str
    start: int
    """Step of the checkpoint from which training began again (0: the very start)."""
    steps: int
    """Steps of the new run."""
    documents: dict[str, dict[str, Any]]
    """By `shard#row`: text_sha1, and the steps of the old run that learned it."""
    never_read: tuple[str, ...]
    """Documents that were asked for but that no step of the run learned."""
    seconds: float
    notes: tuple[str, ...]


def read_list(path: Path) -> list[str]:
    """The documents named in a file, one per line: `shard#row`, or the SHA-1 of a whole text in UTF-8. Blank lines and
    lines that begin with `# ` are ignored.

    Raises UsageError for any other line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--documents {path}: cannot be read ({error}); expected a text file, a document a line"
        ) from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("# ")]
    for number, line in enumerate(found, 1):
        if not re.fullmatch(r"[0-9a-f]{40}|.+#\d+", line):
            raise UsageError(
                f"--documents {path}: {line[:80]!r} (entry {number}) names no document; expected shard#row, as "
                "chunk1/example_train_0.jsonl.zst#17, or the SHA-1 of its text, 40 hex digits, as the ledger has them"
            )
    if not found:
        raise UsageError(f"--documents {path}: it names no document; expected one a line, as shard#row")
    return list(dict.fromkeys(found))


def forget(path: str | Path, wanted: list[str], output_dir: str | None = None) -> Forgotten:
    """Train a run again as if it had never read the documents of `wanted` (`read_list`), in a folder of its own.

    Raises UserError if it has read none of them, if the folder is not empty, or if training fails.
    """
    run = Run(path)
    if run.record["model"]["sample_mode"] == "pack":
        raise UserError(
            f"{path}: its steps hold several documents joined together (--sample_mode pack), and without one all later "
            "ones would be joined differently; only runs that truncate or window can forget"
        )
    config = run.config_to_train()
    found, rows, samples, dropped = _find(run, set(wanted))
    named = found.keys() | {document["text_sha1"] for document in found.values()}
    never_read = tuple(each for each in wanted if each not in named)
    if not found:
        raise UserError(f"{path}: it has read none of the {len(wanted):,} documents; there is nothing to forget")
    if samples > rows:
        raise UserError(
            f"{path}: some of its steps hold several documents, and which ones share a step depends on all before; "
            "only runs of one document a step can forget"
        )
    if dropped == samples:
        raise UserError(f"{path}: it has read nothing else; start a new run")
    start, notes = replay.nearest_checkpoint(
        run, min(step for document in found.values() for step in document["steps"])
    )
    counted = _were_counted(run, found.keys())
    if counted:
        # All steps depend on the embeddings that they were counted for.
        start = 0
        notes.append(
            f"{counted:,} of these documents were counted for the run's initial embeddings; these are made anew"
        )
    end = rows - dropped
    again = Path(output_dir or run.folder.path.with_name(f"{run.folder.path.resolve().name}-forgotten")).expanduser()
    rewind.refuse_taken(again)
    rewind.lay_out(run, start, again, {"forgotten_from": rewind.origin(run, start)}, alike=not counted)
    screen.say(
        f"{len(found):,} documents, learned at {sum(len(each['steps']) for each in found.values()):,} steps, are left "
        f"out: training steps {start:,} to {end - 1:,} again, in {again}"
    )
    began = time.monotonic()
    config["leave_out"] = [*(config.get("leave_out") or []), *found]
    with tempfile.TemporaryDirectory(prefix="slimpajama_hf-forget-") as place:
        replay.train_again(run, config, end, again, Path(place) / "forget.yaml", flags=())
    seconds = time.monotonic() - began
    notes += replay.not_as_it_was(run.record) + replay.other_threads(run, Run(again))
    if run.record["tokenizer"].startswith("corpus"):
        notes.append(
            "the tokenizer was trained on the first documents of the corpus, and stays: it holds no text of them"
        )
    _certify(Run(again), run, start, end, found)
    return Forgotten(str(path), str(again), start, end, found, never_read, seconds, tuple(notes))


def _find(run: Run, wanted: set[str]) -> tuple[dict[str, dict[str, Any]], int, int, int]:
    """(wanted documents that the run has learned, its steps, its samples, how many of these are left out)."""
    found: dict[str, dict[str, Any]] = {}
    rows = samples = dropped = 0
    for row in run.whole_rows():
        rows += 1
        for sample in ledger.each_sample(row):
            samples += 1
            name = f"{sample['shard']}#{sample['row']}"
            if name in wanted or sample["text_sha1"] in wanted:
                dropped += 1
                steps = found.setdefault(name, {"text_sha1": sample["text_sha1"], "steps": []})["steps"]
                if row["step"] not in steps:
                    steps.append(row["step"])
    return found, rows, samples, dropped


def _were_counted(run: Run, names: Collection[str]) -> int:
    """How many of the documents were counted for the embeddings that the run began with (`--init_embeddings`)."""
    counted = run.record.get("initial_embeddings")
    if counted is None:
        return 0
    config = run.config()
    left_out, skip = set(config.get("leave_out") or ()), bool(config.get("skip_broken_shards"))
    records = reread.corpus_of(run.record).records(Cursor(), skip_broken_shards=skip)
    read = (f"{record.shard}#{record.row}" for record in records if isinstance(record, Document))
    first = itertools.islice((name for name in read if name not in left_out), counted["documents"])
    return sum(name in names for name in first)


def _certify(again: Run, run: Run, start: int, end: int, found: dict[str, dict[str, Any]]) -> None:
    """Write `forgotten.json`. Raises UserError if the new run does not agree with it."""
    chain, count = ledger.CHAIN_START, 0
    for row in again.whole_rows():
        chain, count = row["chain"], count + 1
    if count < end:
        raise UserError(
            f"{again.folder.path}: it ended after {count:,} of {end:,} steps: the corpus has no more documents"
        )
    weights = checkpoints.path_of(again.folder.path, end) / "model.safetensors"
    certificate = {
        "documents": found,
        "from": rewind.origin(run, start),
        "steps": end,
        # Covers all rows up to the last step, so no row of these documents can be among them.
        "chain": chain,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "libraries": again.record.get("libraries", {}),
    }
    files.write_json(again.folder.forgotten, certificate, indent=1)
    finding = _held_against(again)
    if not finding.ok:
        raise UserError(f"{again.folder.path}: {finding.words}")


def _held_against(run: Run) -> Finding:
    watch = check(run)
    if isinstance(watch, Finding):
        return watch
    try:
        next(watch)
        for row in run.whole_rows():
            watch.send(row)
        watch.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a check that has no end")


def check(run: Run) -> Finding | Watch:
    """No document of `forgotten.json` is in the ledger, and chain and weights are those that it names."""
    if not run.folder.forgotten.is_file():
        return Finding(True, "no document was forgotten")
    return _check(run)


def _check(run: Run) -> Watch:
    certificate = files.strict_json(run.folder.forgotten.read_text(encoding="utf-8"))
    documents, steps = certificate["documents"], certificate["steps"]
    hashes = {document["text_sha1"] for document in documents.values()}
    problems, chain = Problems(), None
    while (row := (yield)) is not None:
        if row["step"] == steps - 1:
            chain = row["chain"]
        for sample in ledger.each_sample(row):
            name = f"{sample['shard']}#{sample['row']}"
            if name in documents:
                problems.add(f"step {row['step']}: {name} was forgotten, and is learned there")
            elif sample["text_sha1"] in hashes:
                problems.add(f"step {row['step']}: {name} has the text of a document that was forgotten")
    if chain != certificate["chain"]:
        problems.add(f"step {steps - 1}: its chain is {chain}, {run.folder.forgotten.name} has {certificate['chain']}")
    left_out = set(run.config().get("leave_out") or ())
    for name in documents.keys() - left_out:
        problems.add(f"{run.folder.config.name} does not leave {name} out: a run that goes on would read it")
    weights = checkpoints.path_of(run.folder.path, steps) / "model.safetensors"
    there = certificate["weights_sha256"] is not None and weights.is_file()
    if there and hashlib.sha256(weights.read_bytes()).hexdigest() != certificate["weights_sha256"]:
        problems.add(
            f"{weights.parent.name}: its weights are not those that {run.folder.forgotten.name} has the sum of"
        )
    looked = "and its weights" if there else "its weights are not there any more"
    return problems.finding(f"{len(documents):,} documents are in no row; chain at step {steps - 1:,}, {looked}")
