"""Held-out scores: on demand, during training, and as running code length."""

from __future__ import annotations

import json
import math

import pytest
import torch

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.record import columns
from slimpajama_hf.training import evaluation
from tests.conftest import NANO_UNSEEN, make_records, make_text, run_command, run_script, write_records


def test_scores_equal_a_recomputation_by_domain(finished, tmp_path, encoder):
    from transformers import AutoModelForCausalLM

    path = write_records(tmp_path / "held_out.jsonl.gz", make_records(12, seed=50))
    done = run_command("evaluate", str(finished), "--dataset", str(path), "--max_seq_length", "100", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["checkpoint"].endswith("checkpoint-40")
    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint-40").eval()
    sums: dict[str, list[float]] = {}
    for document in opening.open_corpus(str(path)).records(Cursor()):
        ids, ends = encoder.encode(document.text)
        size = len(document.text[: ends[99]].encode()) if len(ids) > 100 else document.size
        ids = torch.tensor([ids[:100]])
        with torch.no_grad():
            out = model(input_ids=ids, labels=ids)
        predicted = ids.shape[1] - 1
        right = (out.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum().item()
        for domain in (document.domain, "all"):
            total = sums.setdefault(domain, [0, 0, 0, 0, 0])
            for place, value in enumerate((1, predicted, out.loss.item() * predicted, right, size)):
                total[place] += value
    assert set(result["scores"]) == set(sums)
    for domain, (samples, predicted, nats, right, size) in sums.items():
        scores = result["scores"][domain]
        assert (scores["samples"], scores["tokens"]) == (samples, predicted)
        assert scores["loss"] == pytest.approx(nats / predicted, abs=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(nats / predicted), rel=1e-5)
        assert scores["accuracy"] == pytest.approx(right / predicted, abs=1e-9)
        bits = (nats + samples * math.log(4096)) / math.log(2) / size
        assert scores["bits_per_byte"] == pytest.approx(bits, abs=1e-5)


@pytest.mark.long
def test_whole_texts_are_scored_in_windows_and_each_token_once(finished, tmp_path, encoder):
    """Tokens are predicted from half a window or more of what stands before them; a text that fits is one window."""
    from transformers import AutoModelForCausalLM

    records = [{"text": make_text(number, words)} for number, words in enumerate((20, 150, 400))]
    path = write_records(tmp_path / "held_out.jsonl.gz", records)
    asked = ("evaluate", str(finished), "--dataset", str(path), "--max_seq_length", "64")
    done = run_command(*asked, "--whole", "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["scores"]["all"]
    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint-40").eval()
    nats, size = 0.0, 0
    for record in records:
        ids, size = encoder.encode(record["text"])[0], size + len(record["text"].encode())
        nats += math.log(4096)
        for place in range(1, len(ids)):
            # Windows end at 64, 96, 128, ...; the last one ends with the text.
            end = min(len(ids), 64 if place < 64 else 64 + 32 * ((place - 64) // 32 + 1))
            before = torch.tensor([ids[max(0, end - 64) : place]])
            with torch.no_grad():
                nats -= torch.log_softmax(model(input_ids=before).logits[0, -1], -1)[ids[place]].item()
    assert scores["whole_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert scores["whole_bits_per_byte"] != pytest.approx(scores["bits_per_byte"], abs=1e-3)
    plain = run_command(*asked, "--whole")
    assert f"{scores['whole_bits_per_byte']:.4f}" in plain.stdout and "whole" in plain.stdout
    assert all(len(line) <= 80 for line in plain.stdout.splitlines()[1:])
    whole = run_command(*asked[:4], "--max_seq_length", "128", "--documents", "1", "--whole", "--json")
    short = json.loads(whole.stdout)["scores"]["all"]
    assert short["whole_bits_per_byte"] == pytest.approx(short["bits_per_byte"], abs=1e-9)
    assert "whole_bits_per_byte" not in run_command(*asked, "--json").stdout


def test_accuracy_is_an_evaluate_metric_that_needs_no_network():
    import evaluate

    metric = evaluation.next_token_accuracy()
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 4]) == {"accuracy": 0.75}
    metric.add_batch(predictions=[1, 2], references=[1, 0])
    assert metric.compute() == {"accuracy": 0.5}


@pytest.mark.long
def test_eval_steps_scores_the_held_out_part_of_the_embedded_corpus(tmp_path, cache):
    run = tmp_path / "run"
    done = run_script(
        "--test", *NANO_UNSEEN, "--max_steps", "6", "--eval_steps", "3", "--eval_documents", "15", "--output_dir", str(run),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [3, 6]
    assert all(entry["scores"]["all"]["samples"] == 15 for entry in entries)
    assert f"loss {entries[1]['scores']['all']['loss']:.4f}" in done.stderr
    again = run_command("evaluate", str(run), "--documents", "15", "--json")
    assert again.returncode == 0, again.stderr
    scores = json.loads(again.stdout)["scores"]
    assert scores["all"]["loss"] == pytest.approx(entries[1]["scores"]["all"]["loss"], abs=1e-5)
    assert set(scores) == {"all", *(domain for domain in scores if domain.startswith("Python"))}


def test_prequential_bits_per_byte_is_the_code_length_of_the_run(finished):
    rows = [json.loads(line) for line in (finished / "ledger.jsonl").read_text().splitlines()]
    nats = sum(row["loss"] * (row["tokens"] - 1) + math.log(4096) for row in rows)
    expected = nats / math.log(2) / sum(row["text_bytes"] for row in rows)
    assert columns.read_columns(finished / "ledger.jsonl").prequential_bits_per_byte() == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize(
    "words", [["evaluate", "nowhere"], ["generate", "nowhere", "--prompt", "x"], ["views", "nowhere"]]
)
def test_a_place_without_a_run_is_said_in_one_sentence(words):
    done = run_command(*words)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: nowhere: ")
    assert "Traceback" not in done.stderr
