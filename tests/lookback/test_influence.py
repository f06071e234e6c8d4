"""`python -m slimpajama_hf influence RUN --text T`: gradients choose documents, training without them says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from slimpajama_hf import __main__
from slimpajama_hf.errors import UserError
from slimpajama_hf.model import influence_estimate
from slimpajama_hf.model.optimization import hidden_matrices, token_embeddings
from slimpajama_hf.samples.tokenizer import load_tokenizer
from slimpajama_hf.settings.update_rules import UpdateRules
from tests.conftest import read_ledger, run_command

TEXT = "The function returns the number of items in a list, and nothing else."


def network():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def ids(seed, count=12):
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def loss_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), labels=torch.tensor([tokens])).loss.double().item()


@pytest.mark.parametrize(
    "rules",
    [UpdateRules("adamw", 0.2, "element"), UpdateRules("muon", 0.2, "element"), UpdateRules("muon", 0.2, "row")],
    ids=["adamw", "muon", "muon, embeddings by row"],
)
def test_an_estimate_is_the_first_order_of_what_an_update_does(rules):
    """One document alone: P is made of its own gradient, so its update is known."""
    model, text, document = network(), ids(1), ids(2)
    (found,) = influence_estimate.estimate(model, text, [document], rules, 0.0)
    tokens = torch.tensor([document])
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(input_ids=tokens, labels=tokens).loss, parameters)
    by_muon = {id(each) for each in hidden_matrices(model)} if rules.by_muon else set()
    by_row = {id(each) for each in token_embeddings(model)} if rules.by_row else set()
    small, before = 1e-4, loss_of(model, text)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if id(parameter) in by_muon:
                u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
                values = s / (s**2 + 1e-3 * s.max() ** 2 + 1e-20).sqrt()
                update = u @ torch.diag(values) @ vh * 0.2 * influence_estimate.UPDATE_RMS * max(parameter.shape) ** 0.5
            elif id(parameter) in by_row:
                rows = gradient.square().mean(1, keepdim=True)
                update = gradient / ((rows**0.75 * rows.mean() ** 0.25).sqrt() + 1e-8)
            else:
                update = gradient / (gradient.abs() + 1e-8)
            parameter -= small * update
    assert found == pytest.approx((before - loss_of(model, text)) / small, rel=0.05)


def test_the_text_itself_helps_most_and_the_order_of_documents_does_not_matter():
    model, text = network(), ids(1)
    documents = [ids(seed) for seed in range(2, 8)]
    found = influence_estimate.estimate(model, text, [*documents, text], UpdateRules(), 1.0)
    assert max(found) == found[-1] > 0
    again = influence_estimate.estimate(model, text, [text, *documents], UpdateRules(), 1.0)
    assert [*again[1:], again[0]] == pytest.approx(found, rel=1e-3)


@pytest.mark.slow
def test_documents_are_left_out_one_by_one_and_the_run_itself_comes_out_as_it_was(finished):
    done = run_command("influence", str(finished), "--text", TEXT, "--step", "40", "--documents", "6", "--drops", "1",
                       "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(str(finished / "checkpoint-40"))
    tokens = load_tokenizer(str(finished / "checkpoint-40")).encode(TEXT)
    assert found["loss"] == pytest.approx(loss_of(model, tokens), abs=1e-6)
    rows = read_ledger(finished)[34:40]
    assert [each["document"] for each in found["documents"]] == [f"{row['shard']}#{row['row']}" for row in rows]
    tried = [each for each in found["documents"] if each["effect"] is not None]
    assert len(tried) == 4 and sum(each["control"] for each in tried) == 3
    assert all(each["effect"] != 0 for each in tried)
    largest = max(found["documents"], key=lambda each: abs(each["estimate"]))
    assert largest["effect"] is not None and not largest["control"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--step", "99"], "--step 99: .* has 40 steps; name one from 1 to 40")],
)
def test_a_step_that_is_not_there_is_a_sentence(finished, flags, words):
    with pytest.raises(UserError, match=words):
        __main__.main(["influence", str(finished), "--text", TEXT, *flags])
