"""The one record of a run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from slimpajama_hf.record import ledger
from slimpajama_hf.record.columns import Reader, read_columns
from slimpajama_hf.record.ledger import Ledger, Row


def row(step: int, **changes) -> Row:
    values = {
        "step": step, "loss": 5.0 - 0.01 * step, "accuracy": 0.25, "tokens": 256, "text_bytes": 900, "throughput": 100.0 + step,
        "learning_rate": 1e-3, "grad_norm": 1.5, "mirror": "local", "shard": "a.jsonl", "row": step, "text_sha1": "0" * 40,
        "domain": "RedPajamaC4" if step % 3 else "RedPajamaBook", "tokens_cut": 3, "tokens_cut_exact": True,
        "code_bits": 1800.0, "step_seconds": 0.08,
    }  # fmt: skip
    return Row(**(values | changes))


def fill(path, steps, **changes):
    book = Ledger(path)
    for step in range(steps):
        book.append(row(step, **changes))
    book.close()
    return book


def test_rows_are_strict_json_one_per_line_with_the_promised_fields(tmp_path):
    fill(tmp_path / "ledger.jsonl", 3)
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    promised = "step loss accuracy tokens text_bytes throughput learning_rate grad_norm mirror shard row text_sha1 domain tokens_cut"
    assert set(promised.split()) <= set(rows[0])
    assert [each["step"] for each in rows] == [0, 1, 2]


def test_what_is_not_finite_is_null_and_read_as_nan(tmp_path):
    book = Ledger(tmp_path / "ledger.jsonl")
    book.append(row(0, loss=math.nan, grad_norm=math.inf, code_bits=math.nan))
    book.append(row(1))
    text = (tmp_path / "ledger.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    columns = read_columns(tmp_path / "ledger.jsonl")
    assert np.isnan(columns.loss[0]) and np.isnan(columns.grad_norm[0]) and columns.loss[1] == pytest.approx(4.99)
    assert columns.prequential_bits_per_byte() == 1800.0 / 900


def test_the_chain_does_not_know_the_clock_but_everything_else(tmp_path):
    chains = []
    for number, changes in enumerate(
        [{}, {"throughput": 1.0, "step_seconds": 9.0}, {"loss": 1.0}, {"text_sha1": "1" * 40}]
    ):
        chains.append(fill(tmp_path / f"{number}.jsonl", 3, **changes).chain)
    assert chains[0] == chains[1]
    assert len(set(chains)) == 3


def test_cutting_back_and_going_on_equals_never_having_stopped(tmp_path):
    whole = fill(tmp_path / "whole.jsonl", 10)
    path = tmp_path / "cut.jsonl"
    fill(path, 8)
    with open(path, "ab") as file:
        file.write(b'{"step": 8, "torn')
    book = Ledger(path, ledger.cut_back(path, 5).chain)
    for step in range(5, 10):
        book.append(row(step))
    book.close()
    assert book.chain == whole.chain
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_ledger_that_is_too_short_or_has_a_gap_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill(path, 3)
    with pytest.raises(ValueError, match="holds 3 of 5 steps"):
        ledger.cut_back(path, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(ValueError, match="step 1: its line holds step 2"):
        ledger.cut_back(path, 3)


def test_a_full_disk_leaves_no_half_row(tmp_path):
    path = tmp_path / "ledger.jsonl"
    book = Ledger(path)
    book.append(row(0))
    size = path.stat().st_size
    real = book._file

    class Full:
        """Writes ten bytes and no more, as a full disk does."""

        def write(self, data):
            return real.write(data[:10])

        def __getattr__(self, name):
            return getattr(real, name)

    book._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        book.append(row(1))
    book._file = real
    assert path.stat().st_size == size
    book.append(row(1))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]


def test_a_reader_takes_in_only_what_is_new_and_starts_anew_after_a_cut(tmp_path):
    path = tmp_path / "ledger.jsonl"
    reader = Reader(path)
    assert len(reader.update()) == 0
    fill(path, 3)
    assert reader.update().step.tolist() == [0, 1, 2]
    book = Ledger(path, json.loads(path.read_text().splitlines()[-1])["chain"])
    book.append(row(3))
    with open(path, "ab") as file:
        file.write(b'{"torn')
    columns = reader.update()
    assert columns.step.tolist() == [0, 1, 2, 3]
    assert [columns.domains[code] for code in columns.domain] == [
        "RedPajamaBook",
        "RedPajamaC4",
        "RedPajamaC4",
        "RedPajamaBook",
    ]
    ledger.cut_back(path, 2)
    assert reader.update().step.tolist() == [0, 1]


def test_columns_grow_past_their_first_size(tmp_path):
    fill(tmp_path / "ledger.jsonl", 2500)
    columns = read_columns(tmp_path / "ledger.jsonl")
    assert columns.step.tolist() == list(range(2500))
    assert columns.first(10).throughput.tolist() == [100.0 + step for step in range(10)]


@pytest.mark.slow
def test_rows_can_be_read_from_any_line_on(tmp_path):
    fill(tmp_path / "ledger.jsonl", 5)
    assert [each["row"] for each in ledger.rows(tmp_path / "ledger.jsonl")] == list(range(5))
    line = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)[0]
    assert next(ledger.rows_and_ends(tmp_path / "ledger.jsonl", len(line), 1))[0]["row"] == 1


def test_a_check_by_bytes_is_the_check_by_values(tmp_path, monkeypatch):
    """Whatever a row holds, in whatever version it was written: one line changed is one step named."""
    path = tmp_path / "ledger.jsonl"
    book = Ledger(path)
    odd = {
        1: {"domain": 'a","throughput":1.0,"x":"', "shard": '\\"', "loss": math.nan},
        2: {"domain": ',"step_seconds":3,', "added": {"weight_norm": 1.5}},
        3: {"samples": [{"rank": 0, "loss": 1.0}, {"rank": 1, "loss": 2.0}]},
        4: {"skipped": {"blank": 2}, "gaps": [{"shard": "ü", "row": 1, "reason": "x"}], "spike": 6.5},
    }
    for step in range(8):
        book.append(row(step, **odd.get(step, {})))
    book.close()
    whole = path.read_bytes()
    kept = ledger.check(path)
    assert kept.chain == book.chain and kept.bytes == len(whole)
    assert kept.predicted.tolist() == [255, 255, 255, 254, 255, 255, 255, 255]
    assert math.isnan(kept.losses[1]) and kept.losses[5] == 4.95
    by_bytes = [ledger._checked_by_bytes(line, step, before.encode()) is not None for step, (line, before) in enumerate(
        zip(whole.splitlines(keepends=True), [ledger.CHAIN_START, *(each["chain"] for each in ledger.rows(path))], strict=False)
    )]  # fmt: skip
    assert by_bytes == [True, True, True, False, True, True, True, True]
    monkeypatch.setattr(ledger, "_checked_by_bytes", lambda *line: None)
    slow = ledger.check(path)
    assert slow.chain == kept.chain and (slow.predicted == kept.predicted).all()
    assert np.array_equal(slow.losses, kept.losses, equal_nan=True)


def test_no_changed_byte_of_a_row_goes_unnoticed_but_those_of_the_clock(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fill(path, 3)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    line = whole[first : whole.index(b"\n", first)]
    clock = [
        place
        for name in (b'"throughput":', b'"step_seconds":')
        for place in range(line.index(name) + len(name), line.index(b",", line.index(name)))
    ]
    unnoticed = []
    for place in range(len(line)):
        damaged = bytearray(whole)
        damaged[first + place] ^= 1
        path.write_bytes(damaged)
        try:
            ledger.check(path, 3)
            unnoticed.append(place)
        except ledger.Damaged as error:
            assert error.step in (1, 2)
    assert set(unnoticed) <= set(clock)
