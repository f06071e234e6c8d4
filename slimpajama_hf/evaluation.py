"""Scores on held-out documents: loss, perplexity, next-token accuracy, bits per byte, by domain.

To add a score: a property of `Scores` and a line in `Scores.to_dict`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from slimpajama_hf import averaging, corpora
from slimpajama_hf.corpora import Corpus, Cursor
from slimpajama_hf.errors import UserError
from slimpajama_hf.files import GrowingFile
from slimpajama_hf.model import vocabulary as size_of_vocabulary
from slimpajama_hf.run_folder import RunFolder
from slimpajama_hf.samples import Sample, SampleStream

if TYPE_CHECKING:
    from slimpajama_hf.cli import Settings
    from slimpajama_hf.tokenizer import Encoder
    from slimpajama_hf.trainer import SlimPajamaTrainer


@dataclasses.dataclass
class Scores:
    """Sums over samples, from which every score follows."""

    samples: int = 0
    predicted: int = 0
    """Tokens predicted: all but the first of each sample."""
    nats: float = 0.0
    """Code length of the predicted tokens."""
    first_nats: float = 0.0
    """Code length of the first tokens, at their uniform cost ln(vocabulary)."""
    text_bytes: int = 0
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

    def accuracy(self, metric: Any) -> float:
        """Fraction of next tokens right, by an `evaluate` metric."""
        return metric.compute(
            predictions=torch.cat(self.guesses).tolist(), references=torch.cat(self.targets).tolist()
        )["accuracy"]

    def to_dict(self, metric: Any) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "tokens": self.predicted,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy(metric),
            "bits_per_byte": self.bits_per_byte,
        }


def next_token_accuracy() -> Any:
    """An `evaluate.Metric` that needs no network: `evaluate.load("accuracy")` fetches a script from the Hub.

    Imported here alone: `evaluate` takes seconds to import.
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
    model: Any, samples: Iterable[Sample], vocabulary: int, on_sample: Callable[[int], None] = lambda done: None
) -> dict[str, Scores]:
    """Scores of `model` on samples, by domain, and over all under `all`. The model's mode is restored after.

    `vocabulary`: tokens that a text may begin with; the model may have more, to pad its matrices.
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
                for scores in (total, by_domain.setdefault(sample.document.domain, Scores())):
                    scores.samples += 1
                    scores.predicted += len(targets)
                    scores.nats += nats
                    scores.first_nats += first_nats
                    scores.text_bytes += sample.text_bytes
                    scores.guesses.append(guesses)
                    scores.targets.append(targets.cpu())
                on_sample(done)
    finally:
        model.train(training)
    return {"all": total, **dict(sorted(by_domain.items()))}


def held_out(settings: Settings, corpus: Corpus) -> Corpus:
    """The held-out documents of a run: what `--eval_dataset` names, else the validation part of its corpus.

    Raises UserError for a corpus that has none.
    """
    data = settings.data
    if data.eval_dataset is not None:
        return corpora.open_corpus(data.eval_dataset, text_column=data.text_column, split="validation")
    return validation_of(corpus)


def validation_of(corpus: Corpus) -> Corpus:
    """The validation part of a corpus. Raises UserError for one that has none of its own."""
    if corpus.mirror == "embedded":
        return corpora.open_corpus("embedded", split="validation")
    for mirrors in corpora.CORPORA.values():
        for mirror in mirrors:
            if corpus.mirror == mirror.name:
                return dataclasses.replace(corpus, prefixes=mirror.validation)
    raise UserError(
        f"{corpus.name} has no validation part of its own; name held-out documents with --eval_dataset, as another file"
    )


def metrics_of(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Scores by domain, as a line of `evaluations.jsonl` has them, as metrics in Trainer's names."""
    return {f"eval_{name}": scores["all"][name] for name in ("loss", "perplexity", "accuracy", "bits_per_byte")}


