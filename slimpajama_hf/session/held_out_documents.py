"""The held-out documents of a run, opened and read before step 0."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from slimpajama_hf import screen
from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.opening import own_validation_of, validation_of
from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.evaluation import HeldOutScores


def holds_out(settings: Settings, corpus: Corpus) -> bool:
    """Whether a run that begins keeps `--eval_fraction` of its corpus from training. It does if scores are asked for
    and there is no other held-out text."""
    data = settings.data
    wants_some = settings.training.eval_steps is not None and data.eval_dataset is None and data.eval_fraction > 0
    return wants_some and own_validation_of(corpus) is None


def held_out(settings: Settings, corpus: Corpus) -> Corpus:
    """Return the held-out documents of a run: what `--eval_dataset` names, else the validation part of its corpus, else
    the fraction that the run keeps from training.

    Raises UserError for a corpus that has none.
    """
    data = settings.data
    if data.eval_dataset is not None:
        return opening.open_corpus(
            data.eval_dataset, text_column=data.text_column, split="validation", txt_documents=data.txt_documents
        )
    return validation_of(corpus)


def during_training(
    settings: Settings,
    corpus: Corpus,
    encoder: Encoder,
    folder: RunFolder,
    training: Any,
    waiting: Callable[[str], None] = lambda what: None,
) -> HeldOutScores | None:
    """Read the held-out documents of `--eval_steps`. This comes before step 0, to refuse a corpus without any.

    If `--eval_fraction` is 0, or no document of a small corpus falls into it, that is said on screen, and scoring is
    turned off in `training` (the arguments of the Trainer).
    """
    from slimpajama_hf.model.presets import vocabulary as size_of_vocabulary
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.training.evaluation import HeldOutScores

    data = settings.data
    if settings.training.eval_steps is None:
        return None
    own_share = data.eval_dataset is None and corpus.held_out_fraction > 0
    if data.eval_fraction == 0 and not own_share and data.eval_dataset is None and own_validation_of(corpus) is None:
        _do_without(training, f"--eval_fraction 0 holds nothing of {corpus.name} out")
        return None
    documents = held_out(settings, corpus)
    waiting(f"reading held-out documents of {documents.name}")
    stream = SampleStream(
        documents, encoder, "truncate", data.max_seq_length, read_ahead=0, skip_broken_shards=data.skip_broken_shards
    )
    samples = list(itertools.islice(stream, data.eval_documents))
    if not samples and own_share:
        _do_without(
            training, f"none of the documents of {corpus.name} falls into --eval_fraction {data.eval_fraction:g}"
        )
        return None
    if not samples:
        raise UserError(f"--eval_dataset {documents.name}: no document in it that can be scored{stream.why_nothing()}")
    return HeldOutScores(documents, samples, folder, size_of_vocabulary(encoder.tokenizer))


def _do_without(training: Any, why: str) -> None:
    screen.say(f"no held-out scores: {why}, and it has no validation part; name held-out text with --eval_dataset")
    training.eval_strategy, training.eval_steps, training.eval_on_start = "no", None, False
