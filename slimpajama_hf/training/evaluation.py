"""Scores on held-out documents: loss, perplexity, next-token accuracy, bits per byte, by domain.

To add a score, add a property to `Scores` and a line to `Scores.to_dict`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from slimpajama_hf import bars, screen
from slimpajama_hf.files import GrowingFile
from slimpajama_hf.record import evaluations

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.sample import Sample


@dataclasses.dataclass
class Scores:
    """Sums over samples, from which every score is computed."""

    samples: int = 0
    predicted: int = 0
    """Predicted tokens: all but the first of each sample."""
    nats: float = 0.0
    """Code length of the predicted tokens."""
    first_nats: float = 0.0
    """Code length of the first tokens, at their uniform cost ln(vocabulary)."""
    text_bytes: int = 0
    whole_nats: float = 0.0
    """Code length of the whole texts, if that was asked for; `whole_bytes`: their bytes."""
    whole_bytes: int = 0
    guesses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    targets: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """Token ids, each of shape (T-1,)."""

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.predicted

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Code length of all tokens over the UTF-8 bytes that they cover: comparable across tokenizers."""
        return (self.nats + self.first_nats) / math.log(2) / self.text_bytes

    @property
    def whole_bits_per_byte(self) -> float:
        """Bits per byte of the whole texts: comparable even if tokenizers differ in how much of a text fits."""
        return self.whole_nats / math.log(2) / self.whole_bytes

    def accuracy(self, metric: Any) -> float:
        """Fraction of next tokens predicted right, by an `evaluate` metric."""
        return metric.compute(
            predictions=torch.cat(self.guesses).tolist(), references=torch.cat(self.targets).tolist()
        )["accuracy"]

    def to_dict(self, metric: Any) -> dict[str, Any]:
        """The scores of a domain as in `evaluations.jsonl`: numbers that are not finite are None, which JSON has."""
        found = {
            "samples": self.samples,
            "tokens": self.predicted,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy(metric),
            "bits_per_byte": self.bits_per_byte,
        } | ({"whole_bits_per_byte": self.whole_bits_per_byte} if self.whole_bytes else {})
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


def next_token_accuracy() -> Any:
    """An `evaluate.Metric` for next-token accuracy. `evaluate.load("accuracy")` would need the network, for a script.

    `evaluate` takes seconds to import, so it is imported only here.
    """
    import datasets
    import evaluate
    import numpy as np

    class NextTokenAccuracy(evaluate.Metric):
        """Fraction of predicted token ids that equal the reference ids."""

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description="Fraction of next tokens predicted right, teacher-forced.",
                citation="",
                inputs_description="predictions and references: token ids, flattened and shifted.",
                features=datasets.Features(
                    {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
                ),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {"accuracy": float((np.asarray(predictions) == np.asarray(references)).mean())}

    return NextTokenAccuracy()


def score(
    model: Any,
    samples: Iterable[Sample],
    vocabulary: int,
    on_sample: Callable[[int], None] = lambda done: None,
    whole: tuple[Encoder, int] | None = None,
) -> dict[str, Scores]:
    """Scores of `model` by domain, and over all samples under `all`. Restores the model's mode.

    `vocabulary`: tokens that a text may begin with; the model may have more, to pad its matrices. `whole`: an encoder
    and a window length in tokens, to score the whole texts of the samples too.
    """
    by_domain: dict[str, Scores] = {}
    total = Scores()
    training = model.training
    model.eval()
    first_nats = math.log(vocabulary)
    try:
        with torch.no_grad():
            for done, sample in enumerate(samples, 1):
                input_ids = torch.tensor([sample.input_ids], device=model.device)  # (1, T)
                logits = model(input_ids=input_ids).logits[0, :-1].float()  # (T-1, V)
                targets = input_ids[0, 1:]  # (T-1,)
                nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
                guesses = logits.argmax(-1).cpu()
                whole_nats, text = 0.0, b""
                if whole is not None:
                    encoder, length = whole
                    text = sample.document.text.encode()
                    ids = encoder.encode(sample.document.text)[0]
                    # The sample is the first window.
                    whole_nats = first_nats + nats + nats_behind(model, ids, len(sample.input_ids), length)
                for scores in (total, by_domain.setdefault(sample.document.domain, Scores())):
                    scores.samples += 1
                    scores.predicted += len(targets)
                    scores.nats += nats
                    scores.first_nats += first_nats
                    scores.text_bytes += sample.text_bytes
                    scores.whole_nats += whole_nats
                    scores.whole_bytes += len(text)
                    scores.guesses.append(guesses)
                    scores.targets.append(targets.cpu())
                on_sample(done)
    finally:
        model.train(training)
    return {"all": total, **dict(sorted(by_domain.items()))}


@torch.no_grad()
def nats_behind(model: Any, ids: Sequence[int], done: int, length: int) -> float:
    """Nats of the tokens of a text after its first `done` (at least 1), in windows of `length` tokens.

    Each window begins half a window after the one before, and only its new tokens count. So a token is predicted from
    at least half a window of context, or from the whole text before it.
    """
    nats = 0.0
    while done < len(ids):
        end = min(length if done == 1 else done + length // 2, len(ids))
        window = torch.tensor([ids[max(0, end - length) : end]], device=model.device)  # (1, <= length)
        logits = model(input_ids=window).logits[0, -1 - (end - done) : -1].float()  # (end - done, V)
        targets = window[0, done - end :]  # (end - done,)
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        done = end
    return nats


def metrics_of(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Metrics under Trainer's names, from scores by domain as in a line of `evaluations.jsonl`."""
    whole = {name: scores["all"][name] for name in evaluations.NUMBERS}
    return {f"eval_{name}": math.nan if value is None else value for name, value in whole.items()}


class HeldOutScores:
    """The evaluation of `--eval_steps`: scores the weights and their average, on the same held-out documents each time,
    and appends the scores to `evaluations.jsonl`."""

    def __init__(self, documents: Corpus, samples: list[Sample], folder: RunFolder, vocabulary: int) -> None:
        self.samples = samples
        self._vocabulary = vocabulary
        self._documents = documents
        self.file = GrowingFile(folder.evaluations)
        self._metric: Any = None

    def __call__(self, trainer: Any) -> dict[str, float]:
        if self._metric is None:
            with screen.Waiting("loading `evaluate`"):
                self._metric = next_token_accuracy()
        averaged = None
        average = getattr(trainer, "average", None)
        both = average is not None and average.is_there
        label = f"Scoring held-out documents @ {trainer.state.global_step}"
        with trainer.seeing() as model, bars.Counting(label, len(self.samples) * (1 + both)) as counting:
            table = self._table(model, counting)
            if average is not None and both:
                with average.applied():
                    averaged = self._table(model, lambda done: counting(len(self.samples) + done))
        if trainer.is_world_process_zero():
            entry = {"step": trainer.state.global_step, "corpus": self._documents.mirror, "scores": table}
            problem = self.file.append(entry | ({"averaged": averaged} if averaged is not None else {}))
            if problem is not None:
                screen.say(f"not saved: the scores of step {entry['step']} ({problem}); the next ones try again")
        metrics = metrics_of(table)
        if averaged is not None:
            metrics |= {name.replace("eval_", "eval_averaged_"): value for name, value in metrics_of(averaged).items()}
        return metrics

    def _table(self, model: Any, on_sample: Callable[[int], None]) -> dict[str, dict[str, Any]]:
        scores = score(model, self.samples, self._vocabulary, on_sample)
        return {domain: each.to_dict(self._metric) for domain, each in scores.items()}
