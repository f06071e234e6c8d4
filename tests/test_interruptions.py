"""Whole runs of the real program, interrupted: in every way of making samples, by signals, by the Hub, by the clock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimpajama_hf.record import checkpoints
from tests.conftest import (
    NANO,
    ROOT,
    environment,
    make_records,
    read_ledger,
    run_command,
    run_script,
    start_script,
    write_records,
)
from tests.hub.loopback_hub import Fault, LoopbackHub
from tests.test_faults import assert_the_same_run

STEPS = 60

#: Ways of making samples, and the flags of each; `epochs` ends its first pass in the middle of the run.
WAYS = {
    "window": ["--sample_mode", "window", "--max_seq_length", "64"],
    "pack": ["--sample_mode", "pack", "--max_seq_length", "64"],
    "shuffle": ["--shuffle_buffer", "25", "--epochs", "2"],
    "epochs": ["--epochs", "2"],
    "window, shuffle and epochs": ["--sample_mode", "window", "--shuffle_buffer", "8", "--epochs", "2"],
}


def flags_of(dataset: str, run: Path, *more: str, steps: int = STEPS) -> list[str]:
    return [*NANO, "--dataset", dataset, "--max_steps", str(steps), "--output_dir", str(run), "--display_samples", "20",
            "--viz_interval", "1000000", "--warmup_steps", "20", "--save_steps", "10", "--precision", "float32", *more]  # fmt: skip


def begin(flags: list[str], stderr: int | None = subprocess.DEVNULL, **variables: str) -> Any:
    return start_script(*flags, "--resume_from_checkpoint", "true", stderr=stderr, **variables)


def rows_of(run: Path) -> int:
    path = run / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def lost_and_repeated(run: Path, unbroken: Path) -> tuple[int, int]:
    """Documents (samples of them) that the other run trained and this one did not, and that this one trained twice."""

    def trained(folder: Path) -> Counter:
        # The same document comes again in another pass: the step tells the passes apart.
        return Counter((row["step"], row["shard"], row["row"], row["part"]) for row in read_ledger(folder))

    ours, theirs = trained(run), trained(unbroken)
    return sum((theirs - ours).values()), sum((ours - theirs).values())


def assert_bit_equal(run: Path, unbroken: Path, steps: int = STEPS) -> None:
    assert_the_same_run(run, unbroken, steps)
    assert (run / "surprisals.f32").read_bytes() == (unbroken / "surprisals.f32").read_bytes()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """40 documents in three files: a run of 60 steps that takes one of each begins a second pass."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, count in enumerate((15, 15, 10)):
        write_records(folder / f"{number}.jsonl.zst", make_records(count, seed=200 + number))
    return f"{folder}/*.jsonl.zst"


