"""`rewind RUN --to N --drop STEP`: trains a run again from a checkpoint without one document, to show what it did.

The new run is an ordinary run in a folder of its own. It begins with the rows and the checkpoint of the old one, and
its configuration names the document that it leaves out. Steps before that document must be equal bit for bit. After it
come the same documents in the same order, each as many steps earlier as steps were left out; the learning rate stays
that of the step. Nothing else differs, so differences of losses are the effect of the document.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import files, screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import replay, side_by_side
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.record import checkpoints, ledger, ownership, run_folder
from slimpajama_hf.record.run_folder import RunFolder

if TYPE_CHECKING:
    from slimpajama_hf.lookback.run import Row


#: Means are shown over so many documents after the one left out, to show how long its effect lasts.
SPANS = (1, 10, 100, 1000)


@dataclasses.dataclass(frozen=True)
class Change:
    """A later document, with and without the document that was left out."""

    step: int
    """Its step in the old run; in the new run it is `step_without`."""
    step_without: int
    shard: str
    row: int
    part: int
    domain: str
    tokens: int
    loss: float | None
    """Nats per token."""
    loss_without: float | None

    @property
    def difference(self) -> float | None:
        """Nats per token by which its loss is higher without the left-out document; above 0, that had helped."""
        return None if self.loss is None or self.loss_without is None else self.loss_without - self.loss


@dataclasses.dataclass(frozen=True)
class Rewound:
    """What was done, and the results."""

    run: str
    output_dir: str
    start: int
    """Step of the checkpoint from which it began (0: the very start)."""
    end: int
    """How many steps the new run has."""
    left_out: dict[str, Any] | None
    """The row of the document that was left out; None: none was."""
    left_out_steps: tuple[int, ...]
    """Its steps in the old run; several if it has several windows or passes."""
    repeated: int
    """How many steps were repeated before the document, or in all."""
    parted: tuple[tuple[int, dict[str, tuple[Any, Any]]], ...]
    """The repeated steps that are not bit-equal, with the fields that differ (old, new)."""
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the repeated steps are equal bit for bit."""
        return not self.parted

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "run": self.run,
            "output_dir": self.output_dir,
            "ok": self.ok,
            "started_at": self.start,
            "steps": self.end,
            "left_out": self.left_out,
            "left_out_steps": list(self.left_out_steps),
            "repeated_steps": self.repeated,
            "repeated_steps_that_differ": [
                {"step": step, "field": name, "run": old, "rewound": new}
                for step, found in self.parted for name, (old, new) in found.items()
            ],
            "summary": summary(self.changes),
            "by_domain": {domain: summary(own) for domain, own in by_domain(self.changes)},
            "after": {str(span): summary(self.changes[:span]) for span in SPANS if span <= len(self.changes)},
            "documents": [dataclasses.asdict(change) | {"difference": change.difference} for change in self.changes],
            "notes": list(self.notes),
        }  # fmt: skip


def summary(changes: Sequence[Change]) -> dict[str, Any]:
    """Documents, how many changed, and mean, mean size, least and greatest difference (nats per token)."""
    found = [change.difference for change in changes if change.difference is not None]
    count = len(found)
    return {
        "documents": len(changes),
        "changed": sum(difference != 0 for difference in found),
        "mean": sum(found) / count if count else None,
        "mean_size": sum(map(abs, found)) / count if count else None,
        "least": min(found, default=None),
        "greatest": max(found, default=None),
    }


def by_domain(changes: Iterable[Change]) -> list[tuple[str, list[Change]]]:
    """The changes of each domain, the one with the most documents first."""
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.domain, []).append(change)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


# ---- planning ----


@dataclasses.dataclass(frozen=True)
class _Plan:
    start: int
    end: int
    """One past the last step of the old run that is repeated."""
    left_out: Row | None
    name: str
    """Its name for `--leave_out`."""
    left_out_steps: tuple[int, ...]
    notes: list[str]


