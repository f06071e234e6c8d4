"""Passports and fixed prompts, made by the real trainer: what they say, what they cost, what they leave alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slimpajama_hf.record import run_folder
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.samples import pieces
from slimpajama_hf.watching import budget, keeper, passports, prompts
from slimpajama_hf.watching.prompts import FixedPrompts
from tests.conftest import make_records, read_ledger, write_records
from tests.test_faults import make_trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_records(folder / "0.jsonl.zst", make_records(120, seed=5))
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained(corpus: Path, run: Path, encoder: Any, steps: int = 40, watched: bool = True, **options: Any) -> Any:
    """A trained trainer with both callbacks."""
    trainer = make_trainer(corpus, run, steps)
    if watched:
        sample = passports.SamplePassports(trainer, RunFolder(run), encoder, lambda: 0.0, options.get("interval", 10))
        prompts = FixedPrompts(trainer, RunFolder(run), encoder, lambda: 0.0, options.get("prompt_interval", 20))
        for callback in (sample, prompts):
            trainer.add_callback(callback)
        trainer.recorder.listeners.append(sample.on_row)
        trainer.watched = (sample, prompts)
    trainer.train()
    trainer.recorder.close()
    return trainer


@pytest.fixture(scope="module")
def run(corpus, encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "watched"
    trained(corpus, folder, encoder)
    return folder


def test_a_passport_says_what_the_ledger_says(run, encoder):
    rows = read_ledger(run)
    found = [entry for entry in lines(run / passports.PASSPORTS) if "before" in entry]
    assert [entry["step"] for entry in found] == [0, 1, 2, 3, 5, 8, 10, 13, 20, 21, 30, 34]
    for entry in found:
        row, ids = rows[entry["step"]], entry["input_ids"]
        assert len(ids) == row["tokens"] == len(entry["pieces"])
        assert "".join(entry["pieces"]) == encoder.decode(ids)
        assert len(entry["before"]) == len(entry["after"]) == len(ids) - 1
        assert sum(entry["before"]) / len(entry["before"]) == pytest.approx(row["loss"], abs=1e-3)
        right = sum(top[0] == came for top, came in zip(entry["top_ids"], ids[1:], strict=True))
        assert right / (len(ids) - 1) == pytest.approx(row["accuracy"])
        for top, chances, came, nats in zip(
            entry["top_ids"], entry["top_probs"], ids[1:], entry["before"], strict=True
        ):
            assert chances == sorted(chances, reverse=True)
            assert all(str(guess) in entry["guesses"] for guess in top)
            if came in top:
                assert math.exp(-nats) == pytest.approx(chances[top.index(came)], abs=2e-3)


def test_an_update_makes_its_own_document_less_surprising(run):
    found = [entry for entry in lines(run / passports.PASSPORTS) if "before" in entry]
    better = [sum(entry["after"]) < sum(entry["before"]) for entry in found]
    assert sum(better) >= 0.8 * len(better)


def test_looking_changes_nothing(corpus, encoder, run, tmp_path):
    trainer = trained(corpus, tmp_path / "alone", encoder, watched=False)
    clock = {"throughput", "step_seconds"}
    watched, alone = (
        [{k: v for k, v in row.items() if k not in clock} for row in read_ledger(folder)]
        for folder in (run, tmp_path / "alone")
    )
    assert watched == alone
    for name in ("model.safetensors", "rng_state.pth"):
        assert (run / "checkpoint-40" / name).read_bytes() == (tmp_path / "alone" / "checkpoint-40" / name).read_bytes()
    before = torch.get_rng_state()
    passports._log_probabilities(trainer.model, [1, 2, 3])
    assert torch.equal(before, torch.get_rng_state()) and trainer.model.training


def test_prompts_are_written_at_their_steps_and_at_the_end(run):
    found = lines(run / prompts.PROMPTS)
    # Every twentieth step, the first one after each checkpoint, and the end.
    assert [entry["step"] for entry in found] == [0, 10, 20, 30, 40]
    assert all([text["prompt"] for text in entry["texts"]] == list(prompts.FIXED_PROMPTS) for entry in found)


def test_it_is_cut_back_like_the_samples(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for name in (passports.PASSPORTS, prompts.PROMPTS):
        with open(copy / name, "ab") as file:
            file.write(b'{"step": 40, "torn')
    run_folder.cut_to(RunFolder(copy), RunFolder(copy), 20)
    for name in (passports.PASSPORTS, prompts.PROMPTS):
        kept = (run / name).read_bytes().splitlines(keepends=True)
        assert (copy / name).read_bytes() == b"".join(line for line in kept if json.loads(line)["step"] < 20)


@pytest.mark.slow
def test_without_an_interval_it_keeps_to_its_budget(corpus, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(passports, "PASSPORTS_AHEAD_SECONDS", 0.0)
    monkeypatch.setattr(prompts, "PROMPTS_AHEAD_SECONDS", 0.0)
    monkeypatch.setattr(keeper, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(budget, "PASSPORTS", 0.0)
    monkeypatch.setattr(budget, "PROMPTS", 0.0)
    trained(corpus, tmp_path / "run", encoder, interval=None, prompt_interval=None)
    assert [entry["step"] for entry in lines(tmp_path / "run" / passports.PASSPORTS) if "before" in entry] == [0]
    assert [entry["step"] for entry in lines(tmp_path / "run" / prompts.PROMPTS)] == [0, 40]


def test_a_failure_is_said_once_and_training_goes_on(corpus, encoder, tmp_path, capsys):
    trainer = make_trainer(corpus, tmp_path / "run", 12)
    callback = passports.SamplePassports(trainer, RunFolder(tmp_path / "run"), encoder, lambda: 0.0, 1)
    trainer.add_callback(callback)

    def broken(module: Any, arguments: Any, output: Any) -> None:
        if not module.training:
            raise RuntimeError("no room")

    trainer.model.lm_head.register_forward_hook(broken)
    trainer.train()
    assert trainer.model.training
    assert [line for line in capsys.readouterr().err.splitlines() if "passport" in line] == [
        "the passport of step 0 failed (RuntimeError: no room); training goes on"
    ]
    assert trainer.state.global_step == 12 and not (tmp_path / "run" / passports.PASSPORTS).exists()


@pytest.mark.slow
def test_unusual_documents_are_kept_with_their_score(corpus, encoder, tmp_path):
    trained(corpus, tmp_path / "run", encoder, steps=90)
    rows = read_ledger(tmp_path / "run")
    found = [entry for entry in lines(tmp_path / "run" / passports.PASSPORTS) if "unusual" in entry]
    assert found
    for entry in found:
        assert entry["step"] >= 50 and len(entry["input_ids"]) == rows[entry["step"]]["tokens"]
        assert "".join(entry["pieces"]) == encoder.decode(entry["input_ids"])
        before = sorted(row["loss"] for row in rows[: entry["step"]])
        assert (rows[entry["step"]]["loss"] > before[len(before) // 2]) == (entry["unusual"] > 0)


@pytest.mark.parametrize("text", ["Grüße, 世界! 👩‍👩‍👧 naïve", "שלום עולם", "a\n\tb  c", " leading"])
def test_pieces_are_the_text(encoder, text):
    ids = encoder.encode(text)[0]
    found = pieces.pieces(encoder, ids)
    assert "".join(found) == encoder.decode(ids) and len(found) == len(ids)


def test_the_beginning_is_dense():
    assert [step for step in range(100) if passports.is_early(step)] == [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    assert [step for step in range(4000) if budget.is_half_decade(step)] == [0, 10, 30, 100, 300, 1000, 3000]


def test_a_guess_beyond_the_vocabulary_has_its_number(encoder):
    """Embeddings that are padded have ids that the tokenizer does not know; before training they are guessed too."""
    beyond = len(encoder.tokenizer) + 7
    guesses = pieces.Guesses(encoder)
    assert guesses.text(beyond) == f"<{beyond}>"
    assert guesses.text(encoder.encode(" the")[0][0]) == " the"
    assert encoder.piece(beyond) == f"<{beyond}>" and encoder.piece(0) == "<unk>"
    assert pieces.pieces(encoder, [*encoder.encode("a dog")[0], beyond])[-1] == ""
