"""The plan is what then happens, because it is made of what happens."""

from __future__ import annotations

import re

import pytest

from slimpajama_hf.commands import plan
from tests.conftest import NANO, read_ledger, run_command, run_script


@pytest.mark.slow
def test_time_and_memory_are_those_of_the_run(shards, tmp_path, monkeypatch):
    """A short trial of a run, and the run; the bound is wide because the two cores are shared by the suite."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "60", "--precision", "float32"]
    found = plan.run(flags)
    done = run_script(*flags, "--output_dir", str(tmp_path / "run"), "--no-checkpoint")
    assert done.returncode == 0, done.stderr
    rows = read_ledger(tmp_path / "run")
    assert found.tokens_per_step == pytest.approx(sum(row["tokens"] for row in rows[8:]) / 52, rel=1e-9)
    middle = sorted(row["step_seconds"] for row in rows[8:])[26]
    assert middle / 4 < found.seconds_per_step < middle * 4
    import json

    memory = json.loads((tmp_path / "run" / "run.json").read_text())["memory"]
    assert found.peak_bytes == pytest.approx(memory["peak_bytes"], rel=0.2)
    assert found.device_bytes == 0 and found.start_seconds > 0.5


@pytest.mark.long
def test_the_command_prints_a_plan_and_leaves_nothing_behind(shards, tmp_path):
    run = tmp_path / "run"
    done = run_command(
        "plan", *NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "30", "--save_steps", "10", "--output_dir", str(run)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in (
        r"0\.2M parameters",
        r"memory  \d+ MB of the machine",
        r"tokens/s \(mean of \d+ steps",
        r"3 checkpoints",
    ):
        assert re.search(words, done.stdout), done.stdout
    assert not run.exists()


@pytest.mark.slow
def test_what_the_run_would_say_the_plan_says(tmp_path):
    done = run_command("plan", *NANO, "--dataset", str(tmp_path / "nothing.jsonl"))
    assert done.returncode == 1
    assert "nothing.jsonl" in done.stderr and "Traceback" not in done.stderr
    done = run_command("plan", "--max_step", "5")
    assert done.returncode == 2 and "did you mean" in done.stderr
