"""Reading held-out scores past what is no entry."""

import json
import math

import pytest
import torch

from slimpajama_hf.record import evaluations
from slimpajama_hf.training.evaluation import Scores, metrics_of, next_token_accuracy

SCORES = {"all": {"samples": 3, "tokens": 9, "loss": 2.0, "perplexity": 7.4, "accuracy": 0.5, "bits_per_byte": 1.0}}
ENTRY = {"step": 4, "corpus": "local", "scores": SCORES}


@pytest.mark.parametrize(
    "line",
    [
        "[" * 20_000, "3", "{}", '"x"', json.dumps(ENTRY)[:-1],
        *(json.dumps(ENTRY | changed) for changed in (
            {"step": None}, {"step": "4"}, {"corpus": []}, {"scores": []}, {"scores": {}}, {"scores": {"all": 3}},
            {"scores": {"all": SCORES["all"] | {"loss": "x"}}}, {"scores": SCORES | {"web": {"samples": 1}}},
            {"averaged": {"all": []}}, {"averaged": 1},
        )),
    ],
)  # fmt: skip
def test_what_is_no_entry_is_left_out(tmp_path, line):
    path = tmp_path / "evaluations.jsonl"
    last = ENTRY | {"step": 8, "averaged": SCORES}
    path.write_text("".join(f"{each}\n" for each in (json.dumps(ENTRY), line, json.dumps(last))))
    assert evaluations.read(path) == [ENTRY, last]
    assert evaluations.read(path, last_step=7) == [ENTRY]


def test_a_run_without_scores_has_none(tmp_path):
    assert evaluations.read(tmp_path / "evaluations.jsonl") == []


def test_a_loss_that_is_not_finite_is_none_and_not_a_number_for_trackers(tmp_path):
    ids = torch.tensor([1, 2])
    lost = Scores(samples=1, predicted=2, nats=math.nan, text_bytes=9, guesses=[ids], targets=[ids])
    found = lost.to_dict(next_token_accuracy())
    assert found["loss"] is found["bits_per_byte"] is found["perplexity"] is None and found["accuracy"] == 1.0
    path = tmp_path / "evaluations.jsonl"
    path.write_text(json.dumps(ENTRY | {"scores": {"all": found}}, allow_nan=False) + "\n")
    assert evaluations.read(path)[0]["scores"]["all"] == found
    assert math.isnan(metrics_of({"all": found})["eval_loss"])
