"""Which arguments decide the numbers of a run, and which of those a resume may not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: A resume that changes one of these is refused unless `--allow_changes` names it.
WHAT_MATTERS = (
    "dataset", "dataset_config_name", "dataset_revision", "dataset_split", "text_column", "sample_mode",
    "max_seq_length", "shuffle_buffer", "leave_out", "model", "config_overrides", "tokenizer", "precision",
    "learning_rate", "warmup_steps", "seed", "backward", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "optim", "gradient_accumulation_steps", "hidden_optim", "hidden_rate", "embedding_moment",
    "txt_documents", "eval_fraction", "init_embeddings",
)  # fmt: skip

_MAY_BE_PATHS = ("dataset", "tokenizer", "model")

#: These decide the numbers of a run too, but a resume may change them.
ALSO_DECIDES = (
    "epochs", "skip_broken_shards", "beta2_half_life_tokens", "average_weights", "max_steps", "neftune_noise_alpha",
    "optim_args", "optim_target_modules", "tf32", "full_determinism", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "ddp_bucket_cap_mb",
    "ddp_static_graph", "reduce_dtype",
)  # fmt: skip


def what_decides(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that its numbers depend on. Left out are where it pushes, reports, writes or
    reads held-out text, intervals, limits and tokens."""
    return {name: value for name, value in config.items() if name in WHAT_MATTERS + ALSO_DECIDES}


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a run's numbers. It shows whether a configuration was changed. Names of corpus, tokenizer
    and model are left out: they may be paths, which differ elsewhere, and `run.json` records what was in them."""
    decides = {name: value for name, value in what_decides(config).items() if name not in _MAY_BE_PATHS}
    values = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(values.encode("utf-8", "surrogatepass")).hexdigest()
