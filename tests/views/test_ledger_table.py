"""The ledger as a Parquet table, as programs read it that know nothing of this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from slimpajama_hf.record import ledger
from tests.conftest import read_ledger, run_command


@pytest.fixture
def late(finished: Path, tmp_path: Path) -> Path:
    """The finished run's ledger, whose last row alone has what is null or empty in all before it."""
    run = tmp_path / "late"
    run.mkdir()
    shutil.copyfile(finished / "run.json", run / "run.json")
    rows = read_ledger(finished)
    document = {"shard": "a", "row": 3, "text_sha1": "00", "first_token": 0, "tokens": 5}
    sample = {"rank": 1, "shard": "b", "row": 4, "text_sha1": "11", "domain": "d", "part": 0, "tokens": 5,
              "text_bytes": 9, "tokens_cut": 0, "loss": 1.5, "accuracy": 0.25, "documents": [document]}  # fmt: skip
    rows[-1] |= {
        "spike": 7.5, "skipped": {"no text": 2}, "gaps": [{"shard": "c", "row": 9, "reason": "gone"}], "grad_square": 4.0,
        "grad_layers": {"h.0": [1.0, 0.5]}, "documents": [document], "samples": [sample], "loss": None, "my_number": 3,
    }  # fmt: skip
    (run / "ledger.jsonl").write_text("".join(ledger.encode(row) + "\n" for row in rows) + '{"step":40,"lo')
    return run


def test_columns_that_are_null_at_first_have_their_types(late):
    done = run_command("export", str(late), "--to", "parquet")
    assert done.returncode == 0, done.stderr
    assert "40 steps" in done.stdout and "half written" in done.stdout
    table = parquet.read_table(late / "ledger.parquet")
    rows = [json.loads(line) for line in (late / "ledger.jsonl").read_text().splitlines()[:-1]]
    assert table.num_rows == 40 and not [field for field in table.schema if pyarrow.types.is_null(field.type)]
    for name in ("step", "loss", "shard", "row", "text_sha1", "domain", "tokens_cut_exact", "chain", "spike"):
        assert table[name].to_pylist() == [row[name] for row in rows], name
    last = table.slice(39).to_pylist()[0]
    assert table.schema.field("spike").type == pyarrow.float64() and last["spike"] == 7.5 and last["loss"] is None
    assert last["skipped"] == [{"reason": "no text", "records": 2}] and last["my_number"] == 3.0
    assert last["gaps"] == rows[-1]["gaps"] and last["documents"] == rows[-1]["documents"]
    assert last["samples"] == rows[-1]["samples"]
    assert last["grad_layers"] == [{"layer": "h.0", "grad_square": 1.0, "grad_agreement": 0.5}]
    run_id = json.loads((late / "run.json").read_text())["run_id"]
    assert json.loads(table.schema.metadata[b"slimpajama_hf"])["run_id"] == run_id


def test_load_dataset_reads_it(late, tmp_path):
    assert run_command("export", str(late), "--to", "parquet", "--output", str(tmp_path / "t.parquet")).returncode == 0
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(tmp_path / "t.parquet"), split="train", cache_dir=str(tmp_path))
    assert len(rows) == 40 and rows[39]["samples"][0]["documents"][0]["row"] == 3 and rows[0]["spike"] is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "ledger.jsonl").unlink(), "there is no ledger"),
        (lambda run: (run / "run.json").unlink(), "no run.json in it"),
        (lambda run: (run / "ledger.jsonl").write_text('{"step":0}\n'), "step 0: fields are missing"),
        (lambda run: (run / "ledger.parquet").mkdir(), "ledger.parquet"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(late, spoil, said):
    spoil(late)
    done = run_command("export", str(late), "--to", "parquet")
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(late.glob("*.partial"))
