"""What tests/test_stand_in_device.py runs in a process of its own: the step, the optimizers, the recorder and a whole
run of the Trainer on a device that is neither a CPU nor CUDA (`stand_in_device.py`).

    python -m tests.on_stand_in_device

Writes one JSON: each check's name, and what went wrong with it ("" where nothing did).
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

from slimpajama_hf.corpora import Cursor, Document
from slimpajama_hf.ledger import Ledger, last_rows
from slimpajama_hf.recorder import StepRecorder
from slimpajama_hf.samples import Sample
from tests import stand_in_device
from tests.conftest import read_ledger, run_script
from tests.stand_in_device import NAME, StandIn

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
    with stand_in_device.like_mps(), tempfile.TemporaryDirectory() as folder:
        rows = rows_of(device, Path(folder))
    assert [row["loss"] for row in rows] == [2.5, 3.5, 4.5] and rows[0]["accuracy"] == 0.75


# ---- the program as a whole ----

FLAGS = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=32,n_head=2,n_positions=64", "--max_seq_length", "64",
         "--tokenizer", "builtin", "--dataset", "embedded", "--viz_interval", "1000", "--display_samples", "1000",
         "--warmup_steps", "5", "--report_to", "none"]  # fmt: skip


def run(folder: str, *flags: str) -> list[dict[str, Any]]:
    """Rows of the ledger of a run into `folder`, on the device where that is taken for the program's own."""
    import run_clm_slimpajama

    assert run_clm_slimpajama.main([*FLAGS, "--output_dir", folder, *flags]) == 0
    return [json.loads(line) for line in (Path(folder) / "ledger.jsonl").read_text().splitlines()]


def on_the_cpu(folder: str, *flags: str) -> list[dict[str, Any]]:
    done = run_script(*FLAGS, "--output_dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    return read_ledger(Path(folder))


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The numbers of two runs, to float32's rounding."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["text_sha1"] == other["text_sha1"] and mine["update_skipped"] == other["update_skipped"] == ""
        for name in ("loss", "grad_norm", "grad_square", "loss_after", "next_loss"):
            assert (mine[name] is None) == (other[name] is None), (name, mine, other)
            if mine[name] is not None:
                assert abs(mine[name] - other[name]) <= 1e-3 * abs(other[name]), (
                    mine["step"],
                    name,
                    mine[name],
                    other[name],
                )


@check
def a_run_on_a_device_without_streams_whose_optimizer_scales_nothing(device: StandIn) -> None:
    """As on MPS: clipped and skipped by other means, with the numbers of a CPU."""
    flags = ("--max_steps", "24", "--save_steps", "12", "--precision", "float32", "--max_grad_norm", "0.5")
    with tempfile.TemporaryDirectory() as folder:
        theirs = on_the_cpu(f"{folder}/cpu", *flags)
        with stand_in_device.like_mps(), stand_in_device.whole_programs():
            ours = run(f"{folder}/there", *flags)
        compare(ours, theirs)
        assert (Path(folder) / "there/checkpoint-24/model.safetensors").is_file()
        assert max(row["grad_norm"] for row in ours) > 0.5, "clipping was at work"


def main() -> int:
    found = {}
    asked = sys.argv[1:] or list(CHECKS)
    for name in asked:
        try:
            if name.startswith("a_run_"):
                CHECKS[name](StandIn())
            else:
                with StandIn() as device:
                    CHECKS[name](device)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
