"""A loop of your own with nothing but PyTorch.

python pytorch_loop.py 'texts/*.jsonl' runs/mine 1000
"""

import sys

import torch
from slimpajama_hf import ExactStream, RunRecord
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

TEXTS, OUTPUT, STEPS = sys.argv[1:]
torch.manual_seed(1)
stream = ExactStream(TEXTS, "builtin", max_length=64, mode="window")
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(stream.tokenizer), n_layer=2, n_embd=64, n_head=2, n_positions=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=stream.collate)

record = RunRecord(OUTPUT, stream)
if checkpoint := record.begin(model, int(STEPS), seed=1):
    state = torch.load(checkpoint / "state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
for batch in record.batches(loader) if record.steps < int(STEPS) else ():
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    record.step(loss, learning_rate=1e-3, grad_norm=norm)
    if record.steps % 5 == 0:
        with record.saving() as folder:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
    if record.steps == int(STEPS):
        break
record.close()
