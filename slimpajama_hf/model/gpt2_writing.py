"""Greedy generation with GPT-2, one token after the other, written out like its step (`gpt2_step.py`).

`generate` with a small model spends half of its time outside products: modules, masks, cache objects and checks cost
something at every token. Here little but reading the weights costs time: 40 tokens took half the time with the tiny
model and four fifths with the 124M model (2 CPU cores). The tokens are those of `generate` with `do_sample=False`
(tests/model/test_gpt2_writing.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


@torch.no_grad()
def write_greedily(model: Any, prompt_ids: list[int], new_tokens: int) -> list[int]:
    """The likeliest tokens after `prompt_ids`: at most `new_tokens`, fewer if EOS comes, which is then the last.

    `model`: one for which `gpt2_likeness.unlike_gpt2` returns None.
    """
    transformer, config = model.transformer, model.config
    heads, width, epsilon = config.num_attention_heads, config.hidden_size, config.layer_norm_epsilon
    longest = len(prompt_ids) + new_tokens
    words, places, head = transformer.wte.weight, transformer.wpe.weight, model.lm_head.weight.t()
    end = transformer.ln_f.weight, transformer.ln_f.bias
    # Read once: an attribute of a module costs as much as a small product.
    blocks = [
        (
            [p for module in (block.ln_1, block.attn.c_attn, block.attn.c_proj) for p in (module.weight, module.bias)],
            [p for module in (block.ln_2, block.mlp.c_fc, block.mlp.c_proj) for p in (module.weight, module.bias)],
            block.attn.scaling,
            words.new_empty(2, heads, longest, width // heads),  # keys and values so far, (2, H, longest, d)
        )
        for block in transformer.h
    ]

    def likeliest(ids: torch.Tensor, seen: int) -> torch.Tensor:
        """The token after `ids` (t,), (1,); `seen`: how many tokens before `ids` are cached."""
        t = ids.shape[0]
        x = torch.embedding(words, ids) + places[seen : seen + t]  # (t, D)
        for attention, mlp, scaling, kept in blocks:
            ln_1, ln_1_b, w_qkv, b_qkv, w_out, b_out = attention
            ln_2, ln_2_b, w_fc, b_fc, w_proj, b_proj = mlp
            normed = torch.layer_norm(x, (width,), ln_1, ln_1_b, epsilon)
            qkv = torch.addmm(b_qkv, normed, w_qkv).view(t, 3, heads, -1).permute(1, 2, 0, 3)  # (3, H, t, d)
            kept[:, :, seen : seen + t] = qkv[1:]
            keys, values = kept[:, :, : seen + t]
            scores = torch.bmm(qkv[0], keys.transpose(1, 2)).mul_(scaling)  # (H, t, seen + t)
            if t > 1:
                # The prompt, in the first call: a causal mask.
                scores += torch.full((t, t), -math.inf, device=x.device).triu_(1)
            attended = torch.bmm(torch.softmax(scores, -1), values)  # (H, t, d)
            x = torch.addmm(b_out, attended.transpose(0, 1).reshape(t, width), w_out).add_(x)
            normed = torch.layer_norm(x, (width,), ln_2, ln_2_b, epsilon)
            active = F.gelu(torch.addmm(b_fc, normed, w_fc), approximate="tanh")  # (t, 4D)
            x = torch.addmm(b_proj, active, w_proj).add_(x)
        return torch.mm(torch.layer_norm(x[-1:], (width,), *end, epsilon), head).argmax(-1)

    ids, seen = torch.tensor(prompt_ids, device=words.device), 0
    written: list[int] = []
    while len(written) < new_tokens:
        following = likeliest(ids, seen)
        seen += ids.shape[0]
        ids = following
        written.append(int(following))
        if written[-1] == config.eos_token_id:
            break
    return written
