"""Several processes: refused as a run, in one sentence, by every launcher."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

LAUNCHERS = {
    # Without a GPU too: of a CPU's processes accelerate starts one only, unless mpirun does it.
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_processes_are_refused_before_the_folder_is_touched(tmp_path, launcher):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "run_clm_slimpajama.py", "--test", "--output_dir", str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert "error: 2 processes were launched: a run has one process so far" in done.stderr, done.stderr
    assert not run.exists()


def test_a_launcher_with_one_process_trains(tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
         "run_clm_slimpajama.py", "--test", "--max_steps", "2", "--output_dir", str(run)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len((run / "ledger.jsonl").read_text().splitlines()) == 2
