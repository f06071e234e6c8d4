"""Devices that are not the CPU, without one: `on_stand_in_device.py` runs in a process of its own, once for all of its
checks, for PyTorch knows one backend of others a process, for good."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

pytestmark = pytest.mark.long

CHECKS = [
    line.removeprefix("def ").partition("(")[0]
    for before, line in zip(*[(ROOT / "tests/on_stand_in_device.py").read_text().splitlines()[at:] for at in (0, 1)], strict=False)
    if before == "@check"
]  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_stand_in_device"], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_device_that_is_neither_a_cpu_nor_cuda(found, name):
    assert found[name] == "", found[name]
