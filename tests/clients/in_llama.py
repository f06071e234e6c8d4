"""Inside llama.cpp (its server, in this process): ids, text, the likeliest next tokens, greedy tokens."""

import json
import sys
import urllib.request
from importlib.metadata import version

import numpy
import xllamacpp
from answers import Answers

answers = Answers(sys.argv[1])
answers.about["xllamacpp"] = version("xllamacpp")
for model_name, expected in answers.models():
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model_name
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.port = 64, 1, False, 0
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)

    def ask(path, _server=server, **body):
        content = json.dumps(body).encode()
        request = urllib.request.Request(
            _server.listening_address + path, content, {"Content-Type": "application/json"}
        )
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    with answers.check("ids"):
        for text, ids in zip(expected.texts, expected.ids, strict=True):
            answers.equal(ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"], ids)
    with answers.check("text"):
        for text, ids in zip(expected.texts, expected.ids, strict=True):
            answers.equal(ask("/detokenize", tokens=ids)["content"], text)
    how = {
        "n_predict": expected.new_tokens,
        "temperature": 0,
        "n_probs": 5,
        "return_tokens": True,
        "cache_prompt": False,
    }
    written = [ask("/completion", prompt=ids, **how) for ids in expected.ids]
    with answers.check("log-probabilities"):
        for found, logits in zip(written, expected.logits, strict=True):
            last = logits[-1].astype("float64")
            log_probability = last - last.max()
            log_probability -= numpy.log(numpy.exp(log_probability).sum())
            for each in found["completion_probabilities"][0]["top_logprobs"]:
                answers.close(each["logprob"], log_probability[each["id"]], 2e-3)
    with answers.check("greedy tokens"):
        for found, ids in zip(written, expected.greedy_ids, strict=True):
            answers.equal(found["tokens"], ids)
    del server
answers.end()
