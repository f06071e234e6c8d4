"""What a machine allows ends, or stands still: limits of the shell, inodes, a stopped process, children that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slimpajama_hf.record import checkpoints
from tests.conftest import ROOT, environment, run_command, run_script
from tests.hub.loopback_model_hub import LoopbackModelHub
from tests.test_interruptions import (
    STEPS,
    assert_bit_equal,
    begin,
    corpus,  # noqa: F401
    flags_of,
    lost_and_repeated,
    rows_of,
    wait_until,
)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run_script(*flags_of(corpus, run, *MORE))
    assert done.returncode == 0, done.stderr
    return run


MORE = ("--epochs", "2")


def under_limit(limit: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """The program with a limit of the shell, as `-f 300`."""
    command = f'ulimit {limit} && exec "$@"'
    words = ["bash", "-c", command, "bash", sys.executable, str(ROOT / "run_clm_slimpajama.py"), *flags]
    return subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment(), cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    # KB that a file may have: less than a row, than a checkpoint; open files; KB of memory: for torch, for the run.
    ["-f 8", "-f 200", "-n 16", "-n 40", "-v 800000", "-v 3000000"],
)
def test_a_limit_of_the_shell_is_a_sentence_and_the_run_goes_on_without_it(
    corpus,  # noqa: F811
    unbroken,
    tmp_path,
    fault_table,
    limit,
):
    run = tmp_path / "run"
    done = under_limit(limit, [*flags_of(corpus, run, *MORE), "--resume_from_checkpoint", "true"])
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said[-3000:]
    assert done.returncode == 0 or "error: " in said, (done.returncode, said[-3000:])
    done = run_script(*flags_of(corpus, run, *MORE), "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr
    assert_bit_equal(run, unbroken)
    fault_table(f"ulimit {limit}", 1, bit_equal=True)


@pytest.mark.slow
def test_no_inodes_left_and_then_some(corpus, unbroken, tmp_path, fault_table):  # noqa: F811
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m,nr_inodes=60", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        run, screen = place / "run", tmp_path / "screen"
        with open(screen, "w") as file:
            process = begin(flags_of(corpus, run, *MORE), stderr=file.fileno())
            wait_until(lambda: "not saved: checkpoint" in screen.read_text() or process.poll() is not None)
            subprocess.run(["mount", "-o", "remount,nr_inodes=9999", str(place)], check=True)
            code = process.wait(timeout=200)
        assert code == 0 and "Traceback" not in screen.read_text(), screen.read_text()
        assert_bit_equal(run, unbroken)
        missed = set(range(10, STEPS + 1, 10)) - set(checkpoints.steps(run))
        fault_table("no inodes left while it trains, then some", 1, checkpoints=len(missed), bit_equal=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


@pytest.mark.slow
def test_a_process_that_is_stopped_and_goes_on(corpus, unbroken, tmp_path, fault_table):  # noqa: F811
    run = tmp_path / "run"
    process = begin(flags_of(corpus, run, *MORE))
    draw = random.Random(3)
    for place in (5, 20, 40):
        wait_until(lambda place=place: rows_of(run) >= place)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(draw.uniform(0.2, 1.0))
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=120) == 0
    assert_bit_equal(run, unbroken)
    fault_table("SIGSTOP, then SIGCONT", 3, bit_equal=True)


def child_of(process: subprocess.Popen[str], module: str) -> psutil.Process | None:
    """The child of ours that runs a module."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if module in child.cmdline():
                return child
        except psutil.Error:
            continue
    return None


@pytest.mark.slow
def test_the_process_that_draws_is_killed_as_when_memory_is_short(corpus, unbroken, tmp_path, fault_table):  # noqa: F811
    run = tmp_path / "run"
    process = begin(flags_of(corpus, run, *MORE, "--viz_interval", "10"), stderr=subprocess.PIPE)
    killed = 0
    while process.poll() is None and killed < 2:
        child = child_of(process, "slimpajama_hf.watching.view_process")
        if child is not None:
            child.kill()
            killed += 1
        time.sleep(0.05)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and killed and "Traceback" not in said, said
    assert "the view process ended with" in said, said
    assert_bit_equal(run, unbroken)
    assert json.loads((run / "training_viz/metrics_history.json").read_text())["steps"][-1] == STEPS - 1
    assert (run / "report.html").is_file() and run_command("verify", str(run)).returncode == 0
    fault_table("the chart process killed (as when memory is short)", killed, bit_equal=True)


@pytest.mark.slow
def test_the_process_that_uploads_is_killed_and_push_brings_the_rest(corpus, unbroken, tmp_path, fault_table):  # noqa: F811
    run = tmp_path / "run"
    with LoopbackModelHub() as hub:
        flags = flags_of(corpus, run, *MORE, "--push_to_hub", "--hub_model_id", "me/run", "--hub_patience", "1")
        variables = hub.environment()
        process = begin(flags, stderr=subprocess.PIPE, **variables)
        wait_until(
            lambda: process.poll() is not None or child_of(process, "slimpajama_hf.hub.upload_process") is not None
        )
        child = child_of(process, "slimpajama_hf.hub.upload_process")
        assert child is not None
        child.kill()
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in said, said
        assert "push" in said, said
        assert_bit_equal(run, unbroken)
        done = run_command("push", str(run), **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        weights = hub.models["me/run"].files["model.safetensors"]
        assert weights == (run / f"checkpoint-{STEPS}/model.safetensors").read_bytes()
    fault_table("the upload process killed (as when memory is short)", 1, bit_equal=True)


@pytest.mark.long
def test_two_resumes_at_once_are_one(corpus, unbroken, tmp_path, fault_table):  # noqa: F811
    run = tmp_path / "run"
    process = begin(flags_of(corpus, run, *MORE))
    wait_until(lambda: rows_of(run) >= 25)
    process.kill()
    process.wait()
    both = [begin(flags_of(corpus, run, *MORE), stderr=subprocess.PIPE) for _ in range(2)]
    said = [each.communicate(timeout=200)[1] for each in both]
    assert "Traceback" not in "".join(said), said
    trained = [
        process.returncode == 0 and "nothing left to do" not in words for process, words in zip(both, said, strict=True)
    ]
    assert trained.count(True) == 1, said
    # The other met the lock, or came when all was done.
    other = trained.index(False)
    met = "a run is on in this folder" if both[other].returncode else "nothing left to do"
    assert both[other].returncode in (0, 1) and met in said[other], said
    assert_bit_equal(run, unbroken)
    lost, repeated = lost_and_repeated(run, unbroken)
    fault_table("two resumes at once", 1, lost=lost, repeated=repeated, bit_equal=True)
