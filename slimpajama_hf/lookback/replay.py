"""Trains steps of a run again from the nearest checkpoint and compares them bit for bit."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimpajama_hf import ROOT, files, screen
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback.findings import Problems
from slimpajama_hf.lookback.run import Report, Run, checkpoint_problem
from slimpajama_hf.lookback.side_by_side import differences, side_by_side
from slimpajama_hf.record import checkpoints, ownership, run_folder
from slimpajama_hf.record.run_folder import RunFolder

SCRIPT = ROOT / "run_clm_slimpajama.py"

#: Keys of run_config.yaml that a replay omits: they cost time or act outside of the run, and do not affect a step.
_NOT_REPLAYED = re.compile(r"output_dir|eval_steps|eval_on_start|report_to|run_name|trackio_.*|push_to_hub|hub_.*")


def parse_range(text: str) -> tuple[int, int]:
    """`A:B` as (A, B). Raises UsageError if it is not a range of steps."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--replay {text}: expected A:B, the steps from A up to and without B, as 100:200")
    return int(match[1]), int(match[2])


def replay(path: str | Path, first: int, end: int) -> Report:
    """Train the steps `first` to `end - 1` of a run again in a temporary folder, and compare their rows bit for bit.

    Starts from the nearest whole checkpoint at or before `first`, or from the very start. Raises UserError if the
    ledger does not have these steps, or if training fails.
    """
    run = Run(path)
    run_folder.refuse_of_a_script(run.folder.path, run.record, "training its steps again")
    config = run.config_to_train()
    _refuse_range(run, first, end)
    start, notes = nearest_checkpoint(run, first)
    notes += not_as_it_was(run.record)
    origin = f"checkpoint-{start}" if start else "the very start"
    with tempfile.TemporaryDirectory(prefix="slimpajama_hf-replay-", ignore_cleanup_errors=True) as place:
        again = Path(place) / "run"
        _lay_out(run, start, again)
        screen.say(f"doing steps {start} to {end - 1} again from {origin}, in {again}")
        train_again(run, config, end, again, Path(place) / "replay.yaml")
        notes += other_threads(run, Run(again))
        parted = _compare_replayed(run, Run(again), first, end)
    steps = f"steps {first} to {end - 1}"
    if parted:
        step, found = parted[0]
        more = f"; {len(parted) - 1:,} more steps differ" if len(parted) > 1 else ""
        lines = [f"FAILED  step {step}: in the ledger / replayed: {side_by_side(found)}{more}"]
    else:
        lines = [f"ok      {steps} replayed from {origin}: bit-equal"]
    return Report(not parted, lines + [f"note    {note}" for note in notes], {
        "run": str(path), "ok": not parted, "from": first, "to": end, "started_at": start, "notes": notes,
        "differences": [
            {"step": step, "field": name, "ledger": left, "replayed": right}
            for step, found in parted[: Problems.KEPT] for name, (left, right) in found.items()
        ],
        "steps_that_differ": len(parted),
    })  # fmt: skip


def _refuse_range(run: Run, first: int, end: int) -> None:
    """Raise UserError if the ledger does not have these steps."""
    count = 0
    if run.folder.ledger.is_file():
        with open(run.folder.ledger, "rb") as file:
            count = sum(line.endswith(b"\n") for line in file)
    if end > count:
        raise UserError(
            f"--replay {first}:{end}: {run.folder.path} has {count:,} steps; expected A:B with 0 <= A < B <= {count}"
        )


def nearest_checkpoint(run: Run, step: int) -> tuple[int, list[str]]:
    """The newest whole checkpoint at or before `step` (0: none), and what was wrong with newer ones."""
    notes: list[str] = []
    for candidate in reversed([each for each in run.manifests if each <= step]):
        wrong = checkpoint_problem(run, candidate)
        if wrong is None:
            return candidate, notes
        notes.append(f"checkpoint-{candidate} passed over: {wrong}")
    return 0, notes


