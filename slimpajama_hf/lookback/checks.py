"""Checks that a run is what its ledger says, and that its files agree with each other.

Ledgers are streamed. Memory grows only by 16 bytes per row for its document, 24 for its tokens and loss, and 8 for each
number in `metrics_history.json`.

To add a check, write a function and add a row to `CHECKS`. It takes the run and returns its `Finding`. A check that
needs the rows is a generator that is sent each row, then None, and returns its `Finding`.
"""

from __future__ import annotations

import dataclasses
import filecmp
import itertools
import json
import math
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import files
from slimpajama_hf.errors import one_line
from slimpajama_hf.lookback import forget
from slimpajama_hf.lookback.checkpoint_checks import (
    checkpoint_chain,
    checkpoint_cursor,
    checkpoint_files,
    checkpoint_identity,
)
from slimpajama_hf.lookback.findings import Finding, Problems
from slimpajama_hf.lookback.run import Report, Run, shown_value
from slimpajama_hf.record import ledger, run_folder, surprisals
from slimpajama_hf.settings import what_matters
from slimpajama_hf.views.views import METRICS

if TYPE_CHECKING:
    from slimpajama_hf.lookback.findings import Watch
    from slimpajama_hf.lookback.run import Row


# ---- checks ----


def rows_follow_each_other(run: Run) -> Watch:
    """Rows are strict JSON, steps are 0..n-1, and the hash chain is right when it is computed again."""
    problems = Problems()
    expected, chain = 0, ledger.CHAIN_START
    before: str | None = chain  # None: unknown, so that one damage is reported once
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
        elif before is not None and not ledger.follows(run.line, row, before):
            problems.add(f"step {expected}: a value was changed (its hash does not follow from the row)")
        # After a gap this row's hash cannot be checked, because the row before is missing.
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


def metrics_history(run: Run) -> Watch:
    """metrics_history.json agrees with the ledger, as far as it goes (a killed run leaves a shorter one)."""
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
                    problems.add(
                        f"step {last}: {key} is {shown_value(value)}, the ledger has {shown_value(row[METRICS[key]])}"
                    )
    if shown > last + 1:
        problems.add(f"{path.name} shows {shown:,} steps, the ledger has {last + 1:,}")
    if len({len(values) for values in columns.values()}) > 1:
        problems.add(f"{path.name}: its lists are of different lengths")
    if not columns:
        return Finding(True, f"no {path.name} yet (python -m slimpajama_hf views makes it)")
    return problems.finding(f"{shown:,} of {last + 1:,} steps, all as in the ledger")


