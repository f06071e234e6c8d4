"""`generate`: let a saved model write."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.settings.arguments import positive

HELP = "let a model write"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    parser.add_argument("checkpoint", help="a checkpoint-N, or a run folder (its newest one)")
    parser.add_argument("--prompt", required=True, help="the text that it continues")
    parser.add_argument("--new_tokens", type=positive, default=40, help="tokens to write, fewer at end of text [40]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token [0]")
    parser.add_argument("--seed", type=int, default=0, help="for the draws when the temperature is above 0 [0]")


def main(options: argparse.Namespace) -> int:
    from slimpajama_hf import screen
    from slimpajama_hf.record import checkpoints

    folder = checkpoints.resolve(options.checkpoint)
    screen.quiet_libraries()
    from slimpajama_hf.screen import Waiting

    with Waiting("loading the model"):
        text = from_checkpoint(folder, options.prompt, options.new_tokens, options.temperature, options.seed)
    sys.stdout.write(text + "\n")
    return 0


def from_checkpoint(folder: Path, prompt: str, new_tokens: int, temperature: float, seed: int) -> str:
    """Return the prompt and what the model of a checkpoint writes after it. Raises UserError for an empty prompt."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from slimpajama_hf.model import generation
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(str(folder)))
    prompt_ids, _ = encoder.encode(prompt)
    if not prompt_ids:
        raise UserError("--prompt: empty; expected the beginning of a text")
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False)
    if len(prompt_ids) + new_tokens > model.config.max_position_embeddings:
        raise UserError(
            f"--prompt and --new_tokens: {len(prompt_ids)} + {new_tokens} tokens, but the model has "
            f"{model.config.max_position_embeddings} positions; shorten one of them"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(seed)
    return encoder.decode(prompt_ids + generation.write_after(model, prompt_ids, new_tokens, temperature))
