"""The one record of a run: `ledger.jsonl`, one JSON object per optimizer step, append-only.

Everything a run shows (metrics, charts, report) is a view of this file and can be made again from it.
A resume cuts the file back to the step of its checkpoint; nothing else ever rewrites it.
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
    added: dict[str, float] = dataclasses.field(default_factory=dict)
    """Numbers beside these, by name; in the file they are fields of the row like any other."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as the file has them, `chain` left out."""
        # Not `dataclasses.asdict`: it copies deeply, which takes longer than the rest of a row.
        record = dict(vars(self))
        return record | record.pop("added")


#: Names that a row may have, or one of its samples, and that are no added number.
_FIELDS = frozenset(field.name for field in dataclasses.fields(Row)) | {"chain", "rank"}


def added(row: dict[str, Any]) -> dict[str, float | None]:
    """The numbers that a row of the file has beside the fields of `Row`; None where one was not finite."""
    others = row.keys() - _FIELDS
    if not others:
        return {}
    return {name: row[name] for name in row if name in others and isinstance(row[name], int | float | None)}


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
        self._file: BinaryIO = files.open_to_append(path)

    def append(self, row: Row) -> dict[str, Any]:
        """Write one row and return it as written (with `chain`). Raises OSError when the disk is full."""
        record = row.as_dict()
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


# ---- reading ----

#: Fields that a row of any version has; later ones have a default.
_ALWAYS = frozenset(
    field.name
    for field in dataclasses.fields(Row)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
) | {"chain"}


class Damaged(ValueError):
    """A ledger that cannot be read on. `step`: the first step that is not as it was written."""

    def __init__(self, path: Path, step: int, why: str) -> None:
        super().__init__(f"{path}: step {step}: {why}")
        self.step = step


def decode(line: bytes) -> dict[str, Any]:
    """A line as a row. Raises ValueError saying in a few words what is wrong with it."""
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
    """The rows of a ledger from step `first` on, whose line begins at byte `offset`, and the byte behind each. A torn
    last line ends them. Raises Damaged at a line that is not the row of its step."""
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
    """The rows of a ledger in order; none where there is no file. Raises Damaged as `rows_and_ends` does."""
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
    """What the first rows of a ledger hold."""

    chain: str = CHAIN_START
    """Chain hash of the last row."""
    bytes: int = 0
    """Size of their lines."""
    predicted: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens that each step predicted, (steps,)."""
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """Loss of each step, (steps,) nats per token, NaN where it has none."""


#: What a line that this program wrote looks like: the fields that are needed, the clock's, and the hash at the end.
_LINE = re.compile(
    rb'(\{"step":(\d+),"loss":([^,]+),"accuracy":[^,]+,"tokens":(\d+),"text_bytes":\d+,)"throughput":[^,]+,'
)
_SECONDS, _CHAIN, _ONE_SAMPLE = b'"step_seconds":', b',"chain":"', b'"samples":[]'


def check(path: Path, steps: int | None = None) -> Kept:
    """Check the hash chain of the first `steps` rows (None: of all) and say what they hold.

    A line is hashed as it stands, without a JSON object of it, wherever it looks as this program writes it. Raises
    Damaged at the first row that is not as it was written, or where the rows end before `steps`.
    """
    chain, size, step = CHAIN_START.encode(), 0, 0
    predicted_, losses = array.array("q"), array.array("d")
    if path.is_file():
        # Lines of 600 bytes out of 8 KB at a time take a fifth longer.
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
    """Whether the hash of a row, as its line in the file, follows from its values and the hash before it."""
    return _checked_by_bytes(line, row["step"], before.encode()) is not None or chain_hash(before, row) == row["chain"]


def _checked_by_bytes(line: bytes, step: int, before: bytes) -> tuple[bytes, int, float] | None:
    """(chain hash, tokens predicted, loss) of a line that is as it was written; None: this way it cannot be told."""
    begin = _LINE.match(line)
    # In a string a quotation mark has a backslash before it: these are the fields.
    if begin is None or line[-45:-35] != _CHAIN or line[-3:] != b'"}\n':
        return None
    # Mostly the last of the fields; added numbers stand behind it.
    if line[-57:-45] != _ONE_SAMPLE and _ONE_SAMPLE not in line:
        return None
    head, number, value, tokens = begin.groups()
    after = begin.end()
    seconds = line.find(_SECONDS, after)
    if seconds < 0 or int(number) != step:
        return None
    chain = line[-35:-3]
    # Without what the clock says, and without the hash itself.
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
    """Check the first `steps` rows and drop what follows (a torn last line too). Raises Damaged, and drops nothing,
    where they are not as they were written or not all there."""
    kept = check(path, steps)
    if path.exists() and path.stat().st_size != kept.bytes:
        with open(path, "r+b") as file:
            file.truncate(kept.bytes)
            os.fsync(file.fileno())
    return kept
