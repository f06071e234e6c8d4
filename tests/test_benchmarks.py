"""The benchmarks make up ledgers; what they make up must be what a run writes."""

import json

import numpy as np

from benchmarks import growth, steps
from slimpajama_hf import charts, ledger


def test_the_columns_of_a_long_run_are_those_of_a_ledger():
    made = growth.columns(3000)
    assert set(made._store) == set(ledger.NUMBERS) | set(ledger.COUNTED)
    assert len(made) == 3000 and all(len(getattr(made, name)) == 3000 for name in made._store)
    assert np.isfinite(made.grad_square).sum() == 6 and np.isfinite(made.loss_after).sum() == 30
    assert len(charts.render(made, [], charts.Caption("growth", "synthetic rows", 3000))) > 100_000


def test_the_rows_behind_a_step_are_read_as_a_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(steps.rows(50)))
    columns = ledger.read_columns(path)
    assert len(columns) == 50 and columns.loss[0] == json.loads(path.read_text().splitlines()[0])["loss"]
