"""What tests/test_stand_in_device.py runs in a process of its own: the step, the optimizers, the recorder and a whole
run of the Trainer on a device that is neither a CPU nor CUDA (`stand_in_device.py`).

    python -m tests.on_stand_in_device

Prints one JSON: each check's name, and what went wrong with it ("" where nothing did).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slimpajama_hf import model as models
from slimpajama_hf import optimization
from slimpajama_hf.corpora import Cursor, Document
from slimpajama_hf.gpt2_step import GPT2Step
from slimpajama_hf.ledger import Ledger, last_rows
from slimpajama_hf.recorder import StepRecorder
from slimpajama_hf.samples import Sample
from tests import stand_in_device
from tests.stand_in_device import NAME, OnDevice, StandIn, moved

CHECKS: dict[str, Callable[[StandIn], None]] = {}


def check(function: Callable[[StandIn], None]) -> Callable[[StandIn], None]:
    CHECKS[function.__name__] = function
    return function


def sample(tokens: int = 5) -> Sample:
    document = Document("text", "RedPajamaC4", "local", "a.jsonl", 3, "f" * 40, 4)
    return Sample(list(range(tokens)), document, Cursor(0, "a.jsonl", 4), 4)


def values_of(step: int) -> torch.Tensor:
    """What the trainer hands to the recorder for a sample of 5 tokens."""
    return torch.tensor([2.5 + step, 3.0, 0.1, 0.0, *[math.nan] * 4, 1.0, 2.0, 3.0, 4.0])


@check
def the_stand_in_refuses_a_mix_and_counts_what_waits(device: StandIn) -> None:
    there = torch.ones(3, device=NAME)
    assert there.device.type == NAME and not there.is_cuda
    try:
        there + torch.ones(3)
    except RuntimeError as error:
        assert "expected all tensors" in str(error)
    else:
        raise AssertionError("two devices were mixed")
    device.waits.clear()
    assert there.sum().item() == 3.0 and sum(device.waits.values()) == 1
    assert there.to("cpu").tolist() == [1.0] * 3 and sum(device.waits.values()) == 2
    there[:1].add_(torch.tensor(1.0))
    assert sum(device.waits.values()) == 2 and there.inner.tolist() == [2.0, 1.0, 1.0]
    pinned = torch.zeros(3).pin_memory()
    there.copy_(pinned, non_blocking=True)
    pinned.fill_(7.0)
    assert (there + 0).inner.tolist() == [7.0] * 3, "a buffer that is used again too early shows"
    assert sum(device.waits.values()) == 2


def rows_of(device: StandIn, folder: Path) -> list[dict[str, Any]]:
    recorder = StepRecorder(Ledger(folder / "ledger.jsonl"), vocab_size=16)
    for step in range(3):
        recorder.add(step, sample(), values_of(step).to(NAME), learning_rate=1e-3, seconds=0.5)
    recorder.close()
    return last_rows(folder / "ledger.jsonl", 3)


@check
def numbers_leave_a_device_with_streams_without_a_wait(device: StandIn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        on_device = [values_of(step).to(NAME) for step in range(3)]
        device.waits.clear()
        recorder = StepRecorder(Ledger(Path(folder) / "ledger.jsonl"), vocab_size=16)
        for step, values in enumerate(on_device):
            recorder.add(step, sample(), values, learning_rate=1e-3, seconds=0.5)
            # What the device does to them afterwards is not what was handed over.
            values.zero_()
        recorder.close()
        assert not device.waits, device.waits
        rows = last_rows(Path(folder) / "ledger.jsonl", 3)
        assert [row["loss"] for row in rows] == [2.5, 3.5, 4.5] and rows[0]["grad_norm"] == 0.1


@check
def numbers_leave_a_device_without_streams_by_a_plain_copy(device: StandIn) -> None:
    kept = stand_in_device.Module.current_stream
    del stand_in_device.Module.current_stream
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(device, Path(folder))
    finally:
        stand_in_device.Module.current_stream = staticmethod(kept)  # type: ignore[assignment]
    assert [row["loss"] for row in rows] == [2.5, 3.5, 4.5] and rows[0]["accuracy"] == 0.75


def main() -> int:
    found = {}
    asked = sys.argv[1:] or list(CHECKS)
    for name in asked:
        try:
            with StandIn() as device:
                CHECKS[name](device)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
