"""The environments of the clients: each with its own packages, over the torch that is here already."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

#: Name -> what is installed there. Without a version: the newest.
ENVIRONMENTS: dict[str, list[str]] = {
    "transformers4": ["transformers==4.57.6"],
    "transformers5": ["transformers>=5,<6"],
    "gguf": ["gguf", "xllamacpp"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "harness": ["lm_eval", "peft", "trl", "torchdata"],
    "tables": ["duckdb", "polars"],
    "trackio": ["trackio", "tensorboard"],
    "hf": ["huggingface_hub"],
    "litdata": ["litdata==0.2.76", "polars"],
}


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of an environment, which is made where it is not there or had other packages."""
    place, packages = folder / name, ENVIRONMENTS[name]
    python, stamp = place / "bin" / "python", place / ".installed"
    if stamp.is_file() and stamp.read_text() == " ".join(packages):
        return python
    sys.stderr.write(f"installing {', '.join(packages)} into {place}\n")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # Whatever is not installed there is found here. torch is pinned: it is gigabytes.
    (Path(own) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (place / "constraints.txt").write_text(f"torch=={version('torch').partition('+')[0]}\n")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    # pip says of packages here that they would like others beside them: they are not used there.
    subprocess.run([python, *pip, "--constraint", place / "constraints.txt", *packages], check=True)
    stamp.write_text(" ".join(packages))
    return python
