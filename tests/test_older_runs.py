"""A run folder made at commit 0be3827 goes on, verifies, reports and inspects: what is begun is not orphaned."""

from __future__ import annotations

import json
import math
import platform
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import read_ledger, run_command, run_script

ARCHIVE = Path(__file__).parent / "run_of_0be3827.tar.xz"


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """The folder of the run, unpacked, with the paths of this machine."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for name in ("run.json", "run_config.yaml"):
        path = folder / "run" / name
        path.write_text(path.read_text().replace("FOLDER", str(folder)))
    return folder


def same_processor() -> bool:
    """Whether sums come out as on the machine that made the run: elsewhere they are rounded otherwise."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    return platform.machine() == "x86_64" and "AuthenticAMD" in text and "avx512f" not in text


def test_it_goes_on_as_if_it_had_never_stopped(older):
    run = older / "run"
    on = ["--output_dir", str(run), "--resume_from_checkpoint", "true"]
    # It has no mark that says whose it is: what it reads is named once more.
    refused = run_script(*on)
    assert refused.returncode == 1 and "--dataset" in refused.stderr
    more = run_script(*on, "--dataset", str(older / "corpus.jsonl"))
    assert more.returncode == 0, more.stderr
    assert "resumed" in more.stderr and "at step 120" in more.stderr and "Traceback" not in more.stderr
    rows, expected = read_ledger(run), [json.loads(line) for line in (older / "expected/ledger.jsonl").open()]
    assert len(rows) == len(expected) == 140
    weights, wanted = (
        load_file(folder / "model.safetensors") for folder in (run / "checkpoint-140", older / "expected")
    )
    for row, old in zip(rows, expected, strict=True):
        drop = {"throughput", "step_seconds", "chain"}
        if same_processor():
            assert {k: v for k, v in row.items() if k not in drop} == {k: v for k, v in old.items() if k not in drop}
        assert (row["text_sha1"], row["shard"], row["row"], row["tokens"]) == tuple(
            old[name] for name in ("text_sha1", "shard", "row", "tokens")
        )
        assert math.isclose(row["loss"], old["loss"], rel_tol=1e-4)
    assert weights.keys() == wanted.keys()
    for name, values in weights.items():
        assert (values - wanted[name]).abs().max() <= (0 if same_processor() else 1e-3), name
    record = json.loads((run / "run.json").read_text())
    assert record["model"]["computed_in"] == "float32"


def test_it_verifies_reports_and_inspects(older):
    run = older / "run"
    for words in (["verify", str(run)], ["report", str(run)], ["inspect", str(run), "--step", "60"]):
        done = run_command(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
    assert (run / "report.html").stat().st_size > 100_000
