"""`--gpu`: which GPU the driver is shown, seen by a simulated one that records what it was shown when it was woken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment, run_script

Chosen = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def chosen() -> Iterator[Chosen]:
    """What the driver of a machine with so many GPUs was shown, and what a run with these flags was given."""
    variables = {name: value for name, value in environment().items() if name != "CUDA_VISIBLE_DEVICES"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.simulated_cuda"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def ask(
            gpus: int,
            *flags: str,
            runs: Any = None,
            nvml: bool = True,
            usable: bool = True,
            awake: str | None = None,
            **variables: str,
        ) -> dict[str, Any]:
            case = {
                "gpus": gpus,
                "runs": runs or [flags],
                "nvml": nvml,
                "usable": usable,
                "awake": awake,
                "variables": variables,
            }
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def showing(visible: str | None) -> dict[str, str]:
    return {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}


ONE = [{"device": "cuda:0", "n_gpu": 1, "batch": 1}]


@pytest.mark.parametrize("nvml", [True, False], ids=["nvml", "no nvml"])
@pytest.mark.parametrize(
    ("flags", "visible", "expected"),
    [
        ([], None, "0"),
        (["--gpu", "1"], None, "1"),
        (["--gpu=1"], None, "1"),
        (["--gpu", "0", "--gpu", "1"], None, "1"),
        (["--gpu", "1"], "3,2", "2"),
        (["--gpu", "1"], "GPU-3,GPU-1", "GPU-1"),
        ([], "2,3", "2"),
    ],
)
def test_the_driver_wakes_to_one_gpu_the_one_that_was_asked_for(chosen, flags, visible, expected, nvml):
    if visible and visible.startswith("GPU-") and not nvml:
        pytest.skip("PyTorch itself matches UUIDs by NVML")
    found = chosen(4, *flags, **showing(visible), nvml=nvml)
    assert (found["read"], found["given"], found["error"]) == ([expected], ONE, None)


def test_a_configuration_file_chooses_the_gpu_and_a_flag_beside_it_wins(chosen, tmp_path: Path):
    (tmp_path / "run.yaml").write_text("gpu: 2\nmax_steps: 5\n")
    assert chosen(4, "--config", str(tmp_path / "run.yaml"))["read"] == ["2"]
    assert chosen(4, "--gpu", "3", f"--config={tmp_path / 'run.yaml'}")["read"] == ["3"]


@pytest.mark.parametrize("nvml", [True, False], ids=["nvml", "no nvml"])
@pytest.mark.parametrize(
    ("gpus", "flags", "visible", "words"),
    [
        (2, ["--gpu", "2"], None, "--gpu 2: there "),
        (1, ["--gpu", "1"], None, "--gpu 1: there "),
        (0, ["--gpu", "1"], None, "--gpu 1: there is no GPU"),
        (2, ["--gpu", "-1"], None, "--gpu -1: "),
        (4, ["--gpu", "2"], "0,3", "--gpu 2: CUDA_VISIBLE_DEVICES=0,3 shows 2 GPUs"),
        (4, ["--gpu", "1"], "7,9", "--gpu 1: CUDA_VISIBLE_DEVICES=7,9 "),
        (2, ["--gpu", "1"], "", "--gpu 1: CUDA_VISIBLE_DEVICES= shows no GPU"),
        (2, ["--gpu", "2"], "0,-1,1", "--gpu 2: CUDA_VISIBLE_DEVICES=0,-1,1 shows 1 GPU"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(chosen, gpus, flags, visible, words, nvml):
    found = chosen(gpus, *flags, **showing(visible), nvml=nvml)
    assert found["error"] is not None and found["error"].startswith(f"UserError: {words}"), found
    assert found["given"] == []


@pytest.mark.parametrize("nvml", [True, False], ids=["nvml", "no nvml"])
def test_without_a_gpu_gpu_0_trains_on_the_cpu_and_says_so(chosen, nvml):
    found = chosen(0, "--gpu", "0", nvml=nvml)
    assert found["error"] is None and [each["device"] for each in found["given"]] == ["cpu"]
    assert found["said"].count("--gpu 0: there is no GPU here; training on the CPU\n") == 1
    assert "--gpu" not in chosen(0, nvml=nvml)["said"]


def test_a_gpu_that_pytorch_cannot_use_is_no_silent_cpu(chosen):
    found = chosen(1, "--gpu", "0", usable=False)
    assert found["error"].startswith("UserError: --gpu 0: it is there, but PyTorch cannot use it"), found
    found = chosen(1, usable=False)
    assert found["given"][0]["device"] == "cpu"
    assert "there is a GPU here, but PyTorch cannot use it" in found["said"] and "training on the CPU" in found["said"]


def test_the_cpu_beside_a_gpu(chosen):
    """Asked for the CPU, nothing wakes CUDA; asked for both, nothing is guessed."""
    found = chosen(2, "--use_cpu", "true")
    assert found["read"] == [] and found["given"][0]["device"] == "cpu"
    assert "--use_cpu" in chosen(2, "--use_cpu", "--gpu", "1")["error"]
    assert "ACCELERATE_USE_CPU" in chosen(2, "--gpu", "1", ACCELERATE_USE_CPU="true")["error"]
    found = chosen(2, "--gpu", "0", ACCELERATE_USE_CPU="true")
    assert found["read"] == [""] and found["given"][0]["device"] == "cpu"
    assert "--gpu 0: the launcher asks for the CPU (ACCELERATE_USE_CPU)" in found["said"]


@pytest.mark.parametrize("awake", ["counted", "used"])
def test_cuda_that_is_awake_already_is_shown_no_other_gpu(chosen, awake):
    """A notebook that used CUDA before, on a machine with 2 GPUs: the first is trained on alone, no other is promised."""
    found = chosen(2, awake=awake)
    assert (found["read"], found["given"], found["error"]) == ([None], ONE, None)
    found = chosen(2, "--gpu", "1", awake=awake)
    assert found["given"] == [] and "--gpu 1: CUDA was in use in this process before" in found["error"]


def test_a_second_run_in_one_process_has_the_gpu_of_the_first_or_is_refused(chosen):
    found = chosen(2, runs=[["--gpu", "1"]] * 2)
    assert (found["read"], found["given"], found["error"]) == (["1"], 2 * ONE, None)
    found = chosen(2, runs=[["--gpu", "0"], ["--gpu", "1"]])
    assert (found["read"], found["given"]) == (["0"], ONE)
    assert "--gpu 1: an earlier run in this process took GPU 0" in found["error"]


def test_several_processes_leave_the_choice_to_the_launcher(chosen):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    found = chosen(2, "--gpu", "1", **launched)
    assert "the launcher assigns the GPUs" in found["error"] and found["given"] == []


@pytest.mark.slow
def test_gpu_0_on_this_machine(tmp_path, cache):
    """The old program's own command line has it; where there is no GPU it is no mistake."""
    import torch

    flags = ["--test", "--max_steps", "1", "--no-checkpoint", "--output_dir", str(tmp_path / "run"), "--gpu", "0"]
    done = run_script(*flags, "--max_seq_length", "16", "--config_overrides", "n_layer=1,n_embd=32,n_head=2")
    assert done.returncode == 0, done.stderr
    assert ("--gpu 0: there is no GPU here; training on the CPU" in done.stderr) is not torch.cuda.is_available()
