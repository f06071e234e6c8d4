"""Inside lm-evaluation-harness: the log-likelihood of a continuation, and greedy text."""

import sys
from importlib.metadata import version

import numpy
from answers import Answers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

answers = Answers(sys.argv[1])
answers.about["lm_eval"] = version("lm_eval")
for model_name, expected in answers.models():
    model = HFLM(pretrained=model_name, device="cpu", batch_size=2, dtype="float32")
    pairs = [(start, " " + end) for start, _, end in (text.rpartition(" ") for text in expected.texts)]
    with answers.check("log-likelihood"):
        requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        found = model.loglikelihood(requests, disable_tqdm=True)
        for (start, _), ids, logits, (value, _) in zip(pairs, expected.ids, expected.logits, found, strict=True):
            given = len(model.tok_encode(start.rstrip()))
            predicted = logits[:-1].astype("float64")
            predicted -= numpy.log(numpy.exp(predicted - predicted.max(-1, keepdims=True)).sum(-1, keepdims=True))
            predicted -= logits[:-1].max(-1, keepdims=True)
            each = predicted[numpy.arange(len(ids) - 1), ids[1:]]
            answers.close(value, each[max(given, 1) - 1 :].sum(), 1e-3)
    with answers.check("greedy text"):
        how = {"until": ["\0"], "max_gen_toks": expected.new_tokens, "do_sample": False}
        requests = [Instance("generate_until", {}, (text, dict(how)), n) for n, text in enumerate(expected.texts)]
        answers.equal(model.generate_until(requests, disable_tqdm=True), expected.greedy)
answers.end()
