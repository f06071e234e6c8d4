"""As `run_clm.py` does it: flags of TrainingArguments, batches, and a collator of transformers.

python run_clm_style.py --output_dir runs/mine --max_steps 1000 --per_device_train_batch_size 8 --save_steps 100
"""

from dataclasses import dataclass

from slimpajama_hf import ExactStream, RunRecord
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class Data:
    dataset: str = "slimpajama"
    tokenizer: str = "builtin"
    block_size: int = 64


data, arguments = HfArgumentParser((Data, TrainingArguments)).parse_args_into_dataclasses()
set_seed(arguments.seed)
stream = ExactStream(data.dataset, data.tokenizer, max_length=data.block_size, shuffle_buffer=16, labels=False)
stream.tokenizer.pad_token = stream.tokenizer.eos_token
config = GPT2Config(vocab_size=len(stream.tokenizer), n_layer=2, n_embd=64, n_head=2, n_positions=data.block_size)
trainer = Trainer(
    GPT2LMHeadModel(config),
    arguments,
    train_dataset=stream,
    data_collator=DataCollatorForLanguageModeling(stream.tokenizer, mlm=False),
    callbacks=[RunRecord(arguments.output_dir, stream)],
)
trainer.train(resume_from_checkpoint=RunRecord.newest(arguments.output_dir))
