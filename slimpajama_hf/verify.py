"""Proof that a run is what its ledger says: its files agree, its steps can be done again, two runs are the same.

`verify` reads, `replay` trains again and compares bit by bit, `compare` holds two runs side by side. Ledgers are
streamed: nothing here grows with a row but 16 bytes for its document and 8 for each number of `metrics_history.json`.

To add a check: a function and a row of `CHECKS`. It takes the run and returns its `Finding`; one that wants to see the
rows is a generator that is sent each row in turn, then None, and returns its `Finding`.
"""

from __future__ import annotations

import dataclasses
import filecmp
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf import checkpoints, cli, files, ledger, screen, surprisals
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.run_folder import RunFolder
from slimpajama_hf.views import METRICS

Row = dict[str, Any]

SCRIPT = Path(__file__).resolve().parent.parent / "run_clm_slimpajama.py"

#: Fields that every row has; later versions may add fields that have a default.
_REQUIRED = frozenset(
    field.name
    for field in dataclasses.fields(ledger.Row)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
) | {"chain"}

#: Keys of run_config.yaml that a replay leaves out: they cost time or reach the outside, and do not touch a step.
_NOT_REPLAYED = re.compile(r"output_dir|eval_steps|eval_on_start|report_to|run_name|trackio_.*|push_to_hub|hub_.*")

#: An interval that never comes.
_NEVER = "1000000000"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a command found: whether all holds, the lines that say it, and the same for a program."""

    ok: bool
    lines: list[str]
    data: dict[str, Any]
    """JSON values."""


# ---- the run ----


class Run:
    """A run folder as it lies there. Raises UserError when it is not the folder of a run."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(Path(path).expanduser())
        self.record = self.folder.read_record()
        self.manifests = {step: _manifest(self.folder.path, step) for step in checkpoints.steps(self.folder.path)}
        """Manifest of each checkpoint by its step, ascending; None where it cannot be read."""
        self.unreadable: list[str] = []
        """What is wrong with the lines that `rows` passed over, since somebody last emptied this."""

    def config(self) -> dict[str, Any]:
        """The keys of run_config.yaml; nothing if it is not there. Raises UsageError when it is no configuration."""
        return cli.read_config(str(self.folder.config)) if self.folder.config.is_file() else {}

    def rows(self) -> Iterator[Row]:
        """The rows of the ledger that can be read; of the others, `unreadable` says what is wrong."""
        if not self.folder.ledger.is_file():
            return
        with open(self.folder.ledger, "rb") as file:
            for line in file:
                try:
                    row = read_row(line)
                except ValueError as error:
                    self.unreadable.append(str(error))
                else:
                    yield row

    def whole_rows(self) -> Iterator[Row]:
        """The rows of the ledger, each with the step that its line stands for. Raises UserError at the first other."""
        for number, row in enumerate(self.rows()):
            if self.unreadable or row["step"] != number:
                wrong = self.unreadable[0] if self.unreadable else f"its line holds step {row['step']}"
                raise UserError(
                    f"{self.folder.ledger}: step {number}: {wrong}; "
                    f"see python -m slimpajama_hf verify {self.folder.path}"
                )
            yield row