def _plan(run: Run, to: int | None, drop: int | None, steps: int | None) -> _Plan:
    """What to train. Raises UserError if the run has no such steps, or nothing to compare."""
    count, left_out = 0, None
    for row in run.whole_rows():
        count += 1
        if row["step"] == drop:
            left_out = row
    for flag, step in (("--to", to), ("--drop", drop)):
        if step is not None and not 0 <= step < count:
            raise UserError(f"{flag} {step}: {run.folder.path} has steps 0 to {count - 1:,}; name one of them")
    to = to if to is not None else drop
    if to is None:
        raise UserError("rewind: nothing to do; expected --to N (where to begin), --drop STEP (what to leave out)")
    start, notes = replay.nearest_checkpoint(run, to)
    begin = f"checkpoint-{start}" if start else "the very start"
    if drop is None:
        end = count if steps is None else min(count, max(to, start) + steps)
        return _Plan(start, end, None, "", (), notes)
    if drop < start:
        raise UserError(
            f"--drop {drop}: learned before {begin}, the nearest to --to {to}; name a --to of {drop} or less"
        )
    assert left_out is not None
    if ledger.samples_of(left_out) > 1:
        raise UserError(
            f"--drop {drop}: {ledger.samples_of(left_out)} documents were learned at this step; one can be left out of "
            "steps of one document"
        )
    alone = run.record["model"]["sample_mode"] == "pack"
    name = f"{left_out['shard']}#{left_out['row']}" + (f".{left_out['part']}" if alone else "")
    keys = ("mirror", "shard", "row") + (("part",) if alone else ())
    same = [row["step"] for row in run.whole_rows() if all(row[key] == left_out[key] for key in keys)]
    end = count if steps is None else min(count, drop + 1 + steps)
    left_out_steps = tuple(step for step in same if start <= step < end)
    if end - start == len(left_out_steps) or end == drop + 1:
        raise UserError(
            f"--drop {drop}: no step of {run.folder.path} follows it; name an earlier one, or go on with the run first"
        )
    if (counted := run.record.get("initial_embeddings")) is not None:
        notes.append(f"its initial embeddings were made from the first {counted['documents']:,} documents: they stay")
    if before := [step for step in same if step < start]:
        notes.append(
            f"parts of this document were learned before {begin} too (step {', '.join(map(str, before))}): that stays"
        )
    return _Plan(start, end, left_out, name, left_out_steps, notes)


# ---- training ----


def default_folder(run: Path, start: int, drop: int | None) -> Path:
    """The default folder of a rewound run: beside the old one."""
    what = f"from-{start}" if drop is None else f"without-{drop}"
    return run.with_name(f"{run.resolve().name}-{what}")


def rewind(
    path: str | Path, to: int | None, drop: int | None, steps: int | None = None, output_dir: str | None = None
) -> Rewound:
    """Train a run again from the nearest checkpoint at or before step `to`, without the document of step `drop`.

    `steps`: how many steps after `drop` (or `to`) to train; None: all that the run has. If `drop` is None, nothing is
    left out and all steps must be equal. The new run stays in `output_dir`. Raises UserError if the run has no such
    steps, if the folder is not empty, or if training fails.
    """
    run = Run(path)
    run_folder.refuse_of_a_script(run.folder.path, run.record, "training it again without a document")
    config = run.config_to_train()
    plan = _plan(run, to, drop, steps)
    again = Path(output_dir).expanduser() if output_dir else default_folder(run.folder.path, plan.start, drop)
    refuse_taken(again)
    notes = plan.notes + replay.not_as_it_was(run.record)
    end = plan.end - len(plan.left_out_steps)
    left_out = {"left_out": plan.name or None, "left_out_steps": list(plan.left_out_steps)}
    lay_out(run, plan.start, again, {"rewound_from": origin(run, plan.start) | left_out})
    begin = f"checkpoint-{plan.start}" if plan.start else "the very start"
    without = f", without {plan.left_out['shard']} row {plan.left_out['row']:,}" if plan.left_out else ""
    screen.say(f"training steps {plan.start:,} to {end - 1:,} from {begin}{without}, in {again}")
    with tempfile.TemporaryDirectory(prefix="slimpajama_hf-rewind-") as place:
        if plan.left_out is not None:
            config = config | {"leave_out": [*(config.get("leave_out") or []), plan.name]}
        try:
            replay.train_again(run, config, end, again, Path(place) / "rewind.yaml", flags=())
        except KeyboardInterrupt:
            screen.say(f"stopped; what is done of it is in {again}: remove that to rewind anew")
            raise
    notes += replay.other_threads(run, Run(again))
    notes += _of_the_schedule(config, plan)
    parted, changes, repeated = _side_by_side(run, Run(again), plan)
    return Rewound(
        str(path), str(again), plan.start, end, plan.left_out, plan.left_out_steps, repeated,
        tuple(parted), tuple(changes), tuple(notes),
    )  # fmt: skip


