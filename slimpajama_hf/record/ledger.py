"""The one record of a run: `ledger.jsonl`, one JSON object per optimizer step, append-only.

Everything a run shows (metrics, charts, report) is a view of this file and can be made again from it.
A resume cuts the file back to the step of its checkpoint; nothing else ever rewrites it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

FILE_NAME = "ledger.jsonl"

#: What may differ between an interrupted run and an unbroken one; left out of the hash chain.
TIME_FIELDS = frozenset({"throughput", "step_seconds"})

#: The hash before the first row.
CHAIN_START = "0" * 32


@dataclasses.dataclass
class Row:
    """One optimizer step. Floats that are not finite are written as `null`."""

    step: int
    """Optimizer step, from 0: the loss of step s is that of the weights after s updates."""
    loss: float
    """Mean over the predicted tokens, nats per token."""
    accuracy: float
    """Fraction of next tokens right, teacher-forced."""
    tokens: int
    """Tokens of the sample; all but the first of each sample are predicted."""
    text_bytes: int
    """UTF-8 bytes of the document that those tokens cover."""
    throughput: float
    """Tokens per second of training time of this step."""
    learning_rate: float
    """The rate that this step's update used."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""
    mirror: str
    """The corpus as it was opened: `hub_id@revision`, `embedded`, or `local`."""
    shard: str
    """File inside the mirror (or the path of a local file)."""
    row: int
    """Record inside the shard, from 0."""
    text_sha1: str
    """SHA-1 of the whole document in UTF-8, 40 hex digits."""
    domain: str
    """`redpajama_set_name`, or the embedded corpus' own name, or `unknown`."""
    tokens_cut: int
    """Tokens of the document that this sample leaves out; an estimate where `tokens_cut_exact` is false."""
    tokens_cut_exact: bool
    """Whether the document was tokenized to its end (a long one is not: cost is bounded by what is kept)."""
    code_bits: float
    """Code length in bits: `(loss * predicted + samples * ln V) / ln 2`, a first token at its uniform cost."""
    step_seconds: float
    """Training time of the step in seconds, charts, samples, evaluation and saving left out."""
    update_skipped: str = ""
    """Why the weights were left as they were: `not finite` or `out of memory`; empty for an ordinary step."""
    spike: float | None = None
    """Robust z-score of the loss among the 200 steps before it, where it stands out; else null."""
    grad_square: float | None = None
    """Where noise was measured (`noise.py`), mean squared norm of clipped gradients of some documents; else null."""
    grad_agreement: float | None = None
    """Likewise the mean product of two of them: the part of `grad_square` that is signal."""
    grad_layers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Likewise both numbers of each layer's part of the gradient, which add up to them; else empty."""
    loss_after: float | None = None
    """Where it was looked at what a step teaches (`teaching.py`), its document's loss after the update; else null."""
    next_loss: float | None = None
    """Likewise the loss of the next step's document before the update; the next row has it after the update."""
    part: int = 0
    """Which sample of its document this is, from 0 (always 0 for `truncate`)."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Records passed over since the sample before, by reason."""
    gaps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Shards set aside since the sample before: shard, row from which it is missing, reason."""
    documents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """In `pack`, all documents of the block in order: shard, row, text_sha1, first_token, tokens (its EOS counted)."""
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Where a step has several samples (of several processes, or accumulated), all of them in the order of the stream:
    rank, shard, row, text_sha1, domain, part, tokens, text_bytes, tokens_cut, loss, accuracy, documents. Then `loss`
    and `accuracy` of the row are means over all predicted tokens, `tokens`, `text_bytes`, `tokens_cut` and `code_bits`
    sums, and the document that the row names is the first's."""


def samples_of(row: dict[str, Any]) -> int:
    """Samples of a step: one, if it does not say otherwise."""
    return max(len(row.get("samples", ())), 1)


def each_sample(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The row as one of each of its samples, in the order of the stream; itself where a step is one sample."""
    samples = row.get("samples")
    if not samples:
        yield row
    for sample in samples or ():
        yield {**row, **sample, "samples": []}


def predicted(row: dict[str, Any]) -> int:
    """Tokens that a step predicted: of each sample all but the first."""
    return max(row["tokens"] - samples_of(row), 0)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encode(row: dict[str, Any]) -> str:
    """A row as one line of strict JSON, without its newline."""
    finite = {k: _finite(v) for k, v in row.items()}
    if row.get("samples"):
        finite["samples"] = [{k: _finite(v) for k, v in sample.items()} for sample in row["samples"]]
    return json.dumps(finite, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def chain_hash(before: str, row: dict[str, Any]) -> str:
    """Hash of a row and all rows before it: 32 hex digits of BLAKE2b over what does not depend on the clock."""
    bare = {k: v for k, v in row.items() if k not in TIME_FIELDS and k != "chain"}
    return hashlib.blake2b((before + encode(bare)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Ledger:
    """Appends rows to `ledger.jsonl`. One write per row, so that a killed process loses no row it has recorded."""

    def __init__(self, path: Path, chain: str = CHAIN_START) -> None:
        self.path = path
        self.chain = chain
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run

    def append(self, row: Row) -> dict[str, Any]:
        """Write one row and return it as written (with `chain`). Raises OSError when the disk is full."""
        # Not `dataclasses.asdict`: it copies deeply, which takes longer than the rest of this.
        record = dict(vars(row))
        record["chain"] = chain_hash(self.chain, record)
        line = (encode(record) + "\n").encode("utf-8", "surrogatepass")
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device", str(self.path))
        except OSError:
            # Half a row must not stay: the next one would be glued to it.
            os.ftruncate(self._file.fileno(), start)
            raise
        self.chain = record["chain"]
        return record

    def sync(self) -> None:
        """Force the rows to the disk (before a checkpoint that counts on them)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing is buffered here."""
        self._file.close()


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a ledger holds after it was cut back."""

    chain: str
    """Chain hash of the last row."""
    predicted: int
    """Tokens that its steps predicted: where the surprisals of the next step begin."""


def cut_back(path: Path, step: int) -> Kept:
    """Drop the rows of `step` and later (and a torn last line).

    Raises ValueError when the ledger ends before `step`: then it does not belong to the checkpoint.
    """
    chain, kept, expected, trained = CHAIN_START, 0, 0, 0
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                if expected == step or not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                if row["step"] != expected:
                    raise ValueError(f"{path} has step {row['step']} where step {expected} was expected")
                chain, expected = row["chain"], expected + 1
                trained += predicted(row)
                kept += len(line)
        with open(path, "r+b") as file:
            file.truncate(kept)
            os.fsync(file.fileno())
    if expected < step:
        raise ValueError(f"{path} holds {expected} steps, the checkpoint was taken after {step}")
    return Kept(chain, trained)


def last_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` rows, oldest first, read from the end of the file."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        block = b""
        while end > 0 and block.count(b"\n") <= count:
            start = max(0, end - 2**18)
            file.seek(start)
            block, end = file.read(end - start) + block, start
    return [json.loads(line) for line in block.splitlines()[-count:]]


def read_row(path: Path, step: int) -> dict[str, Any] | None:
    """The row of `step`, or None."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number == step and line.endswith(b"\n"):
                return json.loads(line)
    return None