def _read_history(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics_history.json as arrays of shape (steps,), null as NaN; empty if there is no such file.

    Raises ValueError if a required key is missing or values are not numbers.
    """
    if not path.is_file():
        return {}
    history = files.strict_json(path.read_text(encoding="utf-8"))
    if missing := [key for key in list(METRICS)[:5] if key not in history]:
        raise ValueError(f"{path.name} has no {', '.join(missing)}")
    # Lists are freed one by one: a million steps are 50 MB as arrays.
    return {key: np.array(history.pop(key), dtype=np.float64) for key in METRICS if key in history}


def _same_number(shown: float, recorded: Any) -> bool:
    return math.isnan(shown) if recorded is None else bool(shown == recorded)


def text_samples(run: Run) -> Finding:
    """text_samples.json has the objects of samples.jsonl, as far as it goes."""
    problems, count = Problems(), 0
    path = run.folder.viz / "text_samples.json"
    if not path.is_file():
        return Finding(True, f"no {path.name} yet (python -m slimpajama_hf views makes it)")
    pairs = itertools.zip_longest(_elements(path.read_text(encoding="utf-8")), _samples(run))
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
    """The elements of a JSON array, one by one. Raises ValueError if the text is not a JSON array."""
    decoder, blank = json.JSONDecoder(parse_constant=files.refuse_constant), re.compile(r"[\s,]*")
    place = text.index("[") + 1
    while (place := blank.match(text, place).end()) < len(text) and text[place] != "]":  # type: ignore[union-attr]
        value, place = decoder.raw_decode(text, place)
        yield value
    if text[place:].strip() != "]":
        raise ValueError("a JSON array that has no end")


def _samples(run: Run) -> Iterator[Any]:
    return (sample for _, sample in files.json_lines(run.folder.samples))


def samples_of_the_ledger(run: Run) -> Watch:
    """Accuracy and domain of each sample are those of the row of its step."""
    problems, count, last = Problems(), 0, -1
    samples = _samples(run)
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
                        problems.add(
                            f"step {last}: {name} {shown_value(sample[name])}, the row has {shown_value(row[name])}"
                        )
            sample = next(samples, None)
    # A sample is written before its row, so a run that was killed in between has one more.
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
    # A resume cuts the ledger back, but leaves the charts of the steps that it repeats.
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
    """No document is trained twice in one pass over the corpus; if one is, that is noted but no failure."""
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
    """(number of repetitions, place of the first repeated row, place of its repetition) among rows of columns."""
    values = [np.frombuffer(column, dtype=column.typecode) for column in columns]
    if not len(values[0]):
        return None
    order = np.lexsort(values)  # stable: equal rows stay in the order of the ledger
    same = np.logical_and.reduce([value[order][1:] == value[order][:-1] for value in values])
    if not same.any():
        return None
    second = order[1:][same]
    where = int(second.argmin())
    return int(same.sum()), int(order[:-1][same][where]), int(second[where])


def code_bits(run: Run) -> Watch:
    """`code_bits` is `(loss * predicted + samples * ln V) / ln 2`, to 1e-9."""
    problems, count = Problems(), 0
    # Runs without tokenizer_size are old; their model's vocabulary was exactly the tokenizer's.
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
            problems.add(
                f"step {row['step']}: code_bits {shown_value(bits)}, loss and tokens make {shown_value(expected)}"
            )
    if not vocabulary:
        return Finding(True, "not looked at: run.json has no tokenizer_size")
    return problems.finding(f"{count:,} rows, as loss and tokens make them")


def surprisals_of_the_ledger(run: Run) -> Watch:
    """The mean surprisal of the tokens of each step is the step's loss."""
    problems, path = Problems(), run.folder.surprisals
    if not path.exists():
        return Finding(True, f"not looked at: a run without {path.name}")
    steps, predicted, losses = array("q"), array("q"), array("d")
    while (row := (yield)) is not None:
        steps.append(row["step"])
        predicted.append(ledger.predicted(row))
        losses.append(math.nan if row["loss"] is None else row["loss"])
    tokens, means = np.array(predicted), np.array(losses)
    begins = surprisals.offsets(tokens)
    whole = int(np.searchsorted(begins, path.stat().st_size // surprisals.DTYPE.itemsize, "right")) - 1
    # Steps without a loss are not compared, nor are those from before surprisals were kept.
    values = np.memmap(path, surprisals.DTYPE, "r") if begins[whole] else np.zeros(0, surprisals.DTYPE)
    differ, looked_at = surprisals.compare(values, tokens[:whole], means[:whole])
    for place in differ:
        mean = values[begins[place] : begins[place + 1]].mean(dtype=np.float64)
        problems.add(f"step {steps[place]}: loss {shown_value(losses[place])}, its tokens' mean is {mean:.4f}")
    for place in range(whole, len(tokens)):
        problems.add(f"step {steps[place]}: {path.name} ends before it")
    return problems.finding(f"{looked_at:,} steps, the mean of the tokens is the loss")


def growing_files(run: Run) -> Finding:
    """The files that the run appends to besides its ledger begin as its newest checkpoint says."""
    step, manifest = next(((s, m) for s, m in reversed(run.manifests.items()) if m and "beside" in m), (0, None))
    if manifest is None:
        return Finding(True, "not looked at: no checkpoint has their sums")
    problems = Problems()
    for name in run_folder.not_as_saved(run.folder, manifest):
        problems.add(f"{name}: not as it was when checkpoint-{step} was saved")
    known = sorted({name for each in run.record.get("sessions", []) for name in each.get("not_as_saved", [])})
    words = f"{', '.join(manifest['beside'])}: as checkpoint-{step} saved them"
    return problems.finding(words + (f"; noted at a resume as changed before: {', '.join(known)}" if known else ""))


def configuration(run: Run) -> Finding:
    """The flags in run_config.yaml that decide the numbers are those of `run.json`."""
    recorded = run.record.get("config_sha256")
    if recorded is None:
        return Finding(True, "not looked at: run.json has no sum of it")
    if what_matters.digest(run.config()) != recorded:
        return Finding(False, f"{run.folder.config.name}: not the configuration that run.json has the sum of")
    return Finding(True, f"{run.folder.config.name} is the one of run.json")


#: Every check: its name on the screen, and its function.
CHECKS: tuple[tuple[str, Callable[[Run], Finding | Watch]], ...] = (
    ("ledger", rows_follow_each_other),
    ("code bits", code_bits),
    ("documents", documents_once),
    ("configuration", configuration),
    ("checkpoint files", checkpoint_files),
    ("checkpoint identity", checkpoint_identity),
    ("checkpoint chain", checkpoint_chain),
    ("checkpoint cursor", checkpoint_cursor),
    ("metrics history", metrics_history),
    ("text samples", text_samples),
    ("sample accuracy", samples_of_the_ledger),
    ("surprisals", surprisals_of_the_ledger),
    ("latest chart", latest_chart),
    ("growing files", growing_files),
    ("forgotten", forget.check),
)


#: Changes that no check notices.
NOT_COVERED = (
    "a changed value in run.json",
    "in run_config.yaml: names of corpus, tokenizer and model, and flags that decide no number",
    "what was appended since the newest checkpoint to samples.jsonl, passports.jsonl, prompts.jsonl, evaluations.jsonl",
)


class _Checking:
    """One check during the pass over the rows. An error in the check counts as its failure."""

    def __init__(self, check: Callable[[Run], Finding | Watch], run: Run) -> None:
        self.finding: Finding | None = None
        self._check = self._start(check, run)
        self.send(None)

    def _start(self, check: Callable[[Run], Finding | Watch], run: Run) -> Watch:
        outcome = check(run)
        return outcome if isinstance(outcome, Finding) else (yield from outcome)

    def send(self, row: Row | None) -> bool:
        """Send one more row; None at the beginning and the end. Returns whether the check needs further rows."""
        try:
            self._check.send(row)
        except StopIteration as end:
            self.finding = end.value
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, OSError) as error:
            where = "" if row is None else f"step {row['step']}: "
            words = f"{where}cannot be read ({type(error).__name__}: {one_line(error)})"
            self.finding = Finding(False, words, (words,))
        return self.finding is None


def verify(path: str | Path) -> Report:
    """All `CHECKS` on a run, in one pass over its ledger. Raises UserError if this is not the folder of a run."""
    run = Run(path)
    checking = [(name, _Checking(check, run)) for name, check in CHECKS]
    watching = [each for _, each in checking if each.finding is None]
    for row in run.rows():
        if False in [each.send(row) for each in watching]:
            watching = [each for each in watching if each.finding is None]
    findings: list[tuple[str, Finding]] = []
    for name, each in checking:
        if each.finding is None:
            each.send(None)
        assert each.finding is not None
        findings.append((name, each.finding))
    ok = all(finding.ok for _, finding in findings)
    lines = [f"{'ok' if finding.ok else 'FAILED':<7} {name:<20} {finding.words}" for name, finding in findings]
    lines += [f"note    {'not covered':<20} {what}" for what in NOT_COVERED]
    failed = sum(not finding.ok for _, finding in findings)
    lines.append(f"{path}: " + ("all of it holds" if ok else f"{failed} of {len(findings)} checks failed"))
    return Report(ok, lines, {
        "run": str(path), "ok": ok,
        "not_covered": list(NOT_COVERED),
        "checks": [{"name": name, **dataclasses.asdict(finding)} for name, finding in findings],
    })  # fmt: skip
