"""The training command on machines that seem to have GPUs, up to where its flags are parsed.

The driver is a recorder: as the real one it reads CUDA_VISIBLE_DEVICES once, when it is woken (cuInit), and never again.
`python -m tests.simulated_cuda` answers JSON lines, each as if in a process of its own:

in:  {"gpus": 2, "runs": [["--gpu", "1"]], "variables": {}, "nvml": true, "usable": true, "awake": null}
     (`nvml` false: as on Windows or a Jetson; `usable` false: the driver is too old; `awake`: "counted" or "used" CUDA before, as a notebook may have)
out: {"read": [what the driver found in CUDA_VISIBLE_DEVICES, if it was woken], "given": [device and number of GPUs of
     each run], "error": of the run that failed, "said": stderr}
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any

import torch

import run_clm_slimpajama
from slimpajama_hf import devices
from slimpajama_hf.training import processes

cuda: Any = torch.cuda
binding: Any = torch._C


class Driver:
    """Of one case: how many GPUs there are, and what was read when it was woken."""

    def __init__(self, gpus: int, nvml: bool, usable: bool) -> None:
        self.gpus, self.usable = gpus, usable
        self.read: list[str | None] = []
        self._shown = 0
        cuda._initialized, cuda._cached_device_count = False, None
        cuda._raw_device_count_nvml = (lambda: gpus) if nvml else self._without_nvml
        binding._cuda_getDeviceCount = binding._cuda_init = self.wake
        cuda.set_device = lambda device: self.wake()

    def wake(self) -> int:
        """cudaGetDeviceCount."""
        if not self.read:
            self.read.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
            names = torch.cuda._parse_visible_devices()
            there = [name for name in names if (int(str(name).removeprefix("GPU-")) < self.gpus)]
            self._shown = len(there) if self.usable else 0
        return self._shown

    @staticmethod
    def _without_nvml() -> int:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")


class Properties:
    major, minor, name, total_memory = 8, 6, "simulated", 4 << 30


class Parsed(Exception):
    """As far as this goes."""


def answer(case: dict[str, Any]) -> dict[str, Any]:
    driver = Driver(case["gpus"], case["nvml"], case["usable"])
    devices._chosen = None
    cuda._raw_device_uuid_nvml = (lambda: [f"GPU-{number}" for number in range(driver.gpus)]) if case["nvml"] else None
    given: list[dict[str, Any]] = []

    def stop(training: Any) -> Any:
        """In the place of `processes.join`, the first thing that is done with what was parsed."""
        given.append({"device": str(training.device), "n_gpu": training.n_gpu, "batch": training.train_batch_size})
        raise Parsed

    processes.join = stop
    if case["awake"]:
        torch.cuda.is_available()
        if case["awake"] == "used":
            torch.cuda.init()
    error = None
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for flags in case["runs"]:
            try:
                run_clm_slimpajama.main(flags)
            except Parsed:
                continue
            except Exception as reason:
                error = f"{type(reason).__name__}: {reason}"
                break
    return {"read": driver.read, "given": given, "error": error, "said": said.getvalue()}


def main() -> None:
    cuda._is_compiled = lambda: True
    cuda._cudart, cuda._queued_calls = object(), []
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda device=None: Properties
    binding._cuda_isInBadFork = False
    binding._cuda_getCurrentRawStream = lambda device: 0
    before = dict(os.environ)
    for line in sys.stdin:
        case = json.loads(line)
        os.environ.clear()
        os.environ.update(before | case["variables"])
        sys.stdout.write(json.dumps(answer(case)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