@pytest.mark.parametrize(
    "way",
    # `make test-long` takes most of them at once; `make test-faults` each by itself too.
    [pytest.param(way, marks=[] if way == "window, shuffle and epochs" else pytest.mark.slow) for way in WAYS],
)
@pytest.mark.long
def test_interrupted_three_times_it_is_the_run_that_was_never_stopped(corpus, tmp_path, fault_table, way):
    """A kill -9, a SIGTERM and a kill -9 again; the second and third around the end of the first pass (`epochs`)."""
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    done = run_script(*flags_of(corpus, unbroken, *WAYS[way]))
    assert done.returncode == 0, done.stderr
    for place, blow in ((17, signal.SIGKILL), (39, signal.SIGTERM), (43, signal.SIGKILL)):
        process = begin(flags_of(corpus, run, *WAYS[way]))
        before = rows_of(run)
        # A resume first cuts the ledger back: what counts is what this process adds.
        wait_until(
            lambda before=before, place=place, p=process: p.poll() is not None or before != rows_of(run) >= place
        )
        assert process.poll() is None, "it ended before the blow"
        process.send_signal(blow)
        assert process.wait(timeout=60) == (-9 if blow == signal.SIGKILL else 143)
    done = run_script(*flags_of(corpus, run, *WAYS[way]), "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr
    # A SIGTERM leaves one checkpoint more.
    assert_bit_equal(run, unbroken)
    lost, repeated = lost_and_repeated(run, unbroken)
    fault_table(f"two kills and a SIGTERM: {way}", 3, lost=lost, repeated=repeated, bit_equal=True)
    verified = run_command("verify", str(run))
    assert verified.returncode == 0, verified.stdout


# ---- the Hub fails while a process trains --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as server:
        for number in range(3):
            write_records(folder / "data" / f"train-{number}.jsonl.zst", make_records(25, seed=300 + number))
        server.datasets["someone/text"] = folder
        yield server


@pytest.fixture
def hub(server):
    yield server
    server.faults.clear()
    server.refuse.clear()


def hub_environment(hub: LoopbackHub, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", **more}


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run_script(*flags_of("someone/text", run), **hub_environment(server))
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
def test_a_hub_that_fails_in_every_way_during_training(hub, undisturbed, tmp_path, fault_table):
    faults = [
        Fault("train-0", how="reset", times=2), Fault("train-1", 503, times=3), Fault("train-1", how="short", times=2),
        Fault("train-2", 429, times=2, headers={"Retry-After": "1"}), Fault("tree", 500, times=1),
    ]  # fmt: skip
    hub.faults += faults
    run = tmp_path / "run"
    done = run_script(*flags_of("someone/text", run), **hub_environment(hub))
    assert done.returncode == 0, done.stderr
    met = sum(fault.met for fault in faults)
    assert all(fault.met for fault in faults), [(fault.part, fault.met) for fault in faults]
    assert_bit_equal(run, undisturbed)
    lost, repeated = lost_and_repeated(run, undisturbed)
    fault_table(
        "resets, 429, 500, 503, short bodies while it trains", met, lost=lost, repeated=repeated, bit_equal=True
    )


@pytest.mark.slow
def test_sigterm_while_it_waits_for_the_hub(hub, undisturbed, tmp_path, fault_table):
    run = tmp_path / "run"
    hub.faults.append(Fault("train-1", 503, seconds=600))
    process = begin(flags_of("someone/text", run), **hub_environment(hub))
    # All of the first shard is trained; the second one does not come.
    wait_until(lambda: rows_of(run) == 25)
    time.sleep(1)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    took = time.monotonic() - told
    assert rows_of(run) == 25 and checkpoints.steps(run)[-1] == 25, "what was learned is saved"
    hub.faults.clear()
    done = run_script(*flags_of("someone/text", run), "--resume_from_checkpoint", "true", **hub_environment(hub))
    assert done.returncode == 0, done.stderr
    assert_bit_equal(run, undisturbed)
    assert took < 15, "the wait for the Hub was cut short, not sat out"
    lost, repeated = lost_and_repeated(run, undisturbed)
    fault_table("SIGTERM while it waits for a 503", 1, lost=lost, repeated=repeated, bit_equal=True)


@pytest.mark.slow
def test_a_shard_that_is_gone_stops_the_run_and_can_be_left_out(hub, tmp_path, fault_table):
    run = tmp_path / "run"
    hub.refuse["train-1"] = 404
    flags = flags_of("someone/text", run, steps=40)
    done = run_script(*flags, **hub_environment(hub))
    assert done.returncode == 1
    assert "train-1" in done.stderr and "--skip_broken_shards" in done.stderr and "Traceback" not in done.stderr
    assert len(read_ledger(run)) == 25 and checkpoints.steps(run)[-1] == 25
    again = [*flags, "--resume_from_checkpoint", "true", "--skip_broken_shards", "true"]
    done = run_script(*again, **hub_environment(hub))
    assert done.returncode == 0, done.stderr
    rows = read_ledger(run)
    assert [row["shard"] for row in rows] == ["data/train-0.jsonl.zst"] * 25 + ["data/train-2.jsonl.zst"] * 15
    assert [(gap["shard"], gap["row"]) for gap in rows[25]["gaps"]] == [("data/train-1.jsonl.zst", 0)]
    assert not any(row["gaps"] for row in rows[:25] + rows[26:])
    assert "set aside" in done.stderr
    fault_table("a shard gone from the Hub, left out and said", 1, lost=25, bit_equal=False)


@pytest.mark.long
def test_a_shard_that_breaks_at_the_very_end_stands_in_the_runs_record(tmp_path):
    write_records(tmp_path / "a.jsonl", make_records(12, seed=1))
    write_records(tmp_path / "b.jsonl.zst", make_records(50, seed=2))
    data = (tmp_path / "b.jsonl.zst").read_bytes()
    run = tmp_path / "run"
    (tmp_path / "b.jsonl.zst").write_bytes(b"<html>" + data[6:])
    flags = flags_of(f"{tmp_path}/*.jsonl*", run, "--skip_broken_shards", "true", steps=100)
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    assert len(read_ledger(run)) == 12 and not any(row["gaps"] for row in read_ledger(run))
    record = json.loads((run / "run.json").read_text())
    assert [gap["shard"] for gap in record["gaps_after_last_step"]] == ["b.jsonl.zst"]
    assert "b.jsonl.zst" in done.stderr and "set aside" in done.stderr


# ---- the clock -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_clock_set_back_an_hour(corpus, tmp_path, fault_table):
    """Wall time jumps back in the middle of the run, and the run after it lives in the past; steps do not care."""
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    more = ["--save_total_limit", "2", "--epochs", "2"]
    done = run_script(*flags_of(corpus, unbroken, *more))
    assert done.returncode == 0, done.stderr
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import os, time\n"
        "real, ns = time.time, time.time_ns\n"
        "def back():\n"
        f"    return 3600 if os.path.exists({str(tmp_path / 'back')!r}) else 0\n"
        "time.time = lambda: real() - back()\n"
        "time.time_ns = lambda: ns() - back() * 10**9\n"
    )
    path = os.pathsep.join([str(patch), str(ROOT)])
    process = begin(flags_of(corpus, run, *more), PYTHONPATH=path)
    wait_until(lambda: rows_of(run) >= 25)
    (tmp_path / "back").touch()
    wait_until(lambda: rows_of(run) >= 47)
    process.kill()
    process.wait()
    for step in checkpoints.steps(run):
        # What a file system would show of the hour that came twice: the newest looks oldest.
        os.utime(checkpoints.path_of(run, step), (2_000_000_000 - step * 60,) * 2)
    newest = checkpoints.steps(run)[-1]
    again = [*flags_of(corpus, run, *more), "--resume_from_checkpoint", "true"]
    done = run_script(*again, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint-{newest}, at step {newest}" in done.stderr
    assert checkpoints.steps(run) == checkpoints.steps(unbroken) == [50, 60]
    assert_bit_equal(run, unbroken)
    lost, repeated = lost_and_repeated(run, unbroken)
    fault_table("clock set back an hour, then a kill", 1, lost=lost, repeated=repeated, bit_equal=True)


# ---- the terminal --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_that_is_closed(corpus, tmp_path, fault_table):
    """A real pseudo-terminal: its other end goes away, the kernel sends SIGHUP, and writing to it fails from then on."""
    import pty

    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    flags = flags_of(corpus, run, "--epochs", "2")
    done = run_script(*flags_of(corpus, unbroken, "--epochs", "2"))
    assert done.returncode == 0, done.stderr
    child, terminal = pty.fork()
    if child == 0:
        # The child of a fork in a threaded process: nothing but exec.
        os.execvpe(
            sys.executable,
            [sys.executable, str(ROOT / "run_clm_slimpajama.py"), *flags],
            environment(),
        )
    os.set_blocking(terminal, False)

    def twenty_rows() -> bool:
        # Somebody looks at the screen until it is gone.
        with contextlib.suppress(OSError):
            os.read(terminal, 65536)
        return rows_of(run) >= 20

    wait_until(twenty_rows)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert checkpoints.steps(run)[-1] == rows_of(run)
    done = run_script(*flags, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr
    assert_bit_equal(run, unbroken)
    lost, repeated = lost_and_repeated(run, unbroken)
    fault_table("terminal closed", 1, lost=lost, repeated=repeated, bit_equal=True)


@pytest.mark.slow
def test_a_difference_would_be_seen(corpus, tmp_path):
    """The comparison of this file can fail: another seed, one more interruption than it allows for."""
    left, right = tmp_path / "left", tmp_path / "right"
    for run, seed in ((left, "1"), (right, "2")):
        done = run_script(*flags_of(corpus, run, "--seed", seed, steps=10))
        assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError):
        assert_bit_equal(left, right, 10)
    shutil.copytree(left, tmp_path / "copy")
    assert_bit_equal(left, tmp_path / "copy", 10)
    rows = (tmp_path / "copy" / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "copy" / "ledger.jsonl").write_text("".join([*rows[:4], *rows[5:], rows[3]]))
    assert lost_and_repeated(tmp_path / "copy", left) == (1, 1)
