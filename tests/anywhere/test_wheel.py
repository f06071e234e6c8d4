"""The wheel, installed into an environment of its own outside of the repository: the examples run from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.anywhere import scripts
from tests.conftest import ROOT, read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Left out of what the wheel is built from.
_NOT_BUILT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "tests", "examples", "*.egg-info")


def outside(**more: str) -> dict[str, str]:
    """An environment in which nothing leads to the repository."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The interpreter of an environment that has the wheel, and finds what else it needs where it is here."""
    place = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, place / "source", ignore=_NOT_BUILT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(place), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=250, env=outside())
    assert built.returncode == 0, built.stderr
    (wheel,) = place.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "env"], check=True)
    python = place / "env" / "bin" / "python"
    own = next((place / "env" / "lib").glob("python*")) / "site-packages"
    (own / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=250, env=outside())
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    assert sysconfig.get_path("purelib") != str(own)
    return python


def run(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *words], cwd=folder, env=outside(), capture_output=True, text=True, timeout=200)


def test_it_is_typed_and_is_imported_from_there(installed, tmp_path):
    code = (
        "import json, slimpajama_hf, pathlib, importlib.metadata as m\n"
        "from slimpajama_hf import ExactStream\n"
        "place = pathlib.Path(slimpajama_hf.__file__).parent\n"
        "print(json.dumps([str(place), (place / 'py.typed').is_file(), m.metadata('slimpajama-hf').get_all('Provides-Extra')]))"
    )
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    place, typed, extras = json.loads(done.stdout)
    assert Path(place).is_relative_to(installed.parent.parent) and typed and {"train", "report"} <= set(extras)


@pytest.mark.parametrize("name", scripts.SCRIPTS)
def test_the_example_runs_outside_of_the_repository(name, installed, tmp_path, texts, tokenizer):
    """Begun, and gone on with: 10 steps, then none, for it has them."""
    if not scripts.is_there(name):
        pytest.skip("trl is not installed here; `make test-clients` runs it")
    shutil.copyfile(scripts.EXAMPLES / f"{name}.py", tmp_path / "script.py")
    arguments = scripts.SCRIPTS[name](texts, str(tokenizer), "mine", 10)
    for _ in range(2):
        done = run(installed, tmp_path, "script.py", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_ledger(tmp_path / "mine")) == 10 and (tmp_path / "mine" / "report.html").is_file()
    verified = run(installed, tmp_path, "-m", "slimpajama_hf", "verify", "mine")
    assert verified.returncode == 0, verified.stdout + verified.stderr
