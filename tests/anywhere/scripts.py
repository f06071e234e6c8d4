"""The examples as the tests run them: each with its arguments, and what its checkpoints hold."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.anywhere.killed import rows_of
from tests.conftest import ROOT, python, read_ledger

EXAMPLES = ROOT / "examples"
KILLED = Path(__file__).parent / "killed.py"

#: Script -> its arguments (texts, tokenizer, run folder, steps).
SCRIPTS: dict[str, Callable[[str, str, str, int], list[str]]] = {
    "trainer_two_lines": lambda texts, tokenizer, run, steps: [texts, tokenizer, run, str(steps)],
    "run_clm_style": lambda texts, tokenizer, run, steps: [
        "--dataset", texts, "--output_dir", run, "--max_steps", str(steps), "--per_device_train_batch_size", "2",
        "--save_steps", "5", "--dataloader_num_workers", "2",
    ],
    "trl_sft": lambda texts, tokenizer, run, steps: [texts, run, str(steps)],
    "accelerate_loop": lambda texts, tokenizer, run, steps: [texts, run, str(steps)],
    "pytorch_loop": lambda texts, tokenizer, run, steps: [texts, run, str(steps)],
    "own_model": lambda texts, tokenizer, run, steps: [
        "--dataset", texts, "--tokenizer", tokenizer, "--output_dir", run, "--max_steps", str(steps), "--save_steps", "5",
        "--max_seq_length", "64", "--precision", "float32", "--average_weights", "0", "--resume_from_checkpoint", "true",
    ],
}  # fmt: skip


def is_there(name: str) -> bool:
    """Whether what an example needs is installed."""
    return name != "trl_sft" or importlib.util.find_spec("trl") is not None


def start(
    name: str, texts: str, tokenizer: Path, run: Path, steps: int, moment: str = "never"
) -> subprocess.CompletedProcess[str]:
    """One start of an example, killed at a moment."""
    arguments = SCRIPTS[name](texts, str(tokenizer), str(run), steps)
    return python(str(KILLED), str(run), moment, str(EXAMPLES / f"{name}.py"), *arguments)


def until_the_end(name: str, texts: str, tokenizer: Path, run: Path, steps: int, kills: int, seed: int) -> list[str]:
    """Start an example again and again until it is through, killed so often at moments drawn by `seed`; those moments."""
    draw, moments = random.Random(seed), []
    for _ in range(kills):
        saved = max((int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*")), default=0)
        moment = "staging" if draw.random() < 0.3 else f"rows:{min(saved + draw.randint(1, 8), steps - 1)}"
        if moment.startswith("rows") and rows_of(run) >= int(moment.partition(":")[2]):
            # Its ledger has these rows before it begins: it is cut back first, so that this kills it at its start.
            moment = f"rows:{rows_of(run)}"
        moments.append(moment)
        done = start(name, texts, tokenizer, run, steps, moment)
        assert done.returncode == -9, (moment, done.returncode, done.stderr[-3000:])
    done = start(name, texts, tokenizer, run, steps)
    assert done.returncode == 0, done.stderr[-3000:]
    return moments


def documents(run: Path) -> list[tuple[str, int, int, int]]:
    """(shard, row, first token, tokens) of all that a run has learned, in its order."""
    found = []
    for row in read_ledger(run):
        for sample in row["samples"] or [row]:
            for part in sample["documents"] or [sample | {"first_token": sample["part"]}]:
                found.append((part["shard"], part["row"], part["first_token"], part["tokens"]))
    return found


def weights(run: Path) -> dict[str, Any]:
    """The weights of the newest checkpoint of a run, whoever has saved it."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    if (newest / "state.pt").is_file():
        return torch.load(newest / "state.pt")["model"]
    return load_file(newest / "model.safetensors")


def write_tokenizer(folder: Path, files: list[Path]) -> Path:
    """A byte-level BPE of 600 tokens, as a folder that AutoTokenizer loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = (json.loads(line)["text"] for file in files for line in file.read_text().splitlines())
    end = "<|endoftext|>"
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=[end], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, bos_token=end).save_pretrained(str(folder))
    return folder
