"""The page "Your first hour": its commands, one after the other, in a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, make_text

PAGE = ROOT / "docs/first-hour.md"
#: What the first step of the page makes; here it is there.
INSTALLS = ("make test-run", "source .venv/bin/activate")


def commands() -> list[str]:
    """The command lines of the page, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with texts of one's own in it."""
    for name in ("run_clm_slimpajama.py", "slimpajama_hf", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-texts").mkdir()
    for number in range(900):
        text = make_text(number, 30 + number % 200)
        (tmp_path / "my-texts" / f"{number}.txt").write_text(f"{text}\n\n{text[::-1]}\n", encoding="utf-8")
    return tmp_path


def follow(folder: Path, steps: dict[str, str]) -> None:
    """All commands of the page, with other numbers of steps in them (`steps`: as written -> as run)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in commands():
        if line in INSTALLS:
            continue
        for written, run in steps.items():
            line = re.sub(rf"(--max_steps|--step) {written}\b", rf"\1 {run}", line)
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, cwd=folder, env=environment(PATH=path), timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert shutil.which("make"), "the first command of the page"


@pytest.mark.long
def test_the_first_hour_in_few_steps(folder):
    follow(folder, {"600": "12", "800": "16", "300": "6"})
    assert (folder / "runs/mine/checkpoint-16/model.safetensors").is_file()
    assert (folder / "runs/mine/report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_hour_as_it_is_written(folder):
    follow(folder, {})
    assert (folder / "runs/mine/checkpoint-800/model.safetensors").is_file()
