"""Trackers get what the ledger has, once; one that fails stops nothing."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimpajama_hf import screen
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.watching import trackers
from tests.conftest import NANO, make_records, read_ledger, run_script, write_records


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} as TensorBoard itself reads the folder of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 steps told to TensorBoard, cut back to the checkpoint at 20 and gone on from there."""
    folder = tmp_path_factory.mktemp("trackers") / "run"
    held_out = write_records(folder.parent / "held-out.jsonl", make_records(4, seed=9))
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--report_to", "tensorboard", "--save_steps", "20",
             "--eval_steps", "10", "--eval_dataset", str(held_out), "--output_dir", str(folder)]  # fmt: skip
    assert (done := run_script(*flags, "--max_steps", "30")).returncode == 0, done.stderr
    again = run_script(*flags, "--max_steps", "40", "--resume_from_checkpoint", str(folder / "checkpoint-20"))
    assert again.returncode == 0, again.stderr
    return folder


@pytest.mark.long
def test_tensorboard_has_every_number_of_the_ledger_once(run):
    rows, found = read_ledger(run), scalars(run)
    assert json.loads((run / "run.json").read_text())["tracker_project"] == "run"
    assert [row["step"] for row in rows] == list(range(40))
    for key, name in trackers.METRICS.items():
        expected = [(row["step"], row[key]) for row in rows]
        shown = found[f"train/{name}"]
        assert [step for step, _ in shown] == [step for step, _ in expected]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)
    bits = [row["code_bits"] / row["text_bytes"] for row in rows]
    assert [value for _, value in found["train/bits_per_byte"]] == pytest.approx(bits, rel=1e-6)
    assert {step for step, _ in found["eval/loss"]} == {10, 20, 30, 40}


@pytest.mark.slow
@pytest.mark.long
def test_its_files_are_deleted_with_the_run(run, shards):
    flags = [
        *NANO,
        "--dataset",
        f"{shards}/*.jsonl.zst",
        "--no-checkpoint",
        "--max_steps",
        "3",
        "--output_dir",
        str(run),
    ]
    done = run_script(*flags, "--overwrite_output_dir")
    assert done.returncode == 0, done.stderr
    assert not (run / "tensorboard").exists()


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "asked, said",
    [("wandb", "--report_to wandb: the package is not installed; pip install wandb"),
     ("tensorboard,wandb", "--report_to wandb: the package is not installed; pip install wandb"),
     ("tensorbord", "--report_to tensorbord: expected none, or one or more of")],
)  # fmt: skip
def test_what_is_not_there_is_said_before_anything_is_opened(tmp_path, asked, said):
    done = run_script("--report_to", asked, "--dataset", "nowhere.jsonl", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


class Tool:
    """An integration in the shape of transformers'."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.got, self.ended = fails_at, [], False  # type: ignore[var-annotated]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.project = args.project

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if state.global_step == self.fails_at:
            raise ConnectionError("no route\nto host")
        self.got.append((state.global_step, logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True


ROW = {"loss": 5.0, "accuracy": 0.1, "learning_rate": 1e-3, "grad_norm": None, "throughput": 2500.0, "tokens": 256,
       "tokens_cut": 0, "code_bits": 2000.0, "text_bytes": 1000}  # fmt: skip


def test_one_that_fails_is_said_once_and_the_other_goes_on(tmp_path, monkeypatch):
    tools = {"wandb": Tool(fails_at=2), "trackio": Tool()}
    monkeypatch.setattr(trackers.Trackers, "_made", lambda self, name: tools[name])
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.delenv("WANDB_RESUME", raising=False)
    sender, said = trackers.Trackers(list(tools), RunFolder(tmp_path / "run"), "0123456789", 0, lambda: None, "run"), []
    monkeypatch.setattr(screen, "say", said.append)
    args, state = SimpleNamespace(run_name=None), SimpleNamespace(is_world_process_zero=True, global_step=0)
    sender.on_train_begin(args, state, None)
    for step in range(6):
        sender.on_row(ROW | {"step": step})
    sender.on_train_end(args, state, None)
    assert args.run_name is None and state.global_step == 0, "what belongs to the Trainer is left alone"
    assert said == ["--report_to wandb: it is left alone from here on (ConnectionError: no route to host)"]
    assert tools["trackio"].project == "run", "not that of transformers, which is one for all runs"
    assert [step for step, _ in tools["wandb"].got] == [0, 1]
    assert [step for step, _ in tools["trackio"].got] == list(range(6)) and tools["trackio"].ended
    logs = tools["trackio"].got[0][1]
    assert "grad_norm" not in logs and math.isclose(logs["bits_per_byte"], 2.0)


def test_one_that_stands_still_holds_nothing_up_and_what_it_missed_is_counted(tmp_path, monkeypatch):
    go_on = threading.Event()

    class Stuck(Tool):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            go_on.wait(60)

    monkeypatch.setattr(trackers.Trackers, "_made", lambda self, name: Stuck())
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "MOST_WAITING", 4)
    monkeypatch.setenv("WANDB_RUN_ID", "x")
    monkeypatch.setenv("WANDB_RESUME", "allow")
    sender, said = trackers.Trackers(["wandb"], RunFolder(tmp_path / "run"), "0123456789", 0, lambda: None, "run"), []
    monkeypatch.setattr(screen, "say", said.append)
    args, state = SimpleNamespace(run_name="r"), SimpleNamespace(is_world_process_zero=True, global_step=0)
    sender.on_train_begin(args, state, None)
    sender.on_row(ROW | {"step": 0})
    deadline = time.monotonic() + 30
    while sender._jobs.qsize() and time.monotonic() < deadline:
        time.sleep(0.01)  # until the first is in the tool's hands
    for step in range(1, 8):
        sender.on_row(ROW | {"step": step})  # four may wait, three are left out
    sender.on_train_end(args, state, None)
    go_on.set()
    assert said == ["wandb: 7 steps were not taken in time; the ledger has them"]