class HeldOutScores:
    """What `--eval_steps` calls: scores on the same held-out documents each time, of the weights and of their average,
    appended to `evaluations.jsonl`."""

    def __init__(self, documents: Corpus, samples: list[Sample], folder: RunFolder, vocabulary: int) -> None:
        self.samples = samples
        self._vocabulary = vocabulary
        self._documents = documents
        self.file = GrowingFile(folder.evaluations)
        self._metric: Any = None

    def __call__(self, trainer: SlimPajamaTrainer) -> dict[str, float]:
        if self._metric is None:
            self._metric = next_token_accuracy()
        averaged = None
        average = getattr(trainer, "average", None)
        with trainer.seeing() as model:
            table = self._table(model)
            if average is not None and average.is_there:
                with average.applied():
                    averaged = self._table(model)
        if trainer.is_world_process_zero():
            entry = {"step": trainer.state.global_step, "corpus": self._documents.mirror, "scores": table}
            self.file.append(entry | ({"averaged": averaged} if averaged is not None else {}))
        metrics = metrics_of(table)
        if averaged is not None:
            metrics |= {name.replace("eval_", "eval_averaged_"): value for name, value in metrics_of(averaged).items()}
        return metrics

    def _table(self, model: Any) -> dict[str, dict[str, Any]]:
        return {
            domain: each.to_dict(self._metric) for domain, each in score(model, self.samples, self._vocabulary).items()
        }


def during_training(settings: Settings, corpus: Corpus, encoder: Encoder, folder: RunFolder) -> HeldOutScores | None:
    """The held-out documents of `--eval_steps`, read now so that a corpus without any is refused before step 0."""
    if settings.training.eval_steps is None:
        return None
    documents = held_out(settings, corpus)
    stream = SampleStream(documents, encoder, "truncate", settings.data.max_seq_length, read_ahead=0)
    samples = list(itertools.islice(stream, settings.data.eval_documents))
    if not samples:
        raise UserError(f"--eval_dataset {documents.name}: no document in it that can be scored")
    return HeldOutScores(documents, samples, folder, size_of_vocabulary(encoder.tokenizer))


def of_checkpoint(
    place: str, dataset: str | None, documents: int, max_length: int | None, text_column: str, split: str
) -> dict[str, Any]:
    """Scores of a saved checkpoint (or of the newest one of a run): `python -m slimpajama_hf evaluate`."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    from slimpajama_hf import checkpoints
    from slimpajama_hf.screen import Waiting
    from slimpajama_hf.tokenizer import Encoder, load_tokenizer

    folder = checkpoints.resolve(place)
    with Waiting("opening the corpus") as waiting:
        # A checkpoint's averaged weights lie in a folder of it.
        run = RunFolder(folder.parent.parent if folder.name == averaging.FOLDER else folder.parent)
        record = run.read_record() if run.record.is_file() else None
        if dataset is not None:
            corpus = corpora.open_corpus(dataset, text_column=text_column, split=split, waiting=waiting)
        elif record is not None:
            corpus = validation_of(corpora.recorded(record["corpus"]))
        else:
            raise UserError(f"{place}: not in a run folder, so its corpus is not known; name documents with --dataset")
        waiting("loading the model")
        length = max_length or (record["model"]["max_seq_length"] if record else 256)
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder))
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        encoder = Encoder(load_tokenizer(str(folder)))
        waiting("loading `evaluate`")
        metric = next_token_accuracy()
        start = time.perf_counter()
        stream = SampleStream(corpus, encoder, "truncate", length)
        stream.start = Cursor()

        def on_sample(done: int) -> None:
            waiting(f"scoring: {done} of {documents} documents")

        samples = list(itertools.islice(stream, documents))
        scores = score(model, samples, size_of_vocabulary(encoder.tokenizer), on_sample)
        averaged = None
        if (folder / averaging.FOLDER / "config.json").is_file():
            waiting("scoring the averaged weights")
            model = AutoModelForCausalLM.from_pretrained(str(folder / averaging.FOLDER)).to(model.device)
            averaged = score(model, samples, size_of_vocabulary(encoder.tokenizer), on_sample)
    if not scores["all"].samples:
        raise UserError(f"{corpus.name}: no document in it that can be scored")
    return {
        "checkpoint": str(Path(folder)),
        "corpus": corpus.mirror,
        "shards": [shard.name for shard in itertools.islice(corpus.files, 20)],
        "max_seq_length": length,
        "seconds": round(time.perf_counter() - start, 3),
        "scores": {domain: each.to_dict(metric) for domain, each in scores.items()},
        "averaged": averaged and {domain: each.to_dict(metric) for domain, each in averaged.items()},
    }
