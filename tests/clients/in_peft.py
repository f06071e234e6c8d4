"""Inside peft and trl: LoRA changes nothing at first and learns; SFT begins at the loss that the model has."""

import sys
import tempfile

import peft
import torch
import trl
from answers import Answers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

answers = Answers(sys.argv[1])
answers.versions(peft, trl)
for model_name, expected in answers.models():
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    with answers.check("LoRA"), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_name)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]))
        batch = tokenizer(expected.texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            answers.close(model(**batch).logits[0, : len(expected.ids[0])].numpy(), expected.logits[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(**batch, labels=labels).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        answers.true(losses[-1] < losses[0], f"LoRA learns nothing: {losses}")
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_name), folder)
        with torch.no_grad():
            merged = model.eval()(**batch).logits.numpy()
            answers.close(again.eval()(**batch).logits.numpy(), merged)
    with answers.check("SFT"), tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            folder, max_steps=4, per_device_train_batch_size=len(expected.texts), logging_steps=1, report_to="none",
            learning_rate=1e-3, max_length=64, use_cpu=True, bf16=False, lr_scheduler_type="constant", seed=0,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model_name, config, train_dataset=Dataset.from_dict({"text": expected.texts}), processing_class=tokenizer
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        answers.true(losses[-1] < losses[0], f"SFT learns nothing: {losses}")
        # trl puts the end of a text behind each. Its Trainer divides a GPT-2's loss by all tokens, though the first of
        # each text is not predicted.
        counted = sum(len(ids) for ids in expected.ids)
        answers.close(losses[0], expected.loss_with_eos * counted / (counted + len(expected.ids)), 0.02)
answers.end()
