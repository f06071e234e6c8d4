"""The record of a run: `ledger.jsonl`, one JSON object per optimizer step, append-only.

Everything else that a run shows (metrics, charts, report) can be made again from this file.
Only a resume rewrites it: it cuts the file back to the step of its checkpoint.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slimpajama_hf import files

FILE_NAME = "ledger.jsonl"

#: Fields that may differ between an interrupted run and an unbroken one; left out of the hash chain.
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
    """Fraction of next tokens predicted right, teacher-forced."""
    tokens: int
    """Tokens of the sample; all but the first of each sample are predicted."""
    text_bytes: int
    """UTF-8 bytes of the document that these tokens cover."""
    throughput: float
    """Tokens per second of training time of this step."""
    learning_rate: float
    """The learning rate of this step's update."""
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
    """Tokens of the document that this sample leaves out; an estimate if `tokens_cut_exact` is false."""
    tokens_cut_exact: bool
    """Whether the document was tokenized to its end. Long ones are not, because cost is bounded by what is kept."""
    code_bits: float
    """Code length in bits: `(loss * predicted + samples * ln V) / ln 2`; a first token has its uniform cost."""
    step_seconds: float
    """Training time of the step in seconds, without charts, samples, evaluation and saving."""
    update_skipped: str = ""
    """Why the update was skipped: `not finite` or `out of memory`; empty for an ordinary step."""
    spike: float | None = None
    """If the loss is a spike, its robust z-score among the 200 steps before it; else null."""
    grad_square: float | None = None
    """If noise was measured (`noise.py`), the mean squared norm of several documents' clipped gradients; else null."""
    grad_agreement: float | None = None
    """In the same steps, the mean product of two of these gradients: the signal in `grad_square`."""
    grad_layers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """In the same steps, both numbers of each layer's part of the gradient, which sum to the above; else empty."""
    loss_after: float | None = None
    """If the step's teaching was measured (`teaching.py`), its document's loss after the update; else null."""
    next_loss: float | None = None
    """In the same steps, the next step's document's loss before the update; the next row has it after the update."""
    part: int = 0
    """Index of this sample within its document, from 0 (always 0 for `truncate`)."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Records passed over since the sample before, by reason."""
    gaps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Shards set aside since the sample before: shard, first missing row, reason."""
    documents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """In `pack`, all documents of the block in order: shard, row, text_sha1, first_token, tokens (with EOS)."""
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """If a step has several samples (of several processes, or accumulated), all of them in the order of the stream:
    rank, shard, row, text_sha1, domain, part, tokens, text_bytes, tokens_cut, loss, accuracy, documents. Then the row's
    `loss` and `accuracy` are means over all predicted tokens, its `tokens`, `text_bytes`, `tokens_cut` and `code_bits`
    are sums, and it names the first sample's document."""
    added: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further numbers, by name; in the file they are fields of the row like any other."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as in the file, without `chain`."""
        # `dataclasses.asdict` copies deeply, which takes longer than the rest of a row.
        record = dict(vars(self))
        return record | record.pop("added")


#: Names of a row or of its samples that are not added numbers.
_FIELDS = frozenset(field.name for field in dataclasses.fields(Row)) | {"chain", "rank"}


def added(row: dict[str, Any]) -> dict[str, float | None]:
    """The numbers that a row of the file has besides the fields of `Row`; None for one that was not finite."""
    others = row.keys() - _FIELDS
    if not others:
        return {}
    return {name: row[name] for name in row if name in others and isinstance(row[name], int | float | None)}


def samples_of(row: dict[str, Any]) -> int:
    """How many samples a step has; one if the row does not say."""
    return max(len(row.get("samples", ())), 1)