def refuse_taken(folder: Path) -> None:
    """Raise UserError if the folder for a new run is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something in it already; name a new folder with --output_dir")


def origin(run: Run, start: int) -> dict[str, Any]:
    """The run and the step from which a new run goes on, for its `run.json`."""
    return {"run": str(run.folder.path.resolve()), "run_id": run.record.get("run_id"), "step": start}


def lay_out(run: Run, start: int, again: Path, about: dict[str, Any], alike: bool = True) -> None:
    """Make a folder at step `start` that is a run of its own, with `about` in its `run.json`. Does not write to the old
    run. `alike`: at step 0, whether it begins with the same embeddings, or counts them anew."""
    old, new = run.folder, RunFolder(again)
    again.mkdir(parents=True, exist_ok=True)
    run_id = uuid.uuid4().hex
    files.write_json(new.record, run.record | {"run_id": run_id} | about, indent=1)
    if old.tokenizer.is_dir():
        files.copy_folder(old.tokenizer, new.tokenizer)
    if ownership.is_own(old):
        ownership.sign(new)
    if not start:
        if alike:
            run_folder.begin_alike(old, new)
        return
    run_folder.cut_to(old, new, start)
    target = checkpoints.path_of(again, start)
    files.copy_folder(checkpoints.path_of(old.path, start), target, files.link_or_copy)
    manifest = files.read_json(target / checkpoints.MANIFEST)
    # Replaced by a new file: so far it is a link to the old run's manifest, which must not change.
    files.write_json(target / checkpoints.MANIFEST, manifest | {"run_id": run_id}, indent=1)


def _of_the_schedule(config: dict[str, Any], plan: _Plan) -> list[str]:
    warmup = replay.replayed_config(config).get("warmup_steps", 0)
    if plan.left_out_steps and plan.left_out_steps[0] < float(warmup):
        return [
            "the learning rate depends on the step, and the run was in warm-up: later documents were learned at the "
            "rate of an earlier step"
        ]
    return []


def _side_by_side(
    run: Run, again: Run, plan: _Plan
) -> tuple[list[tuple[int, dict[str, tuple[Any, Any]]]], list[Change], int]:
    """(earlier steps that differ, later documents with and without the document, number of earlier steps)."""
    first = plan.left_out_steps[0] if plan.left_out_steps else plan.end
    left_out = set(plan.left_out_steps)
    old_rows = (row for row in itertools.islice(run.whole_rows(), plan.start, plan.end) if row["step"] not in left_out)
    new_rows = itertools.islice(again.whole_rows(), plan.start, None)
    parted, changes, repeated = [], [], 0
    for old in old_rows:
        new = next(new_rows, None)
        if new is None:
            raise UserError(f"the rewound run ended before step {old['step']} came: the corpus has no more documents")
        if old["step"] < first:
            repeated += 1
            if found := side_by_side.differences(old, new):
                parted.append((old["step"], found))
            continue
        if side_by_side.document_of(old) != side_by_side.document_of(new):
            raise UserError(
                f"step {new['step']} trained {new['shard']} row {new['row']:,} where {old['shard']} row "
                f"{old['row']:,} was due: the corpus gives other documents than it did"
            )
        changes.append(
            Change(old["step"], new["step"], old["shard"], old["row"], old.get("part", 0), old["domain"],
                   old["tokens"], old["loss"], new["loss"])
        )  # fmt: skip
    return parted, changes, repeated
