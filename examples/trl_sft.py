"""TRL's SFTTrainer on packed documents of the stream, which it takes as a `datasets.IterableDataset`.

python trl_sft.py 'texts/*.jsonl' runs/mine 1000
"""

import sys

from slimpajama_hf import ExactStream, RunRecord
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from trl import SFTConfig, SFTTrainer

TEXTS, OUTPUT, STEPS = sys.argv[1:]
set_seed(1)
stream = ExactStream(TEXTS, "builtin", max_length=64, mode="pack", labels=False)
config = GPT2Config(vocab_size=len(stream.tokenizer), n_layer=2, n_embd=64, n_head=2, n_positions=64)
arguments = SFTConfig(
    OUTPUT,
    max_steps=int(STEPS),
    per_device_train_batch_size=2,
    save_steps=5,
    max_length=64,
    bf16=False,
    dataset_kwargs={"skip_prepare_dataset": True},
)
trainer = SFTTrainer(
    GPT2LMHeadModel(config),
    arguments,
    train_dataset=stream.as_datasets(),
    processing_class=stream.tokenizer,
    callbacks=[RunRecord(OUTPUT, stream)],
)
trainer.train(resume_from_checkpoint=RunRecord.newest(OUTPUT))
