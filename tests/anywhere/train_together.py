"""train_together.py TEXTS RUN STEPS HOW WORKERS: the stock Trainer, in one process or several.

HOW: `dispatch` (accelerate: the first process reads), `shard` (accelerate: each keeps its share), `own` (the loader as
PyTorch makes it, the stream shares out).
"""

import os
import sys
from typing import Any

from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from slimpajama_hf import ExactStream, RunRecord

TEXTS, RUN, STEPS, HOW, WORKERS = sys.argv[1:]
world = int(os.environ.get("WORLD_SIZE", 1))
set_seed(1)
own: dict[str, Any] = {"rank": int(os.environ.get("RANK", 0)), "world_size": world} if HOW == "own" else {}
stream = ExactStream(TEXTS, "builtin", max_length=32, mode="pack", shuffle_buffer=8, **own)
# Each process draws its own dropout.
still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
config = GPT2Config(vocab_size=len(stream.tokenizer), n_layer=1, n_embd=32, n_head=2, n_positions=32, **still)
arguments = TrainingArguments(
    RUN,
    max_steps=int(STEPS),
    # The same samples a step, however many processes there are.
    per_device_train_batch_size=4 // world,
    gradient_accumulation_steps=2,
    save_steps=4,
    use_cpu=True,
    disable_tqdm=True,
    dataloader_num_workers=int(WORKERS),
    accelerator_config={"dispatch_batches": HOW == "dispatch", "split_batches": False},
)


class Unprepared(Trainer):
    """Its loader is PyTorch's."""

    def get_train_dataloader(self) -> DataLoader:
        size = arguments.per_device_train_batch_size
        return DataLoader(stream, batch_size=size, collate_fn=stream.collate, num_workers=int(WORKERS))


trainer = (Unprepared if HOW == "own" else Trainer)(
    GPT2LMHeadModel(config),
    arguments,
    train_dataset=stream,
    data_collator=stream.collate,
    callbacks=[RunRecord(RUN, stream, report=False)],
)
trainer.train(resume_from_checkpoint=RunRecord.newest(RUN))