def _manifest(run: Path, step: int) -> dict[str, Any] | None:
    try:
        manifest = json.loads((checkpoints.path_of(run, step) / checkpoints.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not strict JSON ({name})")


def read_row(line: bytes) -> Row:
    """A line of a ledger as a row. Raises ValueError saying what is wrong with it in a few words."""
    if not line.endswith(b"\n"):
        raise ValueError("a torn line (it has no end)")
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if missing := _REQUIRED - row.keys():
        raise ValueError(f"fields are missing ({', '.join(sorted(missing))})")
    if type(row["step"]) is not int:
        raise ValueError(f"its step is no number ({row['step']!r})")
    return row


# ---- what a check says ----


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    ok: bool
    words: str
    problems: tuple[str, ...] = ()
    """The first of them, at most `Problems.KEPT`."""


class Problems:
    """Collects what is wrong, in order; the first is what is shown."""

    KEPT = 20

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, words: str) -> None:
        self.count += 1
        if len(self.first) < self.KEPT:
            self.first.append(words)

    def finding(self, words_if_none: str) -> Finding:
        """All is well with these words, or it failed with what was collected."""
        if not self.count:
            return Finding(True, words_if_none)
        more = f"; and {self.count - 1:,} more" if self.count > 1 else ""
        return Finding(False, self.first[0] + more, tuple(self.first))


#: A check that sees the rows: it is sent each one, then None.
Watch = Generator[None, Row | None, Finding]


# ---- checks ----


def rows_follow_each_other(run: Run) -> Watch:
    """Strict JSON, steps 0..n-1, and the hash chain computed anew."""
    problems = Problems()
    expected, chain = 0, ledger.CHAIN_START
    before: str | None = chain  # None: not known, so that one damage is told once
    while True:
        row = yield
        for words in run.unreadable:
            problems.add(f"step {expected}: {words}")
            expected, before = expected + 1, None
        run.unreadable.clear()
        if row is None:
            break
        if row["step"] != expected:
            problems.add(_gap(expected, row["step"]))
        elif before is not None and ledger.chain_hash(before, row) != row["chain"]:
            problems.add(f"step {expected}: a value was changed (its hash does not follow from the row)")
        # After a gap the hash of this row cannot be computed: the row before it is not there.
        expected, before = row["step"] + 1, row["chain"]
        chain = row["chain"]
    if not expected:
        return Finding(False, f"no rows in {run.folder.ledger.name}")
    return problems.finding(f"{expected:,} rows, steps 0 to {expected - 1:,} without a hole; hash chain {chain}")


def _gap(expected: int, found: int) -> str:
    if found < expected:
        return f"step {found}: it comes again after step {expected - 1}"
    missing = f"the row of step {expected} is" if found == expected + 1 else f"rows {expected} to {found - 1} are"
    return f"step {expected}: {missing} missing (step {found} stands there)"


def checkpoint_files(run: Run) -> Finding:
    """Every file of every checkpoint has the size and the SHA-256 of its manifest."""
    problems, size = Problems(), 0
    for step, manifest in run.manifests.items():
        wrong = _checkpoint_problem(run, step)
        if wrong is not None:
            problems.add(f"checkpoint-{step}: {wrong}")
        elif manifest is not None:
            size += sum(entry["bytes"] for entry in manifest["files"].values())
    count = len(run.manifests)
    return problems.finding(f"{count} whole, {size / 1e6:,.1f} MB" if count else "none there")


def _checkpoint_problem(run: Run, step: int) -> str | None:
    try:
        return checkpoints.problem(checkpoints.path_of(run.folder.path, step))
    except (KeyError, TypeError, AttributeError):
        return "its manifest is not one of ours"


def checkpoint_identity(run: Run) -> Finding:
    """Every checkpoint is of this run, and of the step that its folder is named after."""
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
    """Each checkpoint was taken of this very ledger: its chain hash is that of the last row before it."""
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
    """Reading goes on behind the document of the last row before each checkpoint."""
    problems = Problems()
    # Only of documents taken whole and in order is the next place known exactly.
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
        cursor = json.loads(path.read_text(encoding="utf-8"))["cursor"]
        shard, place = cursor["shard"], cursor["row"]
        used, size = cursor.get("used", 0), cursor.get("size", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no cursor can be read in {path.name}"
    if size or shuffled:
        # Shard and row are where the block begins: of the last document they say nothing.
        return f"record {used} of a shuffled block of {size}" if size and not 0 <= used < size else None
    *_, row = ledger.each_sample(row)
    same = shard == row["shard"]
    if exact and not (same and place == row["row"] + 1):
        return f"goes on at {shard} row {place}, its last document was {row['shard']} row {row['row']}"
    if not exact and same and place < row["row"]:
        return f"goes back to {shard} row {place}, its last document was row {row['row']}"
    return None


def metrics_history(run: Run) -> Watch:
    """metrics_history.json is the ledger's columns, as far as it goes (a killed run leaves a shorter one)."""
    problems, last = Problems(), -1
    path = run.folder.viz / "metrics_history.json"
    columns = _read_history(path)
    shown = min((len(values) for values in columns.values()), default=0)
    while (row := (yield)) is not None:
        last = row["step"]
        if 0 <= last < shown:
            for key, values in columns.items():
                if not _same_number(float(values[last]), row[METRICS[key]]):
                    value = None if math.isnan(values[last]) else values[last].item()
                    problems.add(f"step {last}: {key} is {_shown(value)}, the ledger has {_shown(row[METRICS[key]])}")
    if shown > last + 1:
        problems.add(f"{path.name} shows {shown:,} steps, the ledger has {last + 1:,}")
    if len({len(values) for values in columns.values()}) > 1:
        problems.add(f"{path.name}: its lists are of different lengths")
    if not columns:
        return Finding(True, f"no {path.name} yet (python -m slimpajama_hf views makes it)")
    return problems.finding(f"{shown:,} of {last + 1:,} steps, all as in the ledger")


def _read_history(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics_history.json as arrays of shape (steps,), null as NaN; empty when there is no such file.

    Raises ValueError when it is not what it should be.
    """
    if not path.is_file():
        return {}
    history = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    if missing := [key for key in list(METRICS)[:5] if key not in history]:
        raise ValueError(f"{path.name} has no {', '.join(missing)}")
    # Lists are let go one by one: a million steps are 50 MB as arrays.
    return {key: np.array(history.pop(key), dtype=np.float64) for key in METRICS if key in history}


def _same_number(shown: float, recorded: Any) -> bool:
    return math.isnan(shown) if recorded is None else bool(shown == recorded)


def text_samples(run: Run) -> Finding:
    """text_samples.json is the objects of samples.jsonl, as far as it goes."""
    problems, count = Problems(), 0
    path = run.folder.viz / "text_samples.json"
    if not path.is_file():
        return Finding(True, f"no {path.name} yet (python -m slimpajama_hf views makes it)")
    pairs = itertools.zip_longest(_elements(path.read_text(encoding="utf-8")), _json_lines(run.folder.samples))
    for number, (shown, sample) in enumerate(pairs):
        if shown is None:
            break
        count += 1
        if sample is None:
            problems.add(f"{path.name} shows more than the {number:,} samples of {run.folder.samples.name}")
            break
        if shown != sample:
            names = [name for name in sample | shown if sample.get(name) != shown.get(name)]
            problems.add(f"step {sample.get('step')}: {', '.join(names)} not as in {run.folder.samples.name}")
    return problems.finding(f"{count:,} samples, all as they were written")


def _elements(text: str) -> Iterator[Any]:
    """The elements of a JSON array one by one. Raises ValueError where it is none."""
    decoder, blank = json.JSONDecoder(parse_constant=_refuse_constant), re.compile(r"[\s,]*")
    place = text.index("[") + 1
    while (place := blank.match(text, place).end()) < len(text) and text[place] != "]":  # type: ignore[union-attr]
        value, place = decoder.raw_decode(text, place)
        yield value
    if text[place:].strip() != "]":
        raise ValueError("a JSON array that has no end")


def _json_lines(path: Path) -> Iterator[Any]:
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def samples_of_the_ledger(run: Run) -> Watch:
    """Each sample's accuracy and domain are those of the row of its step."""
    problems, count, last = Problems(), 0, -1
    samples = _json_lines(run.folder.samples)
    sample = next(samples, None)
    while (row := (yield)) is not None:
        last = row["step"]
        row = next(ledger.each_sample(row))
        while sample is not None and sample["step"] <= last:
            count += 1
            if sample["step"] < last:
                problems.add(f"step {sample['step']}: a sample out of order, or of a row that is not there")
            else:
                for name in ("accuracy", "domain"):
                    if sample[name] != row[name]:
                        problems.add(f"step {last}: {name} {_shown(sample[name])}, the row has {_shown(row[name])}")
            sample = next(samples, None)
    # A sample is taken before its row is written: a run killed between the two leaves one more.
    while sample is not None:
        count += 1
        if sample["step"] != last + 1:
            problems.add(f"step {sample['step']}: a sample of a row that is not there")
        sample = next(samples, None)
    return problems.finding(f"{count:,} samples, accuracy and domain as in their rows")


def latest_chart(run: Run) -> Watch:
    """training_latest.png is the newest chart, byte for byte."""
    last = -1
    while (row := (yield)) is not None:
        last = row["step"]
    found = {int(match[1]): path for path in run.folder.viz.glob("training_step_*.png")
             if (match := re.fullmatch(r"training_step_(\d+)\.png", path.name))}  # fmt: skip
    # A resume cuts the ledger back, and leaves the charts of the steps that it does again.
    charts = [found[step] for step in sorted(found) if step <= last + 1]
    latest = run.folder.latest_chart
    if not charts and not latest.exists():
        return Finding(True, "no chart yet (python -m slimpajama_hf views makes one)")
    if not latest.exists():
        return Finding(False, f"{latest.name} is missing, {charts[-1].name} is there")
    if not charts:
        return Finding(False, f"{latest.name} is there, and no chart of a step")
    if not filecmp.cmp(latest, charts[-1], shallow=False):
        return Finding(False, f"{latest.name} is not {charts[-1].name}")
    return Finding(True, f"{latest.name} is {charts[-1].name}")


def documents_once(run: Run) -> Watch:
    """No document is trained twice in one pass over the corpus; that it is, is said and is no failure."""
    shards: dict[tuple[str, str], int] = {}
    places, rows_of = (array("i"), array("q"), array("i")), array("q")
    while (row := (yield)) is not None:
        for each in ledger.each_sample(row):
            shard = shards.setdefault((each["mirror"], each["shard"]), len(shards))
            for column, value in zip(places, (shard, each["row"], each.get("part", 0)), strict=True):
                column.append(value)
            rows_of.append(row["step"])
    if float(run.config().get("epochs") or 1) > 1:
        return Finding(True, f"{len(places[0]):,} samples; not looked at: the run makes several passes")
    again = _first_repetition(*places)
    if again is None:
        return Finding(True, f"{len(places[0]):,} documents or parts of them, none twice")
    count, first, second = again
    name = list(shards)[places[0][first]][1]
    document = f"{name} row {places[1][first]} (rows {rows_of[first]} and {rows_of[second]} of the ledger)"
    return Finding(True, f"note: {count:,} trained twice, the first {document}")


def _first_repetition(*columns: array) -> tuple[int, int, int] | None:
    """(number of repetitions, place of the first that comes again, where it does) among the rows of some columns."""
    values = [np.frombuffer(column, dtype=column.typecode) for column in columns]
    if not len(values[0]):
        return None
    order = np.lexsort(values)  # stable: equal ones stay in the order of the ledger
    same = np.logical_and.reduce([value[order][1:] == value[order][:-1] for value in values])
    if not same.any():
        return None
    second = order[1:][same]
    where = int(second.argmin())
    return int(same.sum()), int(order[:-1][same][where]), int(second[where])


def code_bits(run: Run) -> Watch:
    """`code_bits` is `(loss * predicted + samples * ln V) / ln 2`, to 1e-9."""
    problems, count = Problems(), 0
    # Runs before this had a name of its own had a model of just as many tokens.
    vocabulary = run.record.get("tokenizer_size") or run.record.get("model", {}).get("vocab_size")
    uniform = math.log(vocabulary or 1)
    while (row := (yield)) is not None:
        count += 1
        loss, bits = row["loss"], row["code_bits"]
        if not vocabulary or (loss is None and bits is None):
            continue
        expected = (
            None if loss is None else (loss * ledger.predicted(row) + ledger.samples_of(row) * uniform) / math.log(2)
        )
        if expected is None or bits is None or not math.isclose(bits, expected, rel_tol=1e-9):
            problems.add(f"step {row['step']}: code_bits {_shown(bits)}, loss and tokens make {_shown(expected)}")
    if not vocabulary:
        return Finding(True, "not looked at: run.json has no tokenizer_size")
    return problems.finding(f"{count:,} rows, as loss and tokens make them")


def surprisals_of_the_ledger(run: Run) -> Watch:
    """The tokens of each step have the step's loss as their mean."""
    problems, count = Problems(), 0
    path = run.folder.surprisals
    if not path.exists():
        while (yield) is not None:
            pass
        return Finding(True, f"not looked at: a run without {path.name}")
    with open(path, "rb") as file:
        while (row := (yield)) is not None:
            predicted = ledger.predicted(row)
            nats = np.frombuffer(file.read(surprisals.DTYPE.itemsize * predicted), surprisals.DTYPE).astype(np.float64)
            if len(nats) < predicted:
                problems.add(f"step {row['step']}: {path.name} ends before it")
            elif row["loss"] is None or np.isnan(nats).all():
                # A step without a loss, or one of a run that was begun before they were kept.
                continue
            elif not abs(nats.mean() - row["loss"]) <= 1e-4 * max(1.0, row["loss"]):
                problems.add(f"step {row['step']}: loss {_shown(row['loss'])}, its tokens' mean is {nats.mean():.4f}")
            else:
                count += 1
    return problems.finding(f"{count:,} steps, the mean of the tokens is the loss")


#: Every check: its name on the screen, and the function.
CHECKS: tuple[tuple[str, Callable[[Run], Finding | Watch]], ...] = (
    ("ledger", rows_follow_each_other),
    ("code bits", code_bits),
    ("documents", documents_once),
    ("checkpoint files", checkpoint_files),
    ("checkpoint identity", checkpoint_identity),
    ("checkpoint chain", checkpoint_chain),
    ("checkpoint cursor", checkpoint_cursor),
    ("metrics history", metrics_history),
    ("text samples", text_samples),
    ("sample accuracy", samples_of_the_ledger),
    ("surprisals", surprisals_of_the_ledger),
    ("latest chart", latest_chart),
)


class _Checking:
    """One check on its way through the rows. Damage that it did not think of is a failure of it, not of the program."""

    def __init__(self, check: Callable[[Run], Finding | Watch], run: Run) -> None:
        self.finding: Finding | None = None
        self._watch: Watch | None = None

        def start() -> None:
            outcome = check(run)
            if isinstance(outcome, Finding):
                self.finding = outcome
            else:
                self._watch = outcome
                next(outcome)

        self._guarded(start, "")

    def send(self, row: Row | None) -> None:
        """One more row; None: there are no more."""
        watch = self._watch
        if self.finding is None and watch is not None:
            self._guarded(lambda: watch.send(row), f"step {row['step']}: " if row is not None else "")

    def _guarded(self, act: Callable[[], None], where: str) -> None:
        try:
            act()
        except StopIteration as end:
            self.finding = end.value
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, OSError) as error:
            words = f"{where}cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            self.finding = Finding(False, words, (words,))


def verify(path: str | Path) -> Report:
    """All `CHECKS` on a run, in one pass over its ledger. Raises UserError when it is not the folder of a run."""
    run = Run(path)
    checking = [(name, _Checking(check, run)) for name, check in CHECKS]
    for row in run.rows():
        for _, each in checking:
            each.send(row)
    findings: list[tuple[str, Finding]] = []
    for name, each in checking:
        each.send(None)
        assert each.finding is not None
        findings.append((name, each.finding))
    ok = all(finding.ok for _, finding in findings)
    lines = [f"{'ok' if finding.ok else 'FAILED':<7} {name:<20} {finding.words}" for name, finding in findings]
    failed = sum(not finding.ok for _, finding in findings)
    lines.append(f"{path}: " + ("all of it holds" if ok else f"{failed} of {len(findings)} checks failed"))
    return Report(ok, lines, {
        "run": str(path), "ok": ok,
        "checks": [{"name": name, **dataclasses.asdict(finding)} for name, finding in findings],
    })  # fmt: skip


# ---- rows side by side ----


def differences(left: Row, right: Row) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two rows, bit by bit, with both values; the clock is left out.

    `chain` is named only where nothing else differs: it follows from the others.
    """
    found = {
        name: (left.get(name), right.get(name))
        for name in left | right
        if name not in ledger.TIME_FIELDS and _bits(left.get(name)) != _bits(right.get(name))
    }
    if len(found) > 1:
        found.pop("chain", None)
    return found


def _bits(value: Any) -> Any:
    """A value such that only equal bits are equal: 1 is not 1.0, and -0.0 not 0.0."""
    return value.hex() if isinstance(value, float) else (type(value), value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def side_by_side(found: dict[str, tuple[Any, Any]]) -> str:
    """Fields that differ with both values, in words."""
    return ", ".join(f"{name} {_shown(left)} / {_shown(right)}" for name, (left, right) in found.items())


# ---- replay ----


def parse_range(text: str) -> tuple[int, int]:
    """`A:B` as (A, B). Raises UsageError when it is no range of steps."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--replay {text}: expected A:B, the steps from A up to and without B, as 100:200")
    return int(match[1]), int(match[2])


def replay(path: str | Path, first: int, end: int) -> Report:
    """Do the steps `first` to `end - 1` of a run again, elsewhere, and compare their rows bit by bit.

    Starts from the nearest whole checkpoint at or before `first`, else from the very start. Raises UserError when the
    ledger has no such steps, or when training them again does not succeed.
    """
    run = Run(path)
    config = cli.read_config(str(run.folder.config))
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
    """Raise UserError when the ledger has not got these steps."""
    count = 0
    if run.folder.ledger.is_file():
        with open(run.folder.ledger, "rb") as file:
            count = sum(line.endswith(b"\n") for line in file)
    if end > count:
        raise UserError(
            f"--replay {first}:{end}: {run.folder.path} has {count:,} steps; expected A:B with 0 <= A < B <= {count}"
        )


def nearest_checkpoint(run: Run, step: int) -> tuple[int, list[str]]:
    """The newest whole checkpoint at or before `step` (0: none), and what was wrong with those passed over."""
    notes: list[str] = []
    for candidate in reversed([each for each in run.manifests if each <= step]):
        wrong = _checkpoint_problem(run, candidate)
        if wrong is None:
            return candidate, notes
        notes.append(f"checkpoint-{candidate} passed over: {wrong}")
    return 0, notes


def not_as_it_was(record: dict[str, Any]) -> list[str]:
    """What this machine has otherwise than the one of the run, where sums may come out in other bits."""
    notes = []
    for name, version in record.get("libraries", {}).items():
        here = importlib.metadata.version(name)
        if here != version:
            notes.append(f"the run was made with {name} {version}, here is {here}: bits may differ")
    if "torch_threads" not in record:
        notes.append("run.json does not say with how many threads torch ran: with another number bits may differ")
    return notes


def other_threads(run: Run, again: Run) -> list[str]:
    """Whether steps were done again with another number of threads, in words."""
    before, now = run.record.get("torch_threads"), again.record.get("torch_threads")
    return [f"torch ran with {before} threads, now with {now}: bits may differ"] if before and before != now else []


def _lay_out(run: Run, start: int, again: Path) -> None:
    """A run folder that stands at step `start`: record, first rows, checkpoint. Nothing of the run is written to."""
    again.mkdir()
    shutil.copyfile(run.folder.record, RunFolder(again).record)
    if not start:
        return
    with open(run.folder.ledger, "rb") as source, open(RunFolder(again).ledger, "wb") as copy:
        copy.writelines(itertools.islice(source, start))
    shutil.copytree(checkpoints.path_of(run.folder.path, start), checkpoints.path_of(again, start), copy_function=link)


def link(source: str, target: str) -> None:
    """The same file in another place without a copy: weights are gigabytes, and a replay only reads them."""
    try:
        os.link(source, target)
    except OSError:
        # Another file system.
        os.symlink(os.path.realpath(source), target)


#: Flags of a replay: nothing but its ledger matters.
_SEEN_BY_NOBODY = ("--no-checkpoint", "--viz_interval", _NEVER, "--display_samples", _NEVER)


def train_again(
    run: Run, config: dict[str, Any], end: int, again: Path, settings: Path, flags: Sequence[str] = _SEEN_BY_NOBODY
) -> None:
    """The real training script, in a process of its own, on the folder `again` up to step `end`.

    `config`: what run_config.yaml of `run` says, written to `settings` without what reaches the outside. Raises
    UserError with its exit code when it fails; its stderr is ours, so that it is seen to move.
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
        # torch takes MKL's number over OpenMP's where both are set (aten/src/ATen/ParallelOpenMP.cpp).
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # A Ctrl-C went to it too: it saves after the step that is on. Another one ends both.
        process.wait()
        raise
    if code:
        raise UserError(f"the steps could not be done again: training ended with exit code {code} (see above)")


def replayed_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what reaches the outside, with a warm-up that does not hang on --max_steps."""
    kept = {name: value for name, value in config.items() if not _NOT_REPLAYED.fullmatch(name)}
    warmup = float(kept.get("warmup_steps", 0))
    if 0 < warmup < 1:
        # As TrainingArguments.get_warmup_steps does with the steps of the whole run.
        kept["warmup_steps"] = math.ceil(int(config["max_steps"]) * warmup)
    return kept


def _compare_replayed(run: Run, again: Run, first: int, end: int) -> list[tuple[int, dict[str, tuple[Any, Any]]]]:
    """Steps from `first` to `end - 1` that differ between the ledger and its replay, with the fields that do."""
    parted = []
    then, now = (itertools.islice(each.whole_rows(), first, end) for each in (run, again))
    for step, (left, right) in enumerate(itertools.zip_longest(then, now), start=first):
        if right is None:
            raise UserError(f"the replay ended before step {step}: the corpus has no more documents")
        found = differences(left, right)
        if found:
            parted.append((step, found))
    return parted


# ---- two runs ----


def compare(path: str | Path, other: str | Path) -> Report:
    """Whether two runs are the same run; that one goes further than the other does not make them differ.

    Raises UserError when a ledger cannot be read from its start on.
    """
    left, right = Run(path), Run(other)
    same, found, ended = compare_ledgers(left, right)
    weights = _compare_weights(left, right)
    # Behind the step where ledgers part, weights differ of course.
    early = [step for step, equal in weights.items() if not equal and step <= same]
    ok = not found and not early
    lines = [_words_on_steps(path, other, same, found, ended)]
    lines += [
        f"checkpoint-{step}: model.safetensors {'equal' if equal else 'differs'}" for step, equal in weights.items()
    ]
    settings = _differing(_comparable(left), _comparable(right))
    lines += [f"{name}: {_shown(a)} / {_shown(b)}" for name, (a, b) in settings.items()]
    return Report(ok, lines, {
        "run": str(path), "other": str(other), "ok": ok, "same_steps": same, "parts_at": same if found else None,
        "differences": found, "prefix": ended if not found else None, "weights_equal": weights,
        "configuration": settings,
    })  # fmt: skip


def compare_ledgers(left: Run, right: Run) -> tuple[int, dict[str, tuple[Any, Any]], str | None]:
    """(steps that are the same, fields that differ at the next, which ended first: `run`, `other` or None)."""
    same = 0
    for a, b in itertools.zip_longest(left.whole_rows(), right.whole_rows()):
        if a is None or b is None:
            return same, {}, "run" if a is None else "other"
        found = differences(a, b)
        if found:
            return same, found, None
        same += 1
    return same, {}, None


def _words_on_steps(
    path: str | Path, other: str | Path, same: int, found: dict[str, tuple[Any, Any]], ended: str | None
) -> str:
    if found:
        return f"they part at step {same}: {side_by_side(found)}"
    if ended is None:
        return f"the same for {same:,} steps"
    short, long = (path, other) if ended == "run" else (other, path)
    return f"the same for {same:,} steps; there {short} ends, and {long} goes on"


def _compare_weights(left: Run, right: Run) -> dict[int, bool]:
    """Whether the weights of each checkpoint that both runs have are equal, byte for byte."""
    result = {}
    for step in left.manifests.keys() & right.manifests.keys():
        a, b = (checkpoints.path_of(run.folder.path, step) / "model.safetensors" for run in (left, right))
        result[step] = a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)
    return dict(sorted(result.items()))


def _comparable(run: Run) -> dict[str, Any]:
    """What two runs may have otherwise: configuration, libraries, threads."""
    config = {name: value for name, value in run.config().items() if name != "output_dir"}
    machine = {name: run.record.get(name) for name in ("python", "platform", "torch_threads")}
    return config | run.record.get("libraries", {}) | machine


def _differing(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (left.get(name), right.get(name)) for name in left | right if left.get(name) != right.get(name)}
