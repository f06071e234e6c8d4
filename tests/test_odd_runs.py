"""Whole runs on files as people have them: what is said, counted and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimpajama_hf.corpus.documents import HELD_OUT
from tests.conftest import NANO, make_text, read_ledger, run_command, run_script, write_records

SHORT = [
    *NANO,
    "--max_seq_length",
    "32",
    "--precision",
    "float32",
    "--viz_interval",
    "1000",
    "--display_samples",
    "1000",
]


@pytest.mark.slow
def test_a_folder_with_odd_domains_is_trained_without_its_held_out_share(tmp_path: Path) -> None:
    records = [{"text": make_text(number, 12), "source": "cut emoji \ud83d"} for number in range(120)]
    write_records(tmp_path / "mine" / "a.jsonl", records)
    (tmp_path / "mine" / "b.txt").write_text("one line of text\nand another line\n")
    (tmp_path / "mine" / "README.md").write_text("not read")
    run = tmp_path / "run"
    flags = [*SHORT, "--dataset", str(tmp_path / "mine"), "--eval_fraction", "0.2", "--eval_documents", "7"]
    done = run_script(
        *flags, "--max_steps", "60", "--eval_steps", "30", "--save_steps", "30", "--output_dir", str(run)
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "2 files: 1 .jsonl, 1 .txt (one line is one document)" in done.stderr and "1 .md" in done.stderr
    assert "about 20.00% of the documents" in done.stderr and "the first 7 of them are scored" in done.stderr
    rows = read_ledger(run)  # strict UTF-8
    assert {row["domain"] for row in rows} == {"cut emoji \ufffd"}
    held_out = sum(row["skipped"].get(HELD_OUT, 0) for row in rows)
    assert 3 < held_out < 40 and rows[-1]["row"] + 1 == len(rows) + held_out
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text("utf-8").splitlines()]
    assert [each["scores"]["all"]["samples"] for each in evaluations] == [7, 7]
    assert json.loads((run / "run.json").read_text("utf-8"))["corpus"]["held_out_fraction"] == 0.2
    # The documents that `evaluate` scores are those, and none of them was trained.
    scored = run_command("evaluate", str(run), "--documents", "7", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["scores"]["all"]["loss"] == evaluations[-1]["scores"]["all"]["loss"]
    # A resume goes on without them, bit for bit.
    checked = run_command("verify", str(run), "--replay", "30:60")
    assert checked.returncode == 0 and "bit-equal" in checked.stdout, checked.stdout + checked.stderr


@pytest.mark.slow
def test_records_behind_the_last_usable_one_and_scores_that_are_off_are_said(tmp_path: Path) -> None:
    records = [{"text": make_text(number, 9)} for number in range(3)] + [{"content": "x" * 9, "id": 1}] * 500
    path = write_records(tmp_path / "tail.jsonl", records)
    run = tmp_path / "run"
    flags = [*SHORT, "--dataset", str(path), "--eval_steps", "2", "--eval_fraction", "0", "--no-checkpoint"]
    done = run_script(*flags, "--output_dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "no held-out scores: --eval_fraction 0 holds nothing" in done.stderr
    words = "500 records without a `text`; fields seen: `content`, `id`; try --text_column content"
    assert f"skipped  500 records: {words}" in done.stderr
    assert json.loads((run / "run.json").read_text("utf-8"))["skipped_after_last_step"] == {"no 'text'": 500}
    assert len(read_ledger(run)) == 3
    nothing = write_records(tmp_path / "content.jsonl", records[3:9])
    done = run_script(*SHORT, "--dataset", str(nothing), "--output_dir", str(tmp_path / "none"))
    assert done.returncode == 1 and "no document to learn from" in done.stderr and "Traceback" not in done.stderr
    assert "6 records without a `text`; fields seen: `content`, `id`; try --text_column content" in done.stderr
