"""What goes wrong, for real: kills, full disks, damaged checkpoints, two runs at once, steps that are no number."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from slimpajama_hf.corpus import opening
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints, ledger
from tests.conftest import NANO, make_records, read_ledger, run_script, start_script, write_records

CLOCK = {"throughput", "step_seconds"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        write_records(folder / f"{number}.jsonl.zst", make_records(60, seed=70 + number))
    return folder


def flags_of(corpus: Path, run: Path, steps: int, *more: str) -> list[str]:
    return [*NANO, "--dataset", f"{corpus}/*.jsonl.zst", "--max_steps", str(steps), "--output_dir", str(run),
            "--display_samples", "20", "--viz_interval", "1000000", "--warmup_steps", "30", "--save_steps", "25", *more]  # fmt: skip


def start(*flags: str, stderr: Any = subprocess.PIPE) -> Any:
    return start_script(*flags, stderr=stderr)


def rows_without_times(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in read_ledger(run)]


def assert_the_same_run(left: Path, right: Path, steps: int) -> None:
    assert rows_without_times(left) == rows_without_times(right)
    for name in (
        "model.safetensors",
        "averaged/model.safetensors",
        "trainer_state.json",
        "data_state.json",
        "rng_state.pth",
    ):
        parts = [(run / f"checkpoint-{steps}" / name).read_bytes() for run in (left, right)]
        assert parts[0] == parts[1], name
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(run / f"checkpoint-{steps}" / name, weights_only=True) for run in (left, right)]
        assert str(states[0]) == str(states[1])
    histories = [json.loads((run / "training_viz/metrics_history.json").read_text()) for run in (left, right)]
    for history in histories:
        del history["throughput"]
    assert histories[0] == histories[1]
    assert (left / "training_viz/text_samples.json").read_text() == (
        right / "training_viz/text_samples.json"
    ).read_text()


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run_script(*flags_of(corpus, run, 200))
    assert done.returncode == 0, done.stderr
    return run


def kill_and_go_on(corpus: Path, run: Path, kills: int, seed: int) -> dict[str, int]:
    """Run to step 200 through `kills` kill -9 at random moments, every third one in the middle of a save."""
    draw = random.Random(seed)
    counts = {"kills": 0, "in a save": 0}
    flags = flags_of(corpus, run, 200, "--resume_from_checkpoint", "true")
    while counts["kills"] < kills:
        process = start(*flags, stderr=subprocess.DEVNULL)
        begun = len(read_ledger(run)) if (run / "ledger.jsonl").exists() else 0
        in_a_save = counts["kills"] % 3 == 2
        deadline = time.monotonic() + 60
        aim = draw.randint(1, 40)
        while process.poll() is None and time.monotonic() < deadline:
            if in_a_save:
                if any(run.glob("_staging.*/checkpoint-*")):
                    break
            elif (run / "ledger.jsonl").exists():
                size = (run / "ledger.jsonl").read_bytes().count(b"\n")
                if size < begun or size >= begun + aim:
                    break
            time.sleep(0.0005)
        if process.poll() is not None:
            # It reached its end before the blow: begin again from an earlier state, for the kills that are left.
            for step in checkpoints.steps(run)[-3:]:
                shutil.rmtree(checkpoints.path_of(run, step))
            continue
        process.kill()
        process.wait()
        counts["kills"] += 1
        counts["in a save"] += bool(list(run.glob("_staging.*")))
        lines = (run / "ledger.jsonl").read_bytes().split(b"\n")[:-1] if (run / "ledger.jsonl").exists() else []
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(len(steps))), "a step twice, or one that is missing"
        for step in checkpoints.steps(run):
            assert checkpoints.problem(checkpoints.path_of(run, step)) is None
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    return counts


def test_killed_three_times_it_is_the_run_that_was_never_stopped(corpus, unbroken, tmp_path):
    counts = kill_and_go_on(corpus, tmp_path / "run", kills=3, seed=1)
    assert_the_same_run(tmp_path / "run", unbroken, 200)
    assert counts["in a save"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_fifty_times_it_is_the_run_that_was_never_stopped(corpus, unbroken, tmp_path, fault_table):
    counts = kill_and_go_on(corpus, tmp_path / "run", kills=50, seed=2)
    assert_the_same_run(tmp_path / "run", unbroken, 200)
    fault_table("kill -9 at a random moment", counts["kills"] - counts["in a save"], bit_equal=True)
    fault_table("kill -9 in the middle of a save", counts["in a save"], bit_equal=True)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "damage",
    ["torn weights", "flipped bit", "no optimizer", "no manifest", "empty state"],
)
@pytest.mark.long
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(corpus, unbroken, tmp_path, damage, fault_table):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    newest = run / "checkpoint-200"
    weights = newest / "model.safetensors"
    if damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "flipped bit":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 8
        weights.write_bytes(data)
    elif damage == "no optimizer":
        (newest / "optimizer.pt").unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "trainer_state.json").write_text("")
    done = run_script(*flags_of(corpus, run, 200, "--resume_from_checkpoint", "true"))
    assert done.returncode == 0, done.stderr
    assert "set aside as _bad-checkpoint-200" in done.stderr and "checkpoint-175, at step 175" in done.stderr
    assert len(list(run.glob("_bad-checkpoint-200.*"))) == 1
    assert_the_same_run(run, unbroken, 200)
    fault_table(f"newest checkpoint damaged: {damage}", 1, checkpoints=1, bit_equal=True)


def test_retention_is_by_step_number_whatever_the_clock_says(tmp_path):
    for number, step in enumerate((10, 20, 100)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        # The newest step looks oldest, as after a clock that was set back.
        os.utime(folder, (2_000_000_000 - number * 3600,) * 2)
    checkpoints.keep_newest(tmp_path, 2)
    assert checkpoints.steps(tmp_path) == [20, 100]


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on_and_a_second_ctrl_c_exits_at_once(corpus, tmp_path):
    run = tmp_path / "run"
    process = start(*flags_of(corpus, run, 230, "--save_steps", "100000"))
    _wait_for_rows(run, 10)
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not checkpoints.steps(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    (step,) = checkpoints.steps(run)
    assert checkpoints.problem(checkpoints.path_of(run, step)) is None
    _wait_for_rows(run, step + 3)
    os.kill(process.pid, signal.SIGSTOP)
    # Both are waiting when it goes on: the second finds the first one noted.
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode == 130
    again = run_script(*flags_of(corpus, run, 230, "--save_steps", "100000", "--resume_from_checkpoint", "true"))
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_terminal_that_goes_away_ends_the_run_with_everything_saved(corpus, tmp_path):
    run = tmp_path / "run"
    process = start(*flags_of(corpus, run, 230))
    _wait_for_rows(run, 30)
    process.send_signal(signal.SIGHUP)
    process.stderr.close()
    process.wait(timeout=60)
    assert process.returncode == 129
    newest = checkpoints.steps(run)[-1]
    assert len(read_ledger(run)) == newest


def _wait_for_rows(run: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (run / "ledger.jsonl").exists() and (run / "ledger.jsonl").read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{run} did not reach {count} rows")


@pytest.mark.long
def test_a_pipe_that_nobody_reads_does_not_stop_training(corpus, unbroken, tmp_path, fault_table):
    run = tmp_path / "run"
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 4096)  # F_SETPIPE_SZ: the smallest pipe there is
    try:
        process = start(*flags_of(corpus, run, 100, "--display_samples", "1"), stderr=writing)
        assert process.wait(timeout=120) == 0
    finally:
        os.close(reading)
        os.close(writing)
    same = rows_without_times(run) == rows_without_times(unbroken)[:100]
    assert same
    fault_table("output pipe full from the first line on", 1, bit_equal=same)


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused_and_a_stale_lock_is_recognised(corpus, tmp_path):
    run = tmp_path / "run"
    first = start(*flags_of(corpus, run, 230), stderr=subprocess.DEVNULL)
    _wait_for_rows(run, 5)
    # Held still, so that it is on for as long as the others try.
    first.send_signal(signal.SIGSTOP)
    for flags in (["--resume_from_checkpoint", "true"], ["--overwrite_output_dir"]):
        second = run_script(*flags_of(corpus, run, 230, *flags))
        assert second.returncode == 1
        assert f"process {first.pid}" in second.stderr and "since" in second.stderr
        assert first.poll() is None
    first.kill()
    first.wait()
    assert (run / "_lock").stat().st_size
    third = run_script(*flags_of(corpus, run, 100, "--resume_from_checkpoint", "true"))
    assert third.returncode == 0, third.stderr
    assert f"stale lock: process {first.pid}" in third.stderr
    assert not (run / "_lock").stat().st_size


# ---- a disk that takes nothing -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of its own, of 6 MB or what the test says. Needs the right to mount; without it: skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', 6)}m", "tmpfs", str(place)],
        capture_output=True,
    ).returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


@pytest.mark.parametrize("small_disk", [40], indirect=True)
@pytest.mark.long
def test_a_full_disk_stops_the_saving_and_not_the_training(corpus, unbroken, small_disk, fault_table):
    run = small_disk / "run"
    screen = small_disk.parent / "stderr.txt"
    with open(screen, "w") as file:
        process = start(*flags_of(corpus, run, 200), stderr=file)
    _wait_for_rows(run, 60)
    ballast = small_disk / "ballast"
    process.send_signal(signal.SIGSTOP)
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 60
    # Not only a checkpoint: the rows too.
    while "every step tries again" not in screen.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "full while it trained"
    # Room again before the end: what was kept in memory is written, and the last checkpoint too.
    ballast.unlink()
    process.wait(timeout=120)
    stderr = screen.read_text()
    assert process.returncode == 0, stderr
    assert "every step tries again" in stderr and "is whole again" in stderr
    assert_the_same_run(run, unbroken, 200)
    assert not list(run.glob("_staging*"))
    missed = {25, 50, 75, 100, 125, 150, 175, 200} - set(checkpoints.steps(run))
    fault_table("disk full while it trains, then room again", 1, checkpoints=len(missed), bit_equal=True)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_is_said_and_the_exit_code_is_honest(corpus, small_disk):
    run = small_disk / "run"
    process = start(*flags_of(corpus, run, 120))
    _wait_for_rows(run, 30)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=False, capture_output=True)
    blocked = subprocess.run(["touch", str(small_disk / "x")], capture_output=True).returncode != 0
    if not blocked:
        # An open file keeps a file system writable: fill it instead, which the rows feel the same way.
        with open(small_disk / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 512)
            except OSError:
                pass
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "not saved" in stderr and "Traceback" not in stderr
    assert "120/120" in stderr, "training itself went to its end"
    assert "go on from the last checkpoint" in stderr.replace("\n", " ")


@pytest.mark.slow
def test_a_disk_without_room_for_one_checkpoint_is_refused_before_step_0(corpus, small_disk):
    flags = flags_of(corpus, small_disk / "run", 5)
    flags[flags.index("--config_overrides") + 1] = "n_layer=2,n_embd=128,n_head=2"
    done = run_script(*flags)
    assert done.returncode == 1
    assert "MB free" in done.stderr and "--no-checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


# ---- what may not change -------------------------------------------------------------------------------------------


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("flag", "value"),
    [("learning_rate", "0.5"), ("seed", "7"), ("max_seq_length", "32"), ("model", "small"), ("sample_mode", "pack")],
)
def test_a_resume_that_changes_what_matters_is_refused_by_name(corpus, unbroken, flag, value):
    before = (unbroken / "ledger.jsonl").read_bytes()
    resumed = ["--resume_from_checkpoint", "true", "--output_dir", str(unbroken)]
    done = run_script(*resumed, f"--{flag}", value)
    assert done.returncode == 1
    assert f"--{flag} {value}" in done.stderr and f"--allow_changes {flag}" in done.stderr
    assert (unbroken / "ledger.jsonl").read_bytes() == before


@pytest.mark.long
def test_a_change_that_is_allowed_and_more_steps_go_on(corpus, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    done = run_script(
        "--resume_from_checkpoint", "true", "--output_dir", str(run), "--max_steps", "205", "--learning_rate", "0.0005",
        "--allow_changes", "learning_rate",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_ledger(run)
    assert len(rows) == 205
    assert rows[199]["learning_rate"] == 1e-3 and rows[200]["learning_rate"] == 0.0005


@pytest.mark.slow
def test_a_longer_run_begins_as_the_shorter_one_went(corpus, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    done = run_script("--resume_from_checkpoint", "true", "--output_dir", str(run), "--max_steps", "220")
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    done = run_script(*flags_of(corpus, whole, 220))
    assert done.returncode == 0, done.stderr
    assert_the_same_run(run, whole, 220)


# ---- steps that go wrong -------------------------------------------------------------------------------------------


def make_trainer(corpus: Path, run: Path, steps: int, backward: str = "auto") -> Any:
    """The trainer of the script in this process, so that a fault can be put into its model."""
    from slimpajama_hf import screen
    from slimpajama_hf.model import presets as models
    from slimpajama_hf.record.ledger import Ledger
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.samples.tokenizer import load_tokenizer
    from slimpajama_hf.settings.training_arguments import SlimPajamaTrainingArguments
    from slimpajama_hf.training.recorder import StepRecorder
    from slimpajama_hf.training.trainer import SlimPajamaTrainer

    screen.quiet_libraries()
    tokenizer = load_tokenizer("builtin")
    config = models.model_config("tiny", "n_layer=1,n_embd=32,n_head=2", tokenizer, 64)
    run.mkdir(parents=True)
    stream = SampleStream(opening.open_corpus(f"{corpus}/*.jsonl.zst"), Encoder(tokenizer), "truncate", 64)
    recorder = StepRecorder(Ledger(run / ledger.FILE_NAME), config.vocab_size)
    arguments = SlimPajamaTrainingArguments(
        output_dir=str(run), max_steps=steps, save_steps=10, warmup_steps=5, use_cpu=True
    )
    return SlimPajamaTrainer(
        model=models.build(config, 1), args=arguments, processing_class=tokenizer, stream=stream, recorder=recorder,
        about={"run_id": "test"}, backward=backward,
    )  # fmt: skip


def poison(trainer: Any, steps: set[int]) -> None:
    """Everything after the last norm is NaN in these steps, as when something overflows; the weights stay whole."""
    from transformers import TrainerCallback

    bias = trainer.model.transformer.ln_f.bias
    whole: list[torch.Tensor] = []

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in steps:
                whole.append(bias.detach().clone())
                with torch.no_grad():
                    bias.fill_(math.nan)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if whole:
                with torch.no_grad():
                    bias.copy_(whole.pop())

    trainer.add_callback(Poison())


@pytest.mark.first(1)
@pytest.mark.parametrize("backward", ["auto", "autograd"])
def test_a_step_that_is_no_number_changes_nothing_and_is_shown(corpus, tmp_path, fault_table, backward):
    trainer = make_trainer(corpus, tmp_path / "run", 30, backward)
    poison(trainer, {12, 13})
    seen: dict[int, torch.Tensor] = {}

    from transformers import TrainerCallback

    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen[state.global_step] = trainer.model.transformer.wte.weight.detach().clone()

    trainer.add_callback(Weights())
    trainer.train()
    trainer.recorder.close()
    rows = read_ledger(tmp_path / "run")
    assert [row["step"] for row in rows if row["update_skipped"]] == [12, 13]
    assert rows[12]["loss"] is None and rows[12]["update_skipped"] == "not finite" and rows[14]["loss"] is not None
    assert torch.equal(seen[12], seen[14])
    assert not torch.equal(seen[11], seen[12]) and not torch.equal(seen[14], seen[15])
    assert trainer.failure is None and checkpoints.steps(tmp_path / "run") == [10, 20, 30]
    fault_table("a loss that is no number: update skipped and shown", 2, bit_equal=None)


def test_ten_in_a_row_stop_the_run_and_name_the_documents_and_the_good_checkpoint(corpus, tmp_path, fault_table):
    run = tmp_path / "run"
    trainer = make_trainer(corpus, run, 50)
    poison(trainer, set(range(23, 50)))
    trainer.train()
    trainer.recorder.close()
    rows = read_ledger(run)
    assert len(rows) == 33
    assert isinstance(trainer.failure, UserError)
    text = str(trainer.failure)
    assert str(run / "checkpoint-20") in text and "--learning_rate" in text
    for row in rows[23:]:
        assert f"{row['shard']} row {row['row']} (step {row['step']})" in text
    fault_table("ten losses in a row that are no number: resumable stop", 10, bit_equal=None)


@pytest.mark.slow
def test_the_count_in_a_row_survives_a_resume(corpus, tmp_path):
    from slimpajama_hf.training.recorder import StepRecorder

    trainer = make_trainer(corpus, tmp_path / "run", 20)
    poison(trainer, set(range(15, 20)))
    trainer.train()
    trainer.recorder.close()
    again = StepRecorder(None, 4096, ledger.last_rows(tmp_path / "run" / "ledger.jsonl", 200))
    assert [row["step"] for row in again.not_finite] == [15, 16, 17, 18, 19]


@pytest.mark.first(1)
@pytest.mark.parametrize("backward", ["auto", "autograd"])
def test_out_of_memory_is_skipped_once_and_then_stops_the_run(
    corpus, tmp_path, fault_table, backward, monkeypatch, capsys
):
    from slimpajama_hf.model.gpt2_step import GPT2Step

    run = tmp_path / "run"
    trainer = make_trainer(corpus, run, 30, backward)
    broken = {7, 15}
    # The first thing in a step that asks a device for memory.
    owner, name = (GPT2Step, "__call__") if backward == "auto" else (trainer, "_prepare_inputs")
    real = getattr(owner, name)

    def first(*arguments, **keywords):
        if trainer.state.global_step in broken:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, first)
    with pytest.raises(UserError, match=r"out of memory at step 15 .*--max_seq_length"):
        trainer.train()
    trainer.save_now()
    trainer.recorder.close()
    rows = read_ledger(run)
    assert len(rows) == 15
    assert rows[7]["update_skipped"] == "out of memory" and rows[7]["loss"] is None and rows[8]["loss"] is not None
    assert any("step 7: out of memory" in line for line in capsys.readouterr().err.splitlines())
    assert checkpoints.steps(run) == [10, 15]
    fault_table("out of memory (simulated): skipped once, then a resumable stop", 2, bit_equal=None)


def test_a_loss_that_stands_out_is_marked_with_its_document():
    from slimpajama_hf.record.spikes import LossSpikes

    draw = random.Random(0)
    spikes = LossSpikes()
    scores = [spikes.score(draw.gauss(5.0, 0.5)) for _ in range(400)]
    assert sum(score is not None for score in scores) <= 2
    assert spikes.score(9.5) is not None and spikes.score(9.5) > 5
    assert spikes.score(5.2) is None
    again = LossSpikes([4.0 + 0.01 * number for number in range(30)])
    assert again.score(100.0) is None, "too few to say what is ordinary"


@pytest.mark.slow
def test_a_sample_that_fails_is_recorded_as_failed_and_training_goes_on(
    corpus, tmp_path, encoder, fault_table, monkeypatch
):
    from slimpajama_hf.model import generation
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.watching.written_samples import GenerateSamples

    trainer = make_trainer(corpus, tmp_path / "run", 6)
    folder = RunFolder(tmp_path / "run")
    callback = GenerateSamples(trainer, folder, encoder, 2, True, lambda: 0.0)
    trainer.add_callback(callback)
    real = generation.write_after

    def write_after(*arguments, **keywords):
        if trainer.state.global_step == 2:
            raise RuntimeError("the accelerator fell out")
        return real(*arguments, **keywords)

    monkeypatch.setattr(generation, "write_after", write_after)
    trainer.train()
    samples = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 2, 4]
    assert samples[1]["output"] is None and "fell out" in samples[1]["error"]
    assert samples[0]["output"] is not None and samples[2]["output"] is not None
    assert len(callback.failures) == 1 and trainer.state.global_step == 6
    fault_table("a sample that raises: recorded as failed", 1, bit_equal=None)


# ---- safety --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_token_in_anything_that_a_run_writes_or_says(corpus, tmp_path):
    token = "hf_" + "FaKeToKeN0123456789abcdefABCDEF"
    run = tmp_path / "run"
    flags = flags_of(
        corpus, run, 6, "--hub_token", token, "--display_samples", "2", "--viz_interval", "3", "--save_steps", "3"
    )
    done = run_script(*flags, HF_TOKEN=token)
    assert done.returncode == 0, done.stderr
    failed = run_script(*flags, "--dataset", f"nowhere/{token}", HF_TOKEN=token)
    assert failed.returncode == 1
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr):
        assert token not in text
    for path in run.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path
    assert not list(run.rglob("training_args.bin"))


def test_every_pickle_of_a_checkpoint_loads_weights_only(unbroken):
    import numpy as np

    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(unbroken / "checkpoint-200" / name, weights_only=True)
    with torch.serialization.safe_globals(
        [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    ):
        torch.load(unbroken / "checkpoint-200" / "rng_state.pth", weights_only=True)


# ---- the long version ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_ten_signals_at_random_moments(corpus, unbroken, tmp_path, fault_table, number):
    """Each stop saves, each start goes on; at the end it is the run that was never stopped."""
    run = tmp_path / "run"
    draw = random.Random(int(number))
    flags = flags_of(corpus, run, 200, "--resume_from_checkpoint", "true")
    sent = 0
    while sent < 10:
        process = start(*flags, stderr=subprocess.DEVNULL)
        begun = len(read_ledger(run)) if (run / "ledger.jsonl").exists() else 0
        _wait_for_rows(run, min(begun + draw.randint(1, 12), 199))
        if process.poll() is None:
            process.send_signal(number)
        if process.wait(timeout=60) == 0:
            break
        assert process.returncode == 128 + number
        sent += 1
        assert checkpoints.steps(run)[-1] == len(read_ledger(run)), "everything learned is saved"
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    assert_the_same_run_apart_from_extra_checkpoints(run, unbroken)
    fault_table(f"{number.name} at a random moment", sent, bit_equal=True)


def assert_the_same_run_apart_from_extra_checkpoints(left: Path, right: Path) -> None:
    assert set(checkpoints.steps(right)) <= set(checkpoints.steps(left))
    assert_the_same_run(left, right, 200)
