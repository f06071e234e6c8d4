"""`python -m slimpajama_hf fork RUN --from N --a FLAGS --b FLAGS`: the same documents, two ways."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimpajama_hf import __main__
from slimpajama_hf.corpus.documents import Cursor, Document
from slimpajama_hf.corpus.opening import open_corpus
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import checks, fork
from slimpajama_hf.lookback.fork import Pair, difference_of
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.model import averaging
from slimpajama_hf.record import ledger
from slimpajama_hf.samples.tokenizer import load_tokenizer
from tests.conftest import read_ledger, run_command


def pairs(differences, domain="C4"):
    return [Pair(domain, 3.0 + each, 3.0) for each in differences]


# ---- what a difference says ----


def test_a_difference_is_found_where_it_is_and_not_where_it_is_not():
    draw = np.random.default_rng(0)
    noise = draw.normal(0.0, 0.1, (200, 1000))
    errors = [difference_of([pairs(row)]).error for row in noise[:40]]
    assert np.mean(errors) == pytest.approx(0.1 / math.sqrt(1000), rel=0.1)
    # Of 200 pairs of arms that are alike about one in twenty seems to differ by 2 standard errors.
    found = [difference_of([pairs(row)]).errors >= fork.CLEAR for row in noise]
    assert 2 <= sum(found) <= 22
    assert all(difference_of([pairs(row + 0.02)]).errors >= fork.CLEAR for row in noise[:40])


def test_what_hangs_together_from_document_to_document_makes_the_error_larger():
    draw = np.random.default_rng(1)
    slow = np.repeat(draw.normal(0.0, 0.1, 40), 25)
    assert difference_of([pairs(slow)]).error == pytest.approx(np.std(slow[::25], ddof=1) / math.sqrt(40))
    assert difference_of([pairs(slow)]).error > 4 * np.std(slow) / math.sqrt(1000)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.0] * 100, "a and b are the same, to the bit"),
        ([0.01, 0.03] * 100, "b is 0.0200 nats per token better, "),
        ([-0.01, -0.03] * 100, "a is 0.0200 nats per token better, "),
        (np.random.default_rng(2).normal(0.0, 0.1, 200), "within noise; if it stays so, about "),
        ([0.02] * 7, "7 documents are too few to say how sure that is"),
    ],
)
def test_the_verdict_is_a_sentence(differences, words):
    assert words in difference_of([pairs(differences)]).words("losses")


# ---- two arms ----


@pytest.fixture(scope="module")
def forked(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork")
    done = run_command(
        "fork", str(finished), "--from", "20", "--a", "", "--b", "--learning_rate 1e-2 --average_weights 0.5",
        "--documents", "12", "--score", "5", "--output_dir", str(folder), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


@pytest.mark.long
def test_both_arms_learn_the_same_documents_and_only_what_was_changed_is_other(finished, forked):
    found, folder = forked
    whole = read_ledger(finished)
    a, b = (read_ledger(folder / f"from-20-{name}") for name in "ab")
    assert [row["text_sha1"] for row in a] == [row["text_sha1"] for row in b] == [r["text_sha1"] for r in whole[:32]]
    # The arm without a change is the run itself.
    for mine, own in zip(a, whole, strict=False):
        assert {k: v for k, v in mine.items() if k not in ledger.TIME_FIELDS} == {
            k: v for k, v in own.items() if k not in ledger.TIME_FIELDS
        }
    assert b[:20] == whole[:20] and b[20]["learning_rate"] == pytest.approx(10 * whole[20]["learning_rate"])
    assert b[20]["loss"] == whole[20]["loss"] and b[21]["loss"] != whole[21]["loss"]
    difference = found["differences"]["each document before it is learned"]
    assert difference["documents"] == 12
    expected = np.mean([x["loss"] - y["loss"] for x, y in zip(a[20:], b[20:], strict=True)])
    assert difference["mean"] == pytest.approx(expected)
    assert sum(each["documents"] for each in difference["by_domain"].values()) == 12


@pytest.mark.long
def test_both_ends_are_scored_on_documents_that_neither_has_learned(finished, forked, shards):
    found, folder = forked
    texts = {each.sha1: each.text for each in open_corpus(f"{shards}/*.jsonl.zst").records(Cursor())
             if isinstance(each, Document)}  # fmt: skip
    following = [texts[row["text_sha1"]] for row in read_ledger(finished)[32:37]]
    length = Run(finished).record["model"]["max_seq_length"]
    for weights, inside in (("last", ""), ("averaged", averaging.FOLDER)):
        means = {}
        for name in "ab":
            end = folder / f"from-20-{name}" / "checkpoint-32"
            model, tokenizer = AutoModelForCausalLM.from_pretrained(str(end / inside)), load_tokenizer(str(end))
            samples = [torch.tensor([tokenizer.encode(text)[:length]]) for text in following]
            means[name] = np.mean([model(input_ids=ids, labels=ids).loss.item() for ids in samples])
        scored = found["differences"][f"the next 5 documents, {weights} weights"]
        assert scored["documents"] == 5
        assert scored["mean"] == pytest.approx(means["a"] - means["b"], abs=1e-4) and scored["mean"] != 0


@pytest.mark.long
def test_both_are_runs_of_their_own_that_hold(finished, forked):
    _, folder = forked
    for name, flags in (("a", ""), ("b", "--learning_rate 1e-2 --average_weights 0.5")):
        arm = folder / f"from-20-{name}"
        report = checks.verify(arm)
        assert report.ok, report.lines
        record = Run(arm).record
        assert record["forked_from"] == {
            "run": str(finished.resolve()), "run_id": Run(finished).record["run_id"], "step": 20, "flags": flags,
        }  # fmt: skip
        assert record["run_id"] != record["forked_from"]["run_id"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--b", "--seed 1"], "--b '--seed 1': --seed changes the documents or their tokens"),
        (["--a", "--dataset x", "--b", "--learning_rate 1"], "--a '--dataset x': --dataset changes the documents"),
        (["--b", "--hidden_optim adamw"], "--hidden_optim can change at the very start alone; use --from 0"),
        (["--b", "--output_dir x"], "--output_dir is the fork's own; leave it out"),
        (["--b", "--learning_rat 1"], "--learning_rat: no such flag; did you mean --learning_rate?"),
        (["--b", "--run_name 'x"], "expected flags of training"),
    ],
)
def test_what_would_leave_nothing_to_compare_is_refused_before_anything_is_trained(finished, tmp_path, flags, words):
    with pytest.raises(UsageError) as refused:
        __main__.main(["fork", str(finished), "--from", "20", *flags, "--output_dir", str(tmp_path / "arms")])
    assert words in str(refused.value)
    assert not (tmp_path / "arms").exists()


@pytest.mark.long
def test_a_checkpoint_that_is_not_there_and_a_folder_that_is_taken_are_refused(finished, forked, tmp_path):
    with pytest.raises(UserError, match=r"no whole checkpoint of that step; there are: 0, "):
        fork.fork(finished, 25, {"a": "", "b": ""}, 5, tmp_path)
    with pytest.raises(UserError, match="there is something in it already"):
        fork.fork(finished, 20, {"a": "", "b": ""}, 5, forked[1])
