"""Checks of checkpoints: are they complete, of this run, on the chain of its ledger, and at its documents?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimpajama_hf import files
from slimpajama_hf.lookback.findings import Finding, Problems
from slimpajama_hf.lookback.run import checkpoint_problem
from slimpajama_hf.record import checkpoints, ledger

if TYPE_CHECKING:
    from slimpajama_hf.lookback.findings import Watch
    from slimpajama_hf.lookback.run import Row, Run


def checkpoint_files(run: Run) -> Finding:
    """Every file of every checkpoint has the size and the SHA-256 of its manifest."""
    problems, size = Problems(), 0
    for step, manifest in run.manifests.items():
        wrong = checkpoint_problem(run, step)
        if wrong is not None:
            problems.add(f"checkpoint-{step}: {wrong}")
        elif manifest is not None:
            size += sum(entry["bytes"] for entry in manifest["files"].values())
    count = len(run.manifests)
    return problems.finding(f"{count} whole, {size / 1e6:,.1f} MB" if count else "none there")


def checkpoint_identity(run: Run) -> Finding:
    """Every checkpoint is of this run, and of the step in its folder's name."""
    problems, own = Problems(), run.record.get("run_id")
    for step, manifest in run.manifests.items():
        if manifest is None:
            continue
        if manifest.get("run_id") != own:
            problems.add(f"checkpoint-{step}: of another run ({manifest.get('run_id')}; run.json says {own})")
        if manifest.get("step") != step:
            problems.add(f"checkpoint-{step}: its manifest says step {manifest.get('step')}")
    return problems.finding(f"all of run {own}" if run.manifests else "none there")


def checkpoint_chain(run: Run) -> Watch:
    """Every checkpoint belongs to this ledger: its chain hash is that of the last row before it."""
    problems, agreeing, last = Problems(), 0, -1
    chains = {step: (manifest or {}).get("chain") for step, manifest in run.manifests.items()}
    while (row := (yield)) is not None:
        last = row["step"]
        recorded = chains.get(last + 1)
        if recorded is not None and recorded != row["chain"]:
            problems.add(f"checkpoint-{last + 1}: taken of another ledger (chain {recorded}, here {row['chain']})")
        agreeing += recorded is not None
    for step in chains:
        if step > last + 1:
            problems.add(f"checkpoint-{step}: the ledger ends before it, at step {last}")
    if not chains:
        return Finding(True, "none there")
    missing = len(chains) - sum(chain is not None for chain in chains.values())
    return problems.finding(f"{agreeing} agree with the ledger" + (f"; of {missing} not recorded" if missing else ""))


def checkpoint_cursor(run: Run) -> Watch:
    """In every checkpoint, reading goes on after the document of the last row before it."""
    problems = Problems()
    # Only `truncate` determines the next place exactly.
    exact = run.record.get("model", {}).get("sample_mode") == "truncate"
    shuffled = int(run.config().get("shuffle_buffer") or 0) > 1
    while (row := (yield)) is not None:
        step = row["step"] + 1
        if step in run.manifests:
            path = checkpoints.path_of(run.folder.path, step) / checkpoints.DATA_STATE
            wrong = _cursor_problem(path, row, exact, shuffled)
            if wrong is not None:
                problems.add(f"checkpoint-{step}: {wrong}")
    words = "each is a place in its shuffled block" if shuffled else "each goes on behind its last document"
    return problems.finding(words if run.manifests else "none there")


def _cursor_problem(path: Path, row: Row, exact: bool, shuffled: bool) -> str | None:
    try:
        cursor = files.read_json(path)["cursor"]
        shard, place = cursor["shard"], cursor["row"]
        used, size = cursor.get("used", 0), cursor.get("size", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no cursor can be read in {path.name}"
    if size or shuffled:
        # Shard and row are the beginning of the block; they say nothing about the last document.
        return f"record {used} of a shuffled block of {size}" if size and not 0 <= used < size else None
    *_, row = ledger.each_sample(row)
    same = shard == row["shard"]
    if exact and not (same and place == row["row"] + 1):
        return f"goes on at {shard} row {place}, its last document was {row['shard']} row {row['row']}"
    if not exact and same and place < row["row"]:
        return f"goes back to {shard} row {place}, its last document was row {row['row']}"
    return None
