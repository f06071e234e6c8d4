"""`--init_embeddings`: what a run begins with, and that it begins with the same whenever it begins again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slimpajama_hf.lookback import checks, side_by_side
from slimpajama_hf.record.columns import Reader
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.report import content
from tests.conftest import NANO_UNSEEN, ROOT, python, read_ledger, run_command, run_script

FILE = "initial_embeddings.safetensors"
WEIGHTS = "model.safetensors"


def flags(shards, run, *more):
    return [
        *NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--precision", "float32", "--max_steps", "12", "--save_steps",
        "6", "--warmup_steps", "4", "--init_embeddings", "cooccurrence", "--output_dir", str(run), *more,
    ]  # fmt: skip


def record(run):
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("counted") / "run"
    done = run_script(*flags(shards, run, "--learning_rate", "1e-30", "--average_weights", "0"))
    assert done.returncode == 0, done.stderr
    return run, done.stderr


def test_the_model_begins_with_them_and_it_is_said(whole):
    """At a rate of nothing the weights are still those of the start."""
    run, said = whole
    kept = load_file(run / FILE)
    found = record(run)["initial_embeddings"]
    assert found["from"] == "cooccurrence" and found["documents"] == 90
    assert f"embeddings made from {found['neighbours']:,} neighbours in the first 90 documents" in said
    assert "the weight of the last norm begins at 0.25 of what is usual" in said
    assert "documents scored before learned; neighbours in the first 90 were counted before)" in said
    saved = load_file(run / "checkpoint-12" / WEIGHTS)["transformer.wte.weight"]
    counted = kept["counted"]
    assert 100 < counted.sum() < len(counted)
    torch.testing.assert_close(saved[: len(counted)][counted], kept["rows"][counted].float())
    assert saved[: len(counted)][~counted].std().item() == pytest.approx(0.02, rel=0.1)
    norm = load_file(run / "checkpoint-12" / WEIGHTS)["transformer.ln_f.weight"]
    assert torch.allclose(norm, torch.full_like(norm, found["final_norm"])) and found["final_norm"] == 0.25
    meta, _ = content.gather(RunFolder(run), Reader(run / "ledger.jsonl"))
    assert any("were counted for the initial embeddings" in note for note in meta["notes"])


def test_a_tokenizer_of_the_corpus_has_them_by_itself_and_others_have_not(shards, tmp_path):
    own = tmp_path / "own"
    more = ["--tokenizer", "corpus:500", "--init_embeddings", "auto", "--max_steps", "2"]
    done = run_script(*flags(shards, own, *more))
    assert done.returncode == 0, done.stderr
    assert (own / FILE).is_file() and "embeddings made from" in done.stderr
    for number, more in enumerate(
        (["--init_embeddings", "auto"], ["--tokenizer", "corpus:500", "--init_embeddings", "random"])
    ):
        run = tmp_path / str(number)
        done = run_script(*flags(shards, run, *more, "--max_steps", "2"))
        assert done.returncode == 0 and not (run / FILE).exists(), done.stderr
        assert "initial_embeddings" not in record(run) and "embeddings made" not in done.stderr


@pytest.mark.long
def test_a_run_that_lost_its_checkpoints_and_a_replay_begin_with_the_same(shards, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert run_script(*flags(shards, run)).returncode == 0
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("checkpoint-*"))
    again = run_script("--output_dir", str(alone), "--resume_from_checkpoint", "true")
    assert again.returncode == 0 and "embeddings made" not in again.stderr, again.stderr
    assert side_by_side.compare(run, alone).ok
    assert record(alone)["initial_embeddings"] == record(run)["initial_embeddings"]
    assert checks.verify(run).ok
    replayed = run_command("verify", str(run), "--replay", "0:4")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    other = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--init_embeddings", "random")
    assert (
        other.returncode == 1 and "--init_embeddings random: this run has begun, with cooccurrence" in other.stderr
    ), other.stderr


@pytest.mark.long
@pytest.mark.parametrize("damaged", [False, True])
def test_an_older_run_begins_again_with_the_usual_last_norm(whole, tmp_path, damaged):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run, ignore=shutil.ignore_patterns("checkpoint-*"))
    found = record(run)
    del found["initial_embeddings"]["final_norm"]
    (run / "run.json").write_text(json.dumps(found))
    if damaged:
        (run / FILE).unlink()
    again = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true")
    assert again.returncode == 0 and "last norm" not in again.stderr, again.stderr
    norm = load_file(run / "checkpoint-12" / WEIGHTS)["transformer.ln_f.weight"]
    assert torch.allclose(norm, torch.ones_like(norm))


@pytest.mark.parametrize("told", [{"final_norm": "much"}, {"final_norm": 0}, {"final_norm": 1e30}, []])
def test_a_last_norm_that_is_none_is_one_sentence(whole, tmp_path, told):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run, ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / "run.json").write_text(json.dumps(record(run) | {"initial_embeddings": told}))
    again = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true")
    assert again.returncode == 1 and "initial_embeddings is damaged" in again.stderr, again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.long
def test_a_damaged_file_is_said_and_counted_anew(whole, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run, ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / FILE).write_bytes((run / FILE).read_bytes()[:1000])
    again = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true")
    assert again.returncode == 0 and "Traceback" not in again.stderr, again.stderr
    assert f"{run / FILE}: cannot be read" in again.stderr and "embeddings made from" in again.stderr
    assert (run / FILE).read_bytes() == (whole[0] / FILE).read_bytes()
    assert side_by_side.compare(run, whole[0]).ok


@pytest.mark.long
def test_two_processes_begin_with_those_of_one(whole, shards, tmp_path):
    run = tmp_path / "run"
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "run_clm_slimpajama.py"),
    ]
    done = python(*launcher, *flags(shards, run, "--max_steps", "3", "--backward", "autograd"))
    assert done.returncode == 0, done.stderr
    one, two = load_file(whole[0] / FILE), load_file(run / FILE)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.long
def test_what_was_counted_is_forgotten_from_the_very_start(shards, tmp_path):
    """Equal to a run that was told to leave the documents out: they are not counted either."""
    run, never, forgotten = (tmp_path / name for name in ("run", "never", "forgotten"))
    assert run_script(*flags(shards, run)).returncode == 0
    rows = read_ledger(run)
    names = [f"{rows[step]['shard']}#{rows[step]['row']}" for step in (8, 9)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    words = ["--documents", str(tmp_path / "list.txt"), "--output_dir", str(forgotten)]
    done = run_command("forget", str(run), *words)
    assert done.returncode == 0, done.stderr
    assert "2 of these documents were counted for the run's initial embeddings; these are made anew" in done.stdout
    left_out = run_script(*flags(shards, never, "--max_steps", "10", "--leave_out", *names))
    assert left_out.returncode == 0, left_out.stderr
    assert side_by_side.compare(forgotten, never).ok
    for name in (f"checkpoint-10/{WEIGHTS}", FILE):
        assert (forgotten / name).read_bytes() == (never / name).read_bytes(), name
    assert (forgotten / FILE).read_bytes() != (run / FILE).read_bytes()
    assert checks.verify(forgotten).ok
