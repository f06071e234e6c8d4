"""The held-out documents of a run, opened and read before step 0."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.opening import validation_of
from slimpajama_hf.errors import UserError
from slimpajama_hf.model.presets import vocabulary as size_of_vocabulary
from slimpajama_hf.samples.stream import SampleStream
from slimpajama_hf.training.evaluation import HeldOutScores

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.settings.settings import Settings


def held_out(settings: Settings, corpus: Corpus) -> Corpus:
    """The held-out documents of a run: what `--eval_dataset` names, else the validation part of its corpus.

    Raises UserError for a corpus that has none.
    """
    data = settings.data
    if data.eval_dataset is not None:
        return opening.open_corpus(data.eval_dataset, text_column=data.text_column, split="validation")
    return validation_of(corpus)


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
