"""`fork RUN --from N --a FLAGS --b FLAGS`: continues a run from one checkpoint in two ways, on the same documents.

Each arm is an ordinary run in a folder of its own that begins with the rows and the checkpoint of the forked run. Both
learn the same documents in the same order, so the losses of each document can be paired. Then variation between
documents cancels out of the difference.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf import screen
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import replay, rewind, side_by_side
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.record import ledger
from slimpajama_hf.settings.flags import read_flags
from slimpajama_hf.settings.what_matters import WHAT_MATTERS

#: Flags that decide the documents and their tokens; both arms have those of the run.
_OF_THE_DOCUMENTS = frozenset(
    {
        "dataset", "dataset_config_name", "dataset_revision", "dataset_split", "text_column", "txt_documents",
        "eval_fraction", "sample_mode", "max_seq_length", "shuffle_buffer", "leave_out", "epochs", "seed", "tokenizer",
        "gradient_accumulation_steps",
    }
)  # fmt: skip
#: Flags that cannot change once there are weights and an optimizer state.
_AT_THE_START_ONLY = frozenset(
    {"model", "config_overrides", "init_embeddings", "hidden_optim", "embedding_moment", "optim"}
)
#: Flags that fork sets itself.
_NOT_YOURS = frozenset({"output_dir", "resume_from_checkpoint", "max_steps", "overwrite_output_dir", "push_to_hub"})

#: Documents in a row whose differences are averaged into one value, because neighbouring differences are correlated.
BLOCK = 25

#: Fewest blocks for a standard error; with few documents the blocks are shorter.
FEWEST = 8

#: From how many standard errors on a difference counts as one.
CLEAR = 2.0


@dataclasses.dataclass(frozen=True)
class Pair:
    """One document with its loss in both arms."""

    domain: str
    a: float
    """Nats per token."""
    b: float

    @property
    def difference(self) -> float:
        """Nats per token by which b's loss is lower; above 0, b is better."""
        return self.a - self.b


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of several pairs."""

    documents: int
    mean: float
    """Nats per token; above 0, b is better."""
    error: float
    """Its standard error, from means of up to `BLOCK` documents in a row; NaN if there are too few."""

    @property
    def errors(self) -> float:
        """How many standard errors the mean is away from 0."""
        return abs(self.mean) / self.error if self.error > 0 else math.inf if self.mean else 0.0

    def words(self, what: str) -> str:
        """The verdict in a sentence."""
        if not self.mean and not self.error > 0:
            return f"{what}: a and b are the same, to the bit"
        better = "b" if self.mean > 0 else "a"
        said = f"{what}: {better} is {abs(self.mean):.4f} nats per token better"
        if not math.isfinite(self.error):
            return f"{said}; {self.documents} documents are too few to say how sure that is"
        said += f", {self.errors:.1f} standard errors"
        if self.errors >= CLEAR:
            return said
        needed = math.ceil(self.documents * (CLEAR / max(self.errors, 0.1)) ** 2 / 100) * 100
        return f"{said}: within noise; if it stays so, about {needed:,} documents would be needed to say"

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON values; None if not finite."""
        error = self.error if math.isfinite(self.error) else None
        return {"documents": self.documents, "mean": self.mean, "error": error}


