"""Generates text with the model, after the beginning of a document or after a prompt."""

from __future__ import annotations

from typing import Any

import torch

from slimpajama_hf.model import gpt2_writing
from slimpajama_hf.model.gpt2_likeness import unlike_gpt2

#: Tokens of the document that the model gets as its prompt, and tokens that it generates.
PROMPT_TOKENS = 10
NEW_TOKENS = 40


def write_after(model: Any, prompt_ids: list[int], new_tokens: int = NEW_TOKENS, temperature: float = 0.0) -> list[int]:
    """The tokens that the model generates after `prompt_ids`: at most `new_tokens`, fewer if EOS comes.

    At temperature 0 it decodes greedily and draws no random number. The model generates in evaluation mode and is in
    its former mode afterwards.
    """
    if temperature <= 0 and unlike_gpt2(model) is None:
        return gpt2_writing.write_greedily(model, prompt_ids, new_tokens)
    training = model.training
    model.eval()
    draw = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    try:
        with torch.no_grad():
            ids = torch.tensor([prompt_ids], device=model.device)  # (1, P)
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                use_cache=True,
                pad_token_id=model.config.eos_token_id,
                **draw,
            )  # (1, P + N)
    finally:
        model.train(training)
    return written[0, len(prompt_ids) :].tolist()
