"""The last norm before the head, found in models of several makers."""

from __future__ import annotations

import pytest
import torch
import transformers

from slimpajama_hf.model import final_norm

LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 64,
}  # fmt: skip
GPT2 = {"n_layer": 1, "n_embd": 32, "n_head": 2}


def model(kind, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=100, bos_token_id=1, eos_token_id=2, **options)
    return transformers.AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPT2", GPT2),
        ("Llama", {**LLAMA, "tie_word_embeddings": True}),
        ("Qwen3", {**LLAMA, "tie_word_embeddings": True}),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1}),
    ],
)
def test_the_logits_of_a_fresh_model_become_smaller_by_the_factor(kind, options):
    network, untouched = model(kind, options), model(kind, options)
    assert final_norm.begin_at(network, 0.25) and network.training
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        smaller, usual = network.eval()(ids).logits, untouched.eval()(ids).logits
    torch.testing.assert_close(smaller, 0.25 * usual)
    changed = [
        name
        for (name, left), right in zip(network.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(left, right)
    ]
    assert (len(changed) == 1 and "norm" in changed[0]) or "ln_f" in changed[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPT2", {**GPT2, "tie_word_embeddings": False}),
        # Its norm multiplies by 1 + weight.
        ("Gemma", {**LLAMA, "tie_word_embeddings": True}),
        # Its last layer is a projection.
        ("OPT", {"hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}),
    ],
)  # fmt: skip
def test_any_other_model_stays_as_it_is(kind, options):
    network, untouched = model(kind, options), model(kind, options)
    assert not final_norm.begin_at(network, 0.25)
    assert all(
        torch.equal(left, right) for left, right in zip(network.parameters(), untouched.parameters(), strict=True)
    )
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in network.modules())