def not_as_it_was(record: dict[str, Any]) -> list[str]:
    """Differences between this machine and that of the run that may change bits, in words."""
    notes = []
    for name, version in record.get("libraries", {}).items():
        here = importlib.metadata.version(name)
        if here != version:
            notes.append(f"the run was made with {name} {version}, here is {here}: bits may differ")
    if "torch_threads" not in record:
        notes.append("run.json does not say with how many threads torch ran: with another number bits may differ")
    return notes


def other_threads(run: Run, again: Run) -> list[str]:
    """A note if the steps were repeated with another number of threads."""
    before, now = run.record.get("torch_threads"), again.record.get("torch_threads")
    return [f"torch ran with {before} threads, now with {now}: bits may differ"] if before and before != now else []


def _lay_out(run: Run, start: int, again: Path) -> None:
    """Make a run folder at step `start`: record, first rows, checkpoint. Does not write to the run itself."""
    again.mkdir()
    shutil.copyfile(run.folder.record, RunFolder(again).record)
    if run.folder.tokenizer.is_dir():
        files.copy_folder(run.folder.tokenizer, RunFolder(again).tokenizer)
    if ownership.is_own(run.folder):
        ownership.sign(RunFolder(again))
    if not start:
        run_folder.begin_alike(run.folder, RunFolder(again))
        return
    with open(run.folder.ledger, "rb") as source, open(RunFolder(again).ledger, "wb") as copy:
        copy.writelines(itertools.islice(source, start))
    files.copy_folder(
        checkpoints.path_of(run.folder.path, start), checkpoints.path_of(again, start), files.link_or_copy
    )


#: Flags of a replay: only its ledger is needed.
_SEEN_BY_NOBODY = ("--no-checkpoint", "--viz_interval", "0", "--display_samples", "0")

#: The same, but the last checkpoint is kept.
SAVED_AT_ITS_END = ("--save_steps", "1000000000", "--viz_interval", "0", "--display_samples", "0")


def train_again(
    run: Run, config: dict[str, Any], end: int, again: Path, settings: Path, flags: Sequence[str] = _SEEN_BY_NOBODY
) -> None:
    """Run the real training script in a separate process on the folder `again` up to step `end`.

    `config`: the content of the run's run_config.yaml; written to `settings` without keys that act outside of the run.
    Raises UserError with the exit code if training fails. Its stderr is shown, for progress.
    """
    files.write_json(settings, replayed_config(config))
    processes = run.record.get("processes", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT),
               "--config", str(settings), "--output_dir", str(again),
               "--resume_from_checkpoint", "true", "--max_steps", str(end), "--report_to", "none", *flags]  # fmt: skip
    environment = dict(os.environ)
    threads = run.record.get("torch_threads")
    if threads:
        # If both are set, torch uses MKL's number, not OpenMP's (aten/src/ATen/ParallelOpenMP.cpp).
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The Ctrl-C went to the process too; it saves after its current step. Another one ends both.
        process.wait()
        raise
    if code:
        raise UserError(f"the steps could not be done again: training ended with exit code {code} (see above)")


def replayed_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without keys that act outside of it, and with a warm-up independent of --max_steps."""
    kept = {name: value for name, value in config.items() if not _NOT_REPLAYED.fullmatch(name)}
    warmup = float(kept.get("warmup_steps", 0))
    if 0 < warmup < 1:
        # As TrainingArguments.get_warmup_steps computes it, with the steps of the whole run.
        kept["warmup_steps"] = math.ceil(int(config["max_steps"]) * warmup)
    return kept


def _compare_replayed(run: Run, again: Run, first: int, end: int) -> list[tuple[int, dict[str, tuple[Any, Any]]]]:
    """The steps from `first` to `end - 1` that differ between the ledger and its replay, with the differing fields."""
    parted = []
    then, now = (itertools.islice(each.whole_rows(), first, end) for each in (run, again))
    for step, (left, right) in enumerate(itertools.zip_longest(then, now), start=first):
        if right is None:
            raise UserError(f"the replay ended before step {step}: the corpus has no more documents")
        found = differences(left, right)
        if found:
            parted.append((step, found))
    return parted
