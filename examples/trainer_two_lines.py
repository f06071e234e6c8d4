"""Somebody's training script: GPT-2 on lines of JSON, by the stock Trainer.

python trainer_stock.py 'texts/*.jsonl' gpt2 runs/mine 1000
"""

import glob
import json
import sys

from slimpajama_hf import ExactStream, RunRecord
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

TEXTS, TOKENIZER, OUTPUT, STEPS = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
tokenizer.pad_token = tokenizer.eos_token


class Texts(IterableDataset):
    """The texts of all files, each cut to 64 tokens."""

    def __iter__(self):
        for path in sorted(glob.glob(TEXTS)):
            with open(path) as file:
                for line in file:
                    ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=64)["input_ids"]
                    yield {"input_ids": ids, "labels": ids}


set_seed(1)
config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=64, n_head=2, n_positions=64)
arguments = TrainingArguments(
    output_dir=OUTPUT,
    max_steps=int(STEPS),
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    save_steps=5,
)
trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Texts(), processing_class=tokenizer)
RunRecord(OUTPUT, ExactStream(TEXTS, tokenizer, max_length=64)).attach(trainer)
trainer.train(resume_from_checkpoint=get_last_checkpoint(OUTPUT))
