"""Through `torch.onnx` into onnxruntime: logits."""

import sys
import tempfile

import numpy
import onnxruntime
import torch
from answers import Answers
from transformers import AutoModelForCausalLM


class OnlyLogits(torch.nn.Module):
    """The model as a function of ids alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


answers = Answers(sys.argv[1])
answers.versions(onnxruntime)
for model_name, expected in answers.models():
    with answers.check("logits"), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = OnlyLogits(AutoModelForCausalLM.from_pretrained(model_name).eval())
        example = torch.tensor([expected.ids[0]])
        length = torch.export.Dim("length", min=2, max=64)
        torch.onnx.export(
            model, (example,), f"{folder}/m.onnx", dynamo=True, input_names=["input_ids"],
            dynamic_shapes={"input_ids": {1: length}}, verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(f"{folder}/m.onnx")
        for ids, logits in zip(expected.ids, expected.logits, strict=True):
            answers.close(session.run(None, {"input_ids": numpy.array([ids])})[0][0], logits)
answers.end()
