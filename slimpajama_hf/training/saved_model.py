"""Adds what other programs need, besides what `transformers` writes, to the folder of a saved model.

Converters to other formats read `n_ctx` in config.json. Batches need a pad token, in the tokenizer and for `generate`.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from slimpajama_hf import files
from slimpajama_hf.samples import portable_tokenizer

_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"


@contextlib.contextmanager
def with_a_cache(config: Any) -> Iterator[None]:
    """Context in which a saved configuration says that the model uses a cache; training uses none."""
    cache, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = cache


def like(model: Any, weights: list[torch.Tensor]) -> Callable[[], Any]:
    """A function that makes a model like `model` with `weights`, in the order of its parameters, and with a cache for
    generation. It may be called in another thread while `model` trains."""
    config = copy.deepcopy(model.config)
    config.use_cache = True
    # Allocates no memory and draws nothing from the random generators of training.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        made = type(model)(config)
    names = [name for name, _ in model.named_parameters()]
    generation = copy.deepcopy(getattr(model, "generation_config", None))

    def filled() -> Any:
        made.load_state_dict(dict(zip(names, weights, strict=True)), strict=False, assign=True)
        made.tie_weights()
        if generation is not None:
            made.generation_config = generation
        return made

    return filled


def files_for(folder: Path) -> dict[str, bytes]:
    """Contents, by name, of files to be replaced in `folder`, a saved model with or without weights. Empty if all are
    as they should be."""
    config = _read(folder / _CONFIG)
    positions = config.get("n_positions") or config.get("max_position_embeddings")
    changed = portable_tokenizer.files_for(folder, positions)
    if "n_positions" in config and "n_ctx" not in config:
        changed[_CONFIG] = _written(config | {"n_ctx": positions})
    tokenizer = json.loads(changed[_TOKENIZER]) if _TOKENIZER in changed else _read(folder / _TOKENIZER)
    generation = _read(folder / _GENERATION)
    if generation and generation.get("pad_token_id") is None and tokenizer.get("pad_token") is not None:
        same = next((each for each in ("eos", "bos") if tokenizer.get(f"{each}_token") == tokenizer["pad_token"]), "")
        pad = generation.get(f"{same}_token_id")
        if isinstance(pad, int):
            changed[_GENERATION] = _written(generation | {"pad_token_id": pad})
    return changed


def complete(folder: Path) -> str | None:
    """Write these files. Returns why transformers 4 cannot load the tokenizer, in a few words; None if it can."""
    for name, content in files_for(folder).items():
        (folder / name).write_bytes(content)
    return portable_tokenizer.why_not_everywhere(_read(folder / _TOKENIZER))


def _read(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _written(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
