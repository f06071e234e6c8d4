"""The benchmarks make up ledgers; what they make up must be what a run writes."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import gpu_check, growth, scaling, steps
from slimpajama_hf.record import columns
from slimpajama_hf.record.columns import read_columns
from slimpajama_hf.views import charts
from tests.conftest import ROOT, environment

# Benchmarks that stand on each other are programs of one folder.
sys.path.insert(0, str(ROOT / "benchmarks"))
import speedrun


def test_the_columns_of_a_long_run_are_those_of_a_ledger():
    made = growth.columns(3000)
    assert set(made._store) == set(columns.NUMBERS) | set(columns.COUNTED) | set(columns.NAMES)
    assert len(made) == 3000 and all(len(getattr(made, name)) == 3000 for name in made._store)
    assert np.isfinite(made.grad_square).sum() == 6 and np.isfinite(made.loss_after).sum() == 30
    assert len(charts.render(made, [], charts.Caption("growth", "synthetic rows", 3000))) > 100_000


def test_the_rows_behind_a_step_are_read_as_a_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(steps.rows(50)))
    columns = read_columns(path)
    assert len(columns) == 50 and columns.loss[0] == json.loads(path.read_text().splitlines()[0])["loss"]


@pytest.fixture
def one_thread():
    """Sizes as small as those of a dry check are slower with two, and far slower where others compute beside it."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


def check(tmp_path, *names):
    bench = gpu_check.Bench(True, torch.device("cpu"), tmp_path)
    code = gpu_check.check(bench, set(names), 100, tmp_path / "found.json")
    return code, json.loads((tmp_path / "found.json").read_text())


def test_the_check_of_a_gpu_computes_on_a_cpu_what_it_would_on_a_card(tmp_path, capsys, one_thread):
    code, found = check(tmp_path, "environment", "correctness", "times", "memory")
    assert code == 0, found
    assert {f"small {each}" for each in gpu_check.DTYPES} == found["correctness"].keys()
    assert found["times"]["bfloat16"]["floor"]["products_ms"] > 0 and len(found["claims"]) == 6
    assert "6 of 6 claims hold" in capsys.readouterr().out


def test_a_claim_that_does_not_hold_and_a_check_that_fails_are_said(tmp_path, capsys, monkeypatch, one_thread):
    def broken(bench):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.ALLOWED, "float32", 0.0)
    monkeypatch.setattr(gpu_check, "CHECKS", [broken, gpu_check.correctness])
    code, found = check(tmp_path)
    assert code == 1 and "no such kernel" in found["broken"]["failed"]
    assert "does not hold: small float32: gradients" in capsys.readouterr().out


def test_without_a_gpu_the_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2 and "--dry" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_whole_check_of_a_gpu_dry(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--dry", "--seconds", "900", "--output", str(tmp_path / "found.json")],
        capture_output=True, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() >= {each.__name__ for each in gpu_check.CHECKS} and all(found["claims"].values())
    assert found["launchers"]["a capture is refused"]["exit code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("row", ["ours, everything on", "ours, 2 accumulated", "ours, outputs off"])
def test_a_row_of_the_table_of_steps_is_measured(row):
    """It looks into the program, which may change without it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "steps.py"), "--row", row, "--steps", "14", "--precision", "float32"],
        capture_output=True, text=True, timeout=200, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ms_per_step"] > 0


def test_simulated_processes_learn_what_one_learns_each_document_in_its_place(shards):
    """A small version of `benchmarks/scaling.py --simulate`, which raises where they do not."""
    lines = scaling.simulate(
        f"{shards}/*.jsonl.zst", ((6, 2, None), (4, 2, None), (9, 2, None), (200, 1, (0, 7, 199))), 32
    )
    assert [line["learned_by_the_simulated"] for line in lines] == [12, 8, 18, 3]
    assert all(line["mb_read_by_a_process"] > 0 for line in lines)


def test_the_way_to_the_target_of_the_race_is_a_line_between_two_scores(monkeypatch):
    monkeypatch.setattr(speedrun, "TARGET", 2.0)
    marks = [
        {"seconds": 10.0, "documents": 500, "bits_per_byte": 2.5},
        {"seconds": 30.0, "documents": 1000, "bits_per_byte": 1.5},
    ]
    assert speedrun.reached(marks, "seconds") == pytest.approx(20.0)
    assert speedrun.reached(marks, "documents") == pytest.approx(750.0)
    assert speedrun.reached(marks[:1], "seconds") is None


def test_the_table_of_the_race_says_who_is_faster_and_who_never_came(monkeypatch):
    monkeypatch.setattr(speedrun, "TARGET", 2.0)

    def row(entry, seed, seconds, bits):
        marks = [{"seconds": seconds, "documents": 100, "bits_per_byte": bits}]
        return {"arm": entry, "seed": seed, "marks": marks, "machine": {"processor": "P"}, "commit": "c"}

    rows = [row("ours", seed, 100.0 + seed, 1.9) for seed in range(10)]
    rows += [row("faster", seed, 80.0 + seed, 1.9) for seed in range(10)]
    rows += [row("as fast", seed, 100.5 + seed, 1.9) for seed in range(10)] + [row("never", 1, 90.0, 2.1)]
    ours, faster, as_fast, never = [line.split(" | ") for line in speedrun.table(rows).splitlines()[2:]]
    assert ours[1:3] == ["10", "10"] and float(faster[5]) < 0.01 < float(as_fast[5])
    assert never[2:4] == ["0", "2.100 after 100"]


@pytest.mark.parametrize(
    ("entry", "target"),
    [("ours", 3.45), ("packed batches of 8, 5e-4", 3.88), ("AdamW loop, one document a step, 3e-4", 3.45)],
)
def test_an_entry_of_the_race_ends_at_its_target(monkeypatch, entry, target, one_thread):
    for name, value in {"DOCUMENTS": 60, "DOCUMENTS_BETWEEN": 10, "WARMUP": 5, "HELD_OUT": 2, "TARGET": target}.items():
        monkeypatch.setattr(speedrun, name, value)
    options = argparse.Namespace(flags=None, precision="float32")
    found = speedrun.one_run(options, entry, 1)
    documents = speedrun.reached(found["marks"], "documents")
    assert documents is not None and 0 < documents < 60
    assert (
        found["marks"][-1]["bits_per_byte"] <= target < min([99.0, *[m["bits_per_byte"] for m in found["marks"][:-1]]])
    )