def difference_of(forks: Iterable[Sequence[Pair]]) -> Difference:
    """The mean difference over all pairs of one or several forks, and its error.

    A block never spans two forks. Fewer than `FEWEST` documents have no error.
    """
    values = [np.array([pair.difference for pair in pairs], np.float64) for pairs in forks]
    count = sum(map(len, values))
    if not count:
        return Difference(0, math.nan, math.nan)
    size = min(BLOCK, max(1, count // FEWEST))
    blocks = [block.mean() for each in values if len(each) for block in np.array_split(each, -(-len(each) // size))]
    error = float(np.std(blocks, ddof=1) / math.sqrt(len(blocks))) if count >= FEWEST else math.nan
    return Difference(count, float(np.concatenate(values).mean()), error)


@dataclasses.dataclass(frozen=True)
class Fork:
    """The two runs from one checkpoint."""

    start: int
    arms: dict[str, Path]
    """The folders of `a` and `b`."""
    pairs: list[Pair]
    """The documents that both learned, each scored before it was learned."""
    notes: list[str]


def refuse_flags(name: str, flags: str, starts: Sequence[int]) -> list[str]:
    """The flags of an arm as words, with the `--allow_changes` that they need. Raises UsageError for flags that make
    the arms incomparable."""
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UsageError(
            f"--{name} {flags!r}: {error}; expected flags of training, as --{name} '--learning_rate 5e-4'"
        ) from None
    typed = read_flags(words).typed
    for flag in sorted(typed):
        if flag in _OF_THE_DOCUMENTS:
            raise UsageError(
                f"--{name} {flags!r}: --{flag} changes the documents or their tokens, and then no losses pair; "
                "compare two runs of their own: compare RUN RUN"
            )
        if flag in _NOT_YOURS:
            raise UsageError(f"--{name} {flags!r}: --{flag} is the fork's own; leave it out")
        if flag in _AT_THE_START_ONLY and any(starts):
            raise UsageError(f"--{name} {flags!r}: --{flag} can change at the very start alone; use --from 0")
    changed = [flag for flag in WHAT_MATTERS if flag in typed]
    return [*words, *(["--allow_changes", ",".join(changed)] if changed else [])]


def fork(path: str | Path, start: int, flags: dict[str, str], documents: int, output: Path) -> Fork:
    """Train both arms of `flags` from the checkpoint of a run at step `start` (0: the very start) for `documents`
    steps, in folders inside `output`.

    Raises UserError if there is no such checkpoint, if a folder is not empty, or if training fails.
    """
    run = Run(path)
    nearest, notes = replay.nearest_checkpoint(run, start)
    if nearest != start:
        there = ", ".join(f"{step}" for step in [0, *run.manifests])
        raise UserError(f"--from {start}: {path} has no whole checkpoint of that step; there are: {there}")
    config = run.config_to_train()
    arms = {name: output / f"from-{start}-{name}" for name in flags}
    for name, arm in arms.items():
        words = refuse_flags(name, flags[name], [start])
        rewind.refuse_taken(arm)
        rewind.lay_out(run, start, arm, {"forked_from": rewind.origin(run, start) | {"flags": flags[name]}})
        screen.say(f"{name}: {documents:,} documents from step {start:,}, {flags[name] or 'as it was'}, in {arm}")
        with tempfile.TemporaryDirectory(prefix="slimpajama_hf-fork-") as place:
            settings = Path(place) / "fork.yaml"
            replay.train_again(run, config, start + documents, arm, settings, (*replay.SAVED_AT_ITS_END, *words))
    notes += replay.not_as_it_was(run.record)
    return Fork(start, arms, _paired(arms, start, documents), notes)


def _paired(arms: dict[str, Path], start: int, asked: int) -> list[Pair]:
    """The documents of both arms in the `asked` steps from `start` on.

    Raises UserError if they are not the same, or if none has a loss in both.
    """
    pairs: list[Pair] = []
    steps = without = 0
    first, second = (Run(arm).whole_rows() for arm in arms.values())
    for a, b in zip(first, second, strict=False):
        if a["step"] < start:
            continue
        if side_by_side.document_of(a) != side_by_side.document_of(b):
            raise UserError(f"step {a['step']}: the arms learned different documents; nothing can be paired")
        steps += 1
        for own, other in zip(ledger.each_sample(a), ledger.each_sample(b), strict=True):
            if own["loss"] is None or other["loss"] is None:
                without += 1
            else:
                pairs.append(Pair(own["domain"], own["loss"], other["loss"]))
    if without or steps < asked:
        screen.say(
            f"{steps:,} of {asked:,} steps are there in both arms; {without:,} documents have no loss in one of them"
        )
    if not pairs:
        raise UserError("no document has a loss in both arms; nothing can be paired")
    return pairs
