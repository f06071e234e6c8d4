"""What is written token by token is what `generate` writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from slimpajama_hf.model import generation, gpt2_writing
from slimpajama_hf.model.gpt2_likeness import unlike_gpt2


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    """A model whose weights are large enough to write more than one token over and over."""
    set_seed(7)
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes), bos_token_id=0, eos_token_id=96))


def generated(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    model.eval()
    ids = torch.tensor([prompt])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                             pad_token_id=96)  # fmt: skip
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_function": "gelu_pytorch_tanh"}, {"tie_word_embeddings": False}, {"n_head": 1},
     {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"resid_pdrop": 0.5}],
)  # fmt: skip
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
def test_it_writes_what_generate_writes(changes, prompt):
    model = gpt2(**changes)
    assert unlike_gpt2(model) is None
    written = gpt2_writing.write_greedily(model, prompt, 40)
    assert written == generated(model, prompt, 40)
    assert len(set(written)) > 3, "a test of one token says little"


def test_it_ends_with_the_end_of_text():
    model = gpt2()
    written = gpt2_writing.write_greedily(model, [1, 2, 3], 40)
    model.config.eos_token_id = model.generation_config.eos_token_id = written[7]
    first = written.index(written[7])
    assert gpt2_writing.write_greedily(model, [1, 2, 3], 40) == written[: first + 1] == generated(model, [1, 2, 3], 40)


def test_what_it_cannot_write_is_generated():
    model = gpt2(activation_function="relu")
    assert unlike_gpt2(model) == "its activation is relu"
    assert generation.write_after(model, [1, 2, 3], 20) == generated(model, [1, 2, 3], 20)


def test_the_mode_of_the_model_and_random_numbers_are_left_alone():
    model = gpt2(resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    generation.write_after(model, [1, 2, 3], 10)
    assert model.training and torch.equal(before, torch.get_rng_state())
