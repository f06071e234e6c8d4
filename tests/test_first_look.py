"""What a person sees of a run before its first step, in its first seconds and in its last line."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import NANO, read_ledger, run_command, run_script


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory, cache):
    """(folder, what the screen showed): 12 steps with default intervals, scored, on the embedded corpus."""
    run = tmp_path_factory.mktemp("runs") / "run"
    done = run_script(
        *NANO, "--dataset", "embedded", "--max_seq_length", "64", "--max_steps", "12", "--eval_steps", "12",
        "--eval_documents", "8", "--output_dir", str(run),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run, done.stderr


def test_where_to_look_and_a_long_warm_up_are_said_before_the_first_step(looked_at):
    run, shown = looked_at
    before = shown.partition("sample @ 0")[0]
    assert f"look at  {run}/report.html and {run}/training_viz/training_latest.png, from the first step on" in before
    assert "the warm-up of 1,000 steps is longer than half of the run (12 steps)" in before
    assert "ends at a rate of 1.2e-05" in before and "--warmup_steps 2" in before


def test_the_first_chart_is_of_the_first_step(looked_at):
    run, _ = looked_at
    charts = sorted(path.name for path in (run / "training_viz").glob("training_step_*.png"))
    assert charts[0] == "training_step_000001.png" and charts[-1] == "training_step_000012.png"
    sampled = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sampled[0] == 0 and 10 in sampled


def test_the_summary_leads_with_both_held_out_scores_and_counts_what_they_took(looked_at):
    run, shown = looked_at
    entry = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    summary = shown.partition("\ndone: ")[2].splitlines()
    assert re.search(r"of scoring", summary[0]) and "of saving" in summary[0]
    assert summary[1].startswith(f"       held out  {entry['scores']['all']['bits_per_byte']:.4f} bits per byte")
    assert summary[2].startswith(f"       averaged  {entry['averaged']['all']['bits_per_byte']:.4f} bits per byte")
    mean = sum(row["loss"] for row in read_ledger(run)) / 12
    assert summary[3] == f"     final loss  {mean:.4f} nats per token (mean of the last 12 steps)"


def test_evaluate_names_a_flag_that_it_has(finished):
    done = run_command("evaluate", str(finished))
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    help_page = run_command("evaluate", "--help").stdout
    named = re.findall(r"--\w+", error)
    assert named and all(flag in help_page for flag in named), error


@pytest.mark.slow
def test_a_test_run_ends_as_a_model_that_learns(tmp_path, cache):
    run = tmp_path / "run"
    done = run_script("--test", "--output_dir", str(run), timeout=600)
    assert done.returncode == 0, done.stderr
    assert "longer than half" not in done.stderr
    losses = [row["loss"] for row in read_ledger(run)]
    assert len(losses) == 100 and sum(losses[-50:]) / 50 < 6.5
    texts = json.loads((run / "prompts.jsonl").read_text().splitlines()[-1])["texts"]
    assert any(re.search(r"[a-z]{3}", text["output"]) for text in texts), texts
