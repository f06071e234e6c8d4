"""The loss of every token, kept: in step with the ledger, through failed writes and resumes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from slimpajama_hf.record import columns, surprisals
from slimpajama_hf.record.ledger import Kept
from slimpajama_hf.record.surprisals import Surprisals
from tests.conftest import NANO_UNSEEN, read_ledger, run_script


def test_each_step_has_the_surprisal_of_each_token_it_predicted(finished):
    rows = read_ledger(finished)
    places = surprisals.offsets(columns.read_columns(finished / "ledger.jsonl").predicted)
    assert (finished / surprisals.FILE_NAME).stat().st_size == 4 * places[-1]
    for row, first, last in zip(rows, places, places[1:], strict=False):
        nats = surprisals.read(finished / surprisals.FILE_NAME, first, last - first)
        assert len(nats) == row["tokens"] - 1
        assert nats.mean() == pytest.approx(row["loss"], abs=1e-5)


def test_the_values_are_the_models_own(finished, shards, encoder):
    from tests.test_run import load, text_of

    row = read_ledger(finished)[20]
    ids = torch.tensor(encoder.encode(text_of(shards, row))[0][:256])
    with torch.no_grad():
        logits = load(finished / "checkpoint-20")(input_ids=ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
    places = surprisals.offsets(columns.read_columns(finished / "ledger.jsonl").predicted)
    found = surprisals.read(finished / surprisals.FILE_NAME, places[20], len(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_step_is_written_again_at_its_place_until_it_is_advanced(tmp_path):
    path = tmp_path / "surprisals.f32"
    file = Surprisals(path)
    file.write(np.array([1.0, 2.0]))
    file.write(np.array([3.0, np.nan]))
    file.advance(2)
    file.write(np.array([1e9]))
    file.advance(1)
    file.close()
    assert surprisals.read(path, 0, 4).tolist()[::2] == [3.0, 1e9]
    assert np.isnan(surprisals.read(path, 0, 4)[[1, 3]]).all()


@pytest.mark.parametrize("before", [b"", b"\0" * 6, b"\0" * 12, b"\0" * 80])
def test_cutting_back_leaves_exactly_what_the_ledger_predicted(tmp_path, before):
    path = tmp_path / "surprisals.f32"
    if before:
        path.write_bytes(before)
    of_two_steps = Kept(predicted=np.array([2, 3]), losses=np.zeros(2))
    # Of a step that is half there the mean is not known: it is named.
    half = {1: [0], 3: [1]}.get(len(before) // 4, [])
    assert surprisals.cut_back(path, of_two_steps) == half
    found = surprisals.read(path, 0, 5)
    assert path.stat().st_size == 20
    whole = {1: 0, 3: 2}.get(len(before) // 4, min(len(before) // 4, 5))
    assert (found[:whole] == 0).all() and np.isnan(found[whole:]).all()
    surprisals.cut_back(path, Kept())
    assert path.stat().st_size == 0


@pytest.mark.slow
def test_values_that_do_not_have_the_loss_as_their_mean_become_unknown(tmp_path):
    path = tmp_path / "surprisals.f32"
    draw = np.random.default_rng(0)
    predicted = draw.integers(0, 9, 10_000)
    values = draw.exponential(5, predicted.sum()).astype(np.float32)
    begins = surprisals.offsets(predicted)
    losses = np.array([values[a:b].mean() if b > a else np.nan for a, b in itertools.pairwise(begins)])
    damaged = [step for step in (0, 17, 4095, 4096, 9_998) if predicted[step]]
    for step in damaged:
        values[begins[step]] += 1.0
    unknown = next(step for step in range(100, 200) if predicted[step])
    values[begins[unknown] : begins[unknown + 1]] = np.nan
    path.write_bytes(values.tobytes())
    assert surprisals.cut_back(path, Kept(predicted=predicted, losses=losses)) == damaged
    found = surprisals.read(path, 0, len(values))
    changed = np.isnan(found) & ~np.isnan(values)
    assert set(np.searchsorted(begins, np.flatnonzero(changed), side="right") - 1) == set(damaged)
    assert (found[~changed] == values[~changed])[~np.isnan(values[~changed])].all()


@pytest.mark.slow
def test_an_old_run_without_the_file_goes_on_with_one(shards, tmp_path):
    run = tmp_path / "run"
    flags = [*NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--save_steps", "4", "--output_dir", str(run)]
    assert run_script(*flags, "--max_steps", "4").returncode == 0
    (run / surprisals.FILE_NAME).unlink()
    done = run_script(*flags, "--max_steps", "8", "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr
    rows = read_ledger(run)
    places = surprisals.offsets(np.array([row["tokens"] - 1 for row in rows]))
    assert np.isnan(surprisals.read(run / surprisals.FILE_NAME, 0, places[4])).all()
    for step in range(4, 8):
        nats = surprisals.read(run / surprisals.FILE_NAME, places[step], places[step + 1] - places[step])
        assert nats.mean() == pytest.approx(rows[step]["loss"], abs=1e-5)
