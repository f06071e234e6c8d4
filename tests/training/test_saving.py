"""A checkpoint that is written while training goes on is the one that training would wait for."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
import torch

import run_clm_slimpajama
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.model import memory
from slimpajama_hf.record import checkpoints
from slimpajama_hf.record.ledger import Ledger
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.training import checkpointing
from slimpajama_hf.training.host_copies import HostCopies
from slimpajama_hf.training.processes import Processes
from slimpajama_hf.training.recorder import StepRecorder
from slimpajama_hf.training.saving import Saving
from tests.conftest import NANO


def sums(run: Path, step: int) -> dict[str, str]:
    manifest = checkpoints.read_manifest(checkpoints.path_of(run, step))
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.mark.long
def test_written_behind_it_has_the_same_bytes_and_without_memory_training_waits(shards, tmp_path, monkeypatch, capsys):
    threads = []
    for name, free in (("behind", 2**40), ("waited", 0)):
        monkeypatch.setattr(checkpointing.memory, "free_bytes", lambda device, free=free: free)
        flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "24", "--save_steps", "12",
                 "--output_dir", str(tmp_path / name), "--precision", "float32", "--viz_interval", "100000"]  # fmt: skip
        assert run_clm_slimpajama.main(flags) == 0
        threads.append("training waits while a checkpoint is written: a copy of it takes" in capsys.readouterr().err)
    assert threads == [False, True] and memory.free_bytes is not None
    for step in (12, 24):
        behind, waited = sums(tmp_path / "behind", step), sums(tmp_path / "waited", step)
        assert {"model.safetensors", "averaged/model.safetensors", "optimizer.pt", "rng_state.pth"} <= behind.keys()
        # Its time of day, and what trainer_state.json says of its folder, are its own.
        assert {name for name in behind if behind[name] != waited.get(name)} <= {"trainer_state.json"}
        assert behind.keys() == waited.keys()


@pytest.fixture
def saving(tmp_path) -> Saving:
    recorder = StepRecorder(Ledger(RunFolder(tmp_path).ledger), 16)
    return Saving(tmp_path, recorder, Processes(), {"run_id": "a"}, 1, 1)


def save(saving: Saving, step: int, job) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        saving.later(lambda: job(folder))

    saving.save(step, Cursor(), write, behind=True)


def test_it_is_there_when_it_is_whole_and_one_is_under_way_at_a_time(saving, tmp_path, capsys):
    go_on, there, told = threading.Event(), [], []
    saving.listeners.append(told.append)

    def job(folder: Path) -> None:
        assert go_on.wait(20)
        (folder / "large").write_bytes(b"x" * 1000)

    began = time.monotonic()
    save(saving, 5, job)
    assert time.monotonic() - began < 10 and not checkpoints.steps(tmp_path)
    saving.look()
    assert not told
    go_on.set()
    save(saving, 6, lambda folder: there.extend(checkpoints.steps(tmp_path)))
    assert told == [5]
    saving.wait()
    assert there == [5]
    # The limit is one.
    assert checkpoints.steps(tmp_path) == [6] and told == [5, 6] and saving.failure is None
    assert checkpoints.problem(checkpoints.path_of(tmp_path, 6)) is None


def test_what_the_disk_did_not_take_is_said_at_the_next_step_and_nothing_of_it_stays(saving, tmp_path, capsys):
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    save(saving, 5, full)
    deadline = time.monotonic() + 20
    while saving.failure is None and time.monotonic() < deadline:
        saving.look()
        time.sleep(0.01)
    assert "checkpoint-5" in saving.failure and "not saved: checkpoint-5" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]
    save(saving, 6, lambda folder: None)
    saving.wait()
    assert saving.failure is None and checkpoints.steps(tmp_path) == [6]


def test_an_error_that_is_no_disk_is_raised(saving):
    def wrong(folder: Path) -> None:
        raise KeyError("a fault of the program")

    save(saving, 5, wrong)
    with pytest.raises(KeyError):
        saving.wait()


def test_copies_take_the_memory_of_those_before_them_and_are_saved_alone():
    """Each lies in a storage of its own: `torch.save` writes the whole storage of what it is given."""
    states = [
        {"step": torch.tensor(3.0 + n), "moments": [torch.randn(1000, 7), torch.randn(3, 5).bfloat16()], "rate": 0.1}
        for n in range(2)
    ]
    copies = HostCopies(30_000, pinned=False)
    places = []
    for state in states:
        copies.begin()
        made = copies.of(state)
        places.append([made["step"].data_ptr(), *(each.data_ptr() for each in made["moments"])])
        files = [io.BytesIO(), io.BytesIO()]
        torch.save(made, files[0])
        torch.save(state, files[1])
        assert files[0].getvalue() == files[1].getvalue()
        again = torch.load(io.BytesIO(files[0].getvalue()), weights_only=True)
        assert torch.equal(again["step"], state["step"]) and again["rate"] == 0.1
        assert all(map(torch.equal, again["moments"], state["moments"]))
    assert places[0] == places[1] and all(place % 64 == 0 for place in places[0])
    # What does not fit has memory of its own, and so has what is empty.
    copies.begin()
    large = copies.of([torch.ones(20_000), torch.empty(0), torch.ones(2)])
    assert [each.sum().item() for each in large] == [20_000, 0, 2] and large[2].data_ptr() == places[0][0]
