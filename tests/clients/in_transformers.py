"""Inside another `transformers`: ids, text, logits, a padded batch, greedy text, one by one and as a batch."""

import sys

import torch
import transformers
from answers import Answers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

answers = Answers(sys.argv[1])
answers.versions(transformers)
for model_name, expected in answers.models():
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name).eval()
    with answers.check("ids"):
        for text, ids in zip(expected.texts, expected.ids, strict=True):
            answers.equal(tokenizer(text)["input_ids"], ids)
    with answers.check("text"):
        for text, ids in zip(expected.texts, expected.ids, strict=True):
            answers.equal(tokenizer.decode(ids), text)
    with answers.check("logits"), torch.no_grad():
        for text, logits in zip(expected.texts, expected.logits, strict=True):
            answers.close(model(**tokenizer(text, return_tensors="pt")).logits[0].numpy(), logits)
    with answers.check("padded batch"), torch.no_grad():
        batch = tokenizer(expected.texts, padding=True, return_tensors="pt")
        found = model(**batch).logits.numpy()
        for row, logits in zip(found, expected.logits, strict=True):
            answers.close(row[: len(logits)], logits)
    with answers.check("truncation"):
        long = tokenizer(" ".join(expected.texts) * 50, truncation=True)["input_ids"]
        answers.equal(len(long), model.config.n_positions)
    writer = pipeline("text-generation", model=model_name)
    how = {"max_new_tokens": expected.new_tokens, "do_sample": False}
    with answers.check("greedy text"):
        for text, written in zip(expected.texts, expected.greedy, strict=True):
            answers.equal(writer(text, **how)[0]["generated_text"], text + written)
    with answers.check("greedy batch"):
        # 5 does this by itself, 4.57 warns and asks for it: what is written begins where the prompts end.
        writer.tokenizer.padding_side = "left"
        found = [each[0]["generated_text"] for each in writer(expected.texts, batch_size=len(expected.texts), **how)]
        answers.equal(found, [text + written for text, written in zip(expected.texts, expected.greedy, strict=True)])
answers.end()