def each_sample(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The row of each sample of a step, in the order of the stream; the row itself if a step is one sample."""
    samples = row.get("samples")
    if not samples:
        yield row
    for sample in samples or ():
        yield {**row, **sample, "samples": []}


def predicted(row: dict[str, Any]) -> int:
    """Predicted tokens of a step: all but the first of each sample."""
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
    """Hash of a row and all rows before it: 32 hex digits of BLAKE2b, without the fields that depend on the clock."""
    bare = {k: v for k, v in row.items() if k not in TIME_FIELDS and k != "chain"}
    return hashlib.blake2b((before + encode(bare)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Ledger:
    """Appends rows to `ledger.jsonl`, each by one write, so that a killed process loses no recorded row."""

    def __init__(self, path: Path, chain: str = CHAIN_START) -> None:
        self.path = path
        self.chain = chain
        self._file: BinaryIO = files.open_to_append(path)

    def append(self, row: Row) -> dict[str, Any]:
        """Write one row and return it as written (with `chain`). Raises OSError if the disk is full."""
        record = row.as_dict()
        record["chain"] = chain_hash(self.chain, record)
        line = (encode(record) + "\n").encode("utf-8", "surrogatepass")
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device", str(self.path))
        except OSError:
            # Half a row must not stay: the next one would be joined to it.
            os.ftruncate(self._file.fileno(), start)
            raise
        self.chain = record["chain"]
        return record

    def sync(self) -> None:
        """Flush the rows to the disk, before a checkpoint that refers to them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing is buffered here."""
        self._file.close()


# ---- reading ----

#: Fields that rows of all versions have; later fields have a default.
_ALWAYS = frozenset(
    field.name
    for field in dataclasses.fields(Row)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
) | {"chain"}


class Damaged(ValueError):
    """A ledger that cannot be read further. `step`: the first step that is not as it was written."""

    def __init__(self, path: Path, step: int, why: str) -> None:
        super().__init__(f"{path}: step {step}: {why}")
        self.step = step


def decode(line: bytes) -> dict[str, Any]:
    """The row in a line. Raises ValueError that says in a few words what is wrong with the line."""
    if not line.endswith(b"\n"):
        raise ValueError("a torn line (it has no end)")
    try:
        row = files.strict_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if missing := _ALWAYS - row.keys():
        raise ValueError(f"fields are missing ({', '.join(sorted(missing))})")
    if type(row["step"]) is not int:
        raise ValueError(f"its step is no number ({row['step']!r})")
    return row


def rows_and_ends(path: Path, offset: int = 0, first: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of a ledger, each with the byte after its line. Starts at step `first`, whose line begins at byte
    `offset`, and ends before a torn last line. Raises Damaged at a line that is not the row of its step."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for step, line in enumerate(file, first):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _row_of(path, line, step), offset


def _row_of(path: Path, line: bytes, step: int) -> dict[str, Any]:
    try:
        row = decode(line)
        if row["step"] != step:
            raise ValueError(f"its line holds step {row['step']}")
    except ValueError as error:
        raise Damaged(path, step, str(error)) from None
    return row


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ledger in order; none if there is no file. Raises Damaged like `rows_and_ends`."""
    return (row for row, _ in rows_and_ends(path))


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


@dataclasses.dataclass(frozen=True)
class Kept:
    """A summary of the first rows of a ledger."""

    chain: str = CHAIN_START
    """Chain hash of the last row."""
    bytes: int = 0
    """Size of their lines."""
    predicted: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """Predicted tokens of each step, (steps,)."""
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """Loss of each step, (steps,) nats per token, NaN if it has none."""


#: The form of a line that this program wrote: the fields read here, those of the clock, and the hash at the end.
_LINE = re.compile(
    rb'(\{"step":(\d+),"loss":([^,]+),"accuracy":[^,]+,"tokens":(\d+),"text_bytes":\d+,)"throughput":[^,]+,'
)
_SECONDS, _CHAIN, _ONE_SAMPLE = b'"step_seconds":', b',"chain":"', b'"samples":[]'


def check(path: Path, steps: int | None = None) -> Kept:
    """Check the hash chain of the first `steps` rows (None: of all); returns their summary.

    Lines in the form that this program writes are hashed without parsing their JSON. Raises Damaged at the first row
    that is not as it was written, or if there are fewer than `steps` rows.
    """
    chain, size, step = CHAIN_START.encode(), 0, 0
    predicted_, losses = array.array("q"), array.array("d")
    if path.is_file():
        # With the default buffer of 8 KB, lines of 600 bytes take a fifth longer.
        with open(path, "rb", buffering=2**20) as file:
            for line in file:
                if step == steps or not line.endswith(b"\n"):
                    break
                chain, tokens, loss = _checked_by_bytes(line, step, chain) or _checked(path, line, step, chain)
                predicted_.append(tokens)
                losses.append(loss)
                size, step = size + len(line), step + 1
    if steps is not None and step < steps:
        raise Damaged(path, step, f"its row is missing (the file holds {step:,} of {steps:,} steps)")
    return Kept(chain.decode(), size, np.array(predicted_, np.int64), np.array(losses, np.float64))


def follows(line: bytes, row: dict[str, Any], before: str) -> bool:
    """Whether the hash of a row follows from its values and the hash `before`. `line`: the row in the file."""
    return _checked_by_bytes(line, row["step"], before.encode()) is not None or chain_hash(before, row) == row["chain"]


def _checked_by_bytes(line: bytes, step: int, before: bytes) -> tuple[bytes, int, float] | None:
    """(chain hash, tokens predicted, loss) of a line as it was written; None if its bytes alone do not tell."""
    begin = _LINE.match(line)
    # Quotation marks inside strings have a backslash before them, so these are the fields themselves.
    if begin is None or line[-45:-35] != _CHAIN or line[-3:] != b'"}\n':
        return None
    # Usually the last field; added numbers come after it.
    if line[-57:-45] != _ONE_SAMPLE and _ONE_SAMPLE not in line:
        return None
    head, number, value, tokens = begin.groups()
    after = begin.end()
    seconds = line.find(_SECONDS, after)
    if seconds < 0 or int(number) != step:
        return None
    chain = line[-35:-3]
    # Without the fields of the clock, and without the hash itself.
    hashed = b"".join((before, head, line[after:seconds], line[line.find(b",", seconds) + 1 : -45], b"}"))
    if hashlib.blake2b(hashed, digest_size=16).hexdigest().encode() != chain:
        return None
    return chain, max(int(tokens) - 1, 0), math.nan if value == b"null" else float(value)


def _checked(path: Path, line: bytes, step: int, before: bytes) -> tuple[bytes, int, float]:
    row = _row_of(path, line, step)
    try:
        if chain_hash(before.decode(), row) != row["chain"]:
            raise ValueError("a value was changed (its hash does not follow from the row)")
        return row["chain"].encode(), predicted(row), math.nan if row["loss"] is None else float(row["loss"])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise Damaged(path, step, str(error)) from None


def cut_back(path: Path, steps: int) -> Kept:
    """Check the first `steps` rows and remove everything after them, also a torn last line. Raises Damaged, and
    removes nothing, if these rows are not complete and as they were written."""
    kept = check(path, steps)
    if path.exists() and path.stat().st_size != kept.bytes:
        with open(path, "r+b") as file:
            file.truncate(kept.bytes)
            os.fsync(file.fileno())
    return kept
