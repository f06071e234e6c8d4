"""The flags of `train_slimpajama.py`, which this program replaces: what each is called now, or what to do instead.

`docs/migrating.md` shows the same table. Flags that kept their name (with hyphens or underscores) are not listed:
`--max-seq-length`, `--viz-interval`, `--display-samples`, `--no-checkpoint`, `--gpu`, `--test`, `--learning-rate`.
"""

from __future__ import annotations

#: Old flag -> new name. The old one still works. All names with underscores.
RENAMED = {"steps": "max_steps", "checkpoint_interval": "save_steps", "gpu_device": "gpu"}

#: Flag that is gone, with underscores -> what is said after "--flag is gone: ".
GONE = {
    "max_chunks": "a step is one document now, not a chunk of several; use --steps N",
    "tokens_per_chunk": "a step is one document's first --max_seq_length tokens; for how many steps, use --steps N",
    "batch_size": "a step is always one document; leave it out, or use --gradient_accumulation_steps N",
    "num_epochs": "a run has --max_steps N documents; for several passes over a small corpus use --epochs N",
    "initial_learning_rate": "use --learning_rate, the constant rate that is reached after --warmup_steps steps",
    "eval_interval": "use --eval_steps N, which scores held-out documents; without it there is no evaluation",
    "log_interval": "the bar shows every step and ledger.jsonl keeps every step; leave it out",
    "statistics_interval": "the summary and report.html have the statistics, ledger.jsonl every step; leave it out",
    "chunk_debug_interval": "ledger.jsonl names the document of every step; leave it out, and look at one step with "
    "python -m slimpajama_hf inspect RUN --step N",
    "verbose_logging": "the screen always says what is being done; leave it out",
    "verbose": "the screen always says what is being done; leave it out",
    "save_samples_every": "use --display_samples N, the steps between two samples",
    "save_checkpoint": "checkpoints are saved unless --no_checkpoint is given; leave it out",
    "checkpoint_dir": "checkpoints lie in the run's folder, as checkpoint-N; use --output_dir FOLDER",
    "log_dir": "everything that a run writes lies in its folder; use --output_dir FOLDER",
    "viz_dir": "charts lie in training_viz/ in the run's folder; use --output_dir FOLDER",
    "tokenizer_dir": "use --tokenizer with a folder, a tokenizer.json, a SentencePiece .model or a Hub id",
    "tokenizer_model": "use --tokenizer with the path of the SentencePiece .model",
    "vocab_size": "the tokenizer decides the vocabulary; choose one with --tokenizer, or pad the model's with "
    "--config_overrides vocab_size=N",
    "embedding_dim": "the model is a GPT-2; use --config_overrides n_embd=N",
    "temperature": "samples are written greedily, so that two runs can be compared; leave it out",
    "dataset_name": "use --dataset; without it documents come from SlimPajama",
    "streaming": "documents are always streamed; leave it out",
}


def refusal(flag: str) -> str:
    """The error message for a flag of `GONE`, spelled as in the old program."""
    return f"--{flag.replace('_', '-')} is gone: {GONE[flag]}"
