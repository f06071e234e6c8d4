"""Our own flags, with their defaults and their help. Imports nothing heavy, because `--help` reads this file alone.

The other flags are those of `transformers.TrainingArguments`. `TRAINING_DEFAULTS` lists those whose default we change
and those that `--help` shows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

#: Steps of the learning-rate test (`--lr_find`).
STEPS = 400


TXT_DOCUMENTS = ("line", "paragraph", "file")
SAMPLE_MODES = ("truncate", "window", "pack")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
BACKWARDS = ("auto", "autograd")
#: `--hidden_optim` -> the default of `--hidden_rate` (docs/recipe.md).
HIDDEN_RATES = {"muon": 0.2, "adamw": 0.1}
#: Vocabulary size of `--tokenizer corpus` (docs/recipe.md).
CORPUS_VOCABULARY = 8192


def corpus_vocabulary(tokenizer: str) -> int | None:
    """The vocabulary size that a tokenizer named `corpus:N` asks for; None for any other name. Raises ValueError if N
    is not a number."""
    kind, colon, size = tokenizer.partition(":")
    if kind != "corpus":
        return None
    if colon and not (size.isascii() and size.isdigit()):
        raise ValueError(f"--tokenizer {tokenizer}: expected corpus or corpus:N, a number of tokens, as corpus:8192")
    return int(size) if colon else CORPUS_VOCABULARY


def _knob(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class DataArguments:
    """The corpus, and how a document becomes a step"""

    dataset: str = _knob(
        "slimpajama",
        "slimpajama (its mirrors in turn), slimpajama_6b, embedded, a file, a folder, a 'glob', or any Hub dataset id",
    )
    dataset_config_name: str | None = _knob(None, "configuration of a Hub dataset that has several")
    dataset_revision: str | None = _knob(
        None, "branch, tag or commit of a Hub dataset; default: its main branch, pinned at the start"
    )
    dataset_split: str = _knob("train", "split of a Hub dataset")
    text_column: str = _knob("text", "column that holds the text")
    txt_documents: str = _knob(
        "line",
        "what one document of a .txt file is: line, paragraph (blank lines between), file",
        choices=TXT_DOCUMENTS,
    )
    sample_mode: str = _knob(
        "truncate",
        "truncate (a document's first tokens), window (all of it, window by window), pack (joined by EOS)",
        choices=SAMPLE_MODES,
    )
    max_seq_length: int = _knob(256, "tokens kept of a document")
    shuffle_buffer: int = _knob(0, "records shuffled together, block by block, drawn from --seed; 0: in order")
    epochs: int = _knob(1, "passes over the corpus at most")
    skip_broken_shards: bool = _knob(False, "leave out the rest of a shard that cannot be read, instead of stopping")
    leave_out: list[str] | None = _knob(  # noqa: RUF009 - its default is None
        None, "documents that are not trained on, each as shard#row (the command `rewind` writes it)"
    )
    stream_patience: float = _knob(600.0, "seconds to wait for a Hub that fails, before the run stops")
    eval_dataset: str | None = _knob(
        None,
        "held-out documents for --eval_steps; default: the corpus' own validation part, else --eval_fraction of it",
    )
    eval_fraction: float = _knob(
        0.01, "share of the documents held out for --eval_steps where there is no other held-out text; 0: none"
    )
    eval_documents: int = _knob(200, "held-out documents scored at each evaluation")

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise ValueError(f"--max_seq_length {self.max_seq_length}: a step needs at least 2 tokens; type 2 or more")
        if self.shuffle_buffer < 0:
            raise ValueError(f"--shuffle_buffer {self.shuffle_buffer}: expected a number of records, or 0 for none")
        if self.epochs < 1:
            raise ValueError(f"--epochs {self.epochs}: expected at least 1")
        if not self.stream_patience >= 0:
            raise ValueError(f"--stream_patience {self.stream_patience}: expected seconds, 0 or more")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction {self.eval_fraction}: expected a share below 1, as 0.01, or 0 for none")
        if self.eval_documents < 1:
            raise ValueError(f"--eval_documents {self.eval_documents}: expected at least 1")


@dataclass(frozen=True)
class ModelArguments:
    """The model and its tokenizer"""

    model: str = _knob("small", "tiny (5M, for a CPU), small (124M), medium (355M), or a config.json")
    config_overrides: str | None = _knob(None, "changes to that configuration, as n_layer=6,n_embd=384")
    tokenizer: str = _knob(
        "auto",
        "builtin, a folder, tokenizer.json, SentencePiece .model, Hub id, or corpus:8192 (that many tokens, trained on "
        "the corpus before step 0); auto: gpt2 for a Hub corpus, corpus:8192 for local files with 7 million "
        "characters, else builtin",
    )
    init_embeddings: str = _knob(
        "auto",
        "random, cooccurrence (tokens with like neighbours in the first documents begin alike); auto: cooccurrence "
        "with --tokenizer corpus:N, else random",
        choices=("auto", "random", "cooccurrence"),
    )
    precision: str = _knob(
        "auto",
        "auto (bfloat16 where the processor or GPU has it, float16 on older GPUs that have that, else float32), "
        "float32, bfloat16, float16",
        choices=PRECISIONS,
    )
    backward: str = _knob(
        "auto", "auto (GPT-2's forward and backward written out, faster; else autograd's), autograd", choices=BACKWARDS
    )
    reduce_dtype: str = _knob(
        "float32",
        "dtype in which gradients of several processes are summed: float32, bfloat16 (half the bytes on the wire)",
        choices=("float32", "bfloat16"),
    )
    beta2_half_life_tokens: float | None = _knob(
        None, "half-life of AdamW's second moment in tokens, instead of --adam_beta2 (a step counts --max_seq_length)"
    )
    hidden_optim: str = _knob(
        "muon",
        "muon (the matrices in the blocks learn by Muon, beside AdamW for the rest), adamw",
        choices=tuple(HIDDEN_RATES),
    )
    hidden_rate: float | None = _knob(
        None,
        "rate of those matrices as a share of --learning_rate; default: 0.2 for muon, 0.1 for adamw; 1: the same rate",
    )
    embedding_moment: str = _knob(
        "auto",
        "second moment of the embeddings: row (one a token), element (one a number, AdamW's own); auto: row with "
        "--hidden_optim muon",
        choices=("auto", "row", "element"),
    )
    average_weights: float = _knob(
        0.06, "half-life of an average of the weights that is saved too: steps, or below 1 a share of the run; 0: none"
    )

    def __post_init__(self) -> None:
        corpus_vocabulary(self.tokenizer)
        if not 0 <= self.average_weights < float("inf"):
            raise ValueError(
                f"--average_weights {self.average_weights}: expected a half-life in steps, a share of the run so far "
                "(below 1), or 0 for none"
            )
        half_life = self.beta2_half_life_tokens
        if half_life is not None and not 0 < half_life < float("inf"):
            raise ValueError(f"--beta2_half_life_tokens {half_life}: expected a number of tokens above 0")
        if self.hidden_rate is not None and not 0 < self.hidden_rate < float("inf"):
            raise ValueError(f"--hidden_rate {self.hidden_rate}: expected a share of the rate above 0, as 0.1")


@dataclass(frozen=True)
class RunArguments:
    """What is shown and kept"""

    viz_interval: int = _knob(
        50,
        "steps between charts; unless typed, the first at once, as many as fit in 5 % of the run; 0: none, no report",
    )
    display_samples: int = _knob(5, "steps between generated samples; unless typed, as many as fit in the 5 %; 0: none")
    no_checkpoint: bool = _knob(False, "save nothing but metrics")
    overwrite_output_dir: bool = _knob(False, "start anew in a folder that holds a run, deleting that run")
    allow_changes: str | None = _knob(None, "names of flags that a resume may change, as learning_rate,seed")
    gpu: int | None = _knob(None, "the only GPU to use; default: GPU 0 if there is one")
    hub_license: str | None = _knob(None, "licence on the card of a pushed run, as apache-2.0; default: none is stated")
    hub_patience: float = _knob(30.0, "seconds to wait, at the end of a run, for a Hub that fails")
    watch: bool = _knob(False, "serve the report on this machine while the run is on; the address is printed")
    lr_find: bool = _knob(
        False,
        "do not train: run 400 steps with a rate that rises from 1e-6 to 0.3, in a folder beside, and suggest a rate",
    )
    test: bool = _knob(
        False, "100 steps on the embedded corpus into runs/test-run, warm-up over 20 (configs/test.yaml)"
    )

    def __post_init__(self) -> None:
        for name in ("viz_interval", "display_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number of steps, or 0 for none")
        if not self.hub_patience >= 0:
            raise ValueError(f"--hub_patience {self.hub_patience}: expected seconds, 0 or more")


OURS = (DataArguments, ModelArguments, RunArguments)

#: Field of `transformers.TrainingArguments` -> our default, and its help (None: `--help` does not show it).
TRAINING_DEFAULTS: dict[str, tuple[Any, str | None]] = {
    "max_steps": (10_000, "optimizer steps; one document each"),
    "learning_rate": (1e-3, "the constant rate after warm-up"),
    "warmup_steps": (1000, "steps of linear warm-up; step s trains at lr * min(1, (s+1)/warmup)"),
    "output_dir": (None, "folder of the run; default: runs/<corpus>-<model>"),
    "save_steps": (2000, "steps between checkpoints"),
    "save_total_limit": (None, "checkpoints kept, the newest by step number; default: all"),
    "resume_from_checkpoint": (
        None,
        "true (go on if there is something to go on from, else start), a checkpoint folder, or a pushed run as me/run",
    ),
    "eval_steps": (None, "steps between evaluations on held-out documents; default: none"),
    "seed": (42, "for the initial weights and every other random draw"),
    "report_to": ("none", "tensorboard, trackio, wandb or others, as a,b: every row of the ledger goes there too"),
    "push_to_hub": (False, "push every checkpoint to the Hub, in the background (docs/hub.md)"),
    "hub_model_id": (None, "repository to push to, as owner/name; default: the name of the run's folder"),
    "hub_private_repo": (None, "if there is no repository yet, make a private one"),
    "hub_strategy": (
        "checkpoint",
        "checkpoint (the newest, with what resuming needs), every_save (the model alone), all_checkpoints, end",
    ),
    "per_device_train_batch_size": (1, None),
    "lr_scheduler_type": ("constant_with_warmup", None),
    "logging_strategy": ("no", None),
    # The ledger keeps every loss; the filter would show a NaN as 0.
    "logging_nan_inf_filter": (False, None),
    # The stream goes on at its cursor; the Trainer would read all earlier documents again (`Trainer._run_epoch`).
    "ignore_data_skip": (True, None),
    "remove_unused_columns": (False, None),
    "disable_tqdm": (True, None),
    "save_strategy": ("steps", None),
}

TRAINING_ARGUMENTS_PAGE = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"

#: Flags that only our commands write.
NOT_IN_HELP = {"leave_out"}

TRAINING_USAGE = "accelerate launch run_clm_slimpajama.py [--config FILE.yaml]... [--flag value]..."


def help_text(
    usage: str = TRAINING_USAGE,
    what: str = "Pre-train a GPT-2-style model on SlimPajama, one document per step.",
) -> str:
    """The short, grouped `--help` page of a program that takes the flags of training."""
    lines = [
        f"usage: {usage}",
        f"{what} Defaults < config files in order < flags.",
        "  --config FILE.yaml           flags written down; may be given several times (see configs/)",
        "  --help                       this page; of other commands: python -m slimpajama_hf --help; flags of "
        "train_slimpajama.py: docs/migrating.md",
    ]

    def add(name: str, default: Any, text: str) -> None:
        shown = "" if default is None or default is False or "default:" in text else f" [{default}]"
        lines.append(f"  --{name:<26} {text}{shown}")

    for group in OURS:
        lines += ["", f"{group.__doc__}:"]
        for knob in fields(group):
            if knob.name in NOT_IN_HELP:
                continue
            add(knob.name, knob.default, knob.metadata["help"])
    lines += ["", f"Training (fields of transformers.TrainingArguments; all are accepted: {TRAINING_ARGUMENTS_PAGE}):"]
    for name, (default, text) in TRAINING_DEFAULTS.items():
        if text is not None:
            add(name, default, text)
    return "\n".join(lines)


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return number
