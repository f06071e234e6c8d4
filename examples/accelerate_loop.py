"""A loop of your own with accelerate, in one process or several (`accelerate launch`).

python accelerate_loop.py 'texts/*.jsonl' runs/mine 1000
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from slimpajama_hf import ExactStream, RunRecord
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

TEXTS, OUTPUT, STEPS = sys.argv[1:]
accelerator = Accelerator()
set_seed(1)
stream = ExactStream(TEXTS, "builtin", max_length=64, mode="pack")
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(stream.tokenizer), n_layer=2, n_embd=64, n_head=2, n_positions=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(stream, batch_size=2, collate_fn=stream.collate, drop_last=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

record = RunRecord(OUTPUT, stream)
if checkpoint := record.begin(model, int(STEPS), seed=1):
    accelerator.load_state(str(checkpoint))
for batch in record.batches(loader) if record.steps < int(STEPS) else ():
    loss = model(**batch).loss
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    record.step(accelerator.reduce(loss.detach(), "mean"), learning_rate=1e-3, grad_norm=norm)
    if record.steps % 5 == 0:
        with record.saving() as folder:
            accelerator.save_state(str(folder))
    if record.steps == int(STEPS):
        break
record.close()
