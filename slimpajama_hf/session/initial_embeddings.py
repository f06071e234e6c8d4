"""The embeddings that a run begins with, if they are not drawn at random: made from neighbours in the first documents.

The texts are those of a tokenizer of the corpus (`own_tokenizer.py`), of each the tokens that the run learns. The
embeddings are kept in the folder of the run, so that a run that goes on from its very start, or is trained again,
begins with the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from slimpajama_hf import files, screen
from slimpajama_hf.errors import UserError, one_line
from slimpajama_hf.model import cooccurrence
from slimpajama_hf.session.own_tokenizer import FirstTexts
from slimpajama_hf.settings.arguments import corpus_vocabulary

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.processes import Processes


class InitialEmbeddings:
    """Embeddings made from counts. `rows`: (tokens, width), bfloat16; those that were `counted`, (tokens,), count."""

    def __init__(self, rows: torch.Tensor, counted: torch.Tensor, described: dict[str, Any] | None = None) -> None:
        self.rows, self.counted = rows, counted
        self.described = described
        """What `run.json` says of them; None if it says it already."""

    def put_into(self, model: Any) -> None:
        """Give them to a fresh model. Tokens that were not counted keep what they were drawn."""
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight[: len(self.rows)][self.counted] = self.rows[self.counted].to(weight)

    def keep(self, folder: RunFolder) -> None:
        """Save them in the folder of the run."""
        files.write_whole(folder.initial_embeddings, save({"rows": self.rows, "counted": self.counted}))


def are_counted(asked: str, tokenizer_name: str) -> bool:
    """Whether embeddings begin from counts. `asked`: the value of `--init_embeddings`."""
    return asked == "cooccurrence" or (asked == "auto" and corpus_vocabulary(tokenizer_name) is not None)


def of_run(
    settings: Settings,
    corpus: Corpus,
    encoder: Encoder,
    tokenizer_name: str,
    folder: RunFolder,
    model: Any,
    resuming: bool,
    team: Processes,
    waiting: Callable[[str], None],
) -> InitialEmbeddings | None:
    """The embeddings for `model`, of a run that begins or goes on from its very start; None if drawn at random.

    Raises UserError if there is no text to count.
    """
    if not are_counted(settings.model.init_embeddings, tokenizer_name):
        return None
    waiting(f"counting which tokens stand side by side in the first documents of {corpus.name}")
    width = model.get_input_embeddings().weight.shape[1]

    def made() -> InitialEmbeddings:
        kept = _kept(folder) if resuming else None
        return kept or _counted(settings, FirstTexts(corpus, settings.data), encoder, width, corpus.name)

    return team.first_does(made)


def _kept(folder: RunFolder) -> InitialEmbeddings | None:
    """Those of the run in `folder`; None if it has none, or none that can be read."""
    if not folder.record.is_file() or "initial_embeddings" not in folder.read_record():
        return None
    try:
        kept = load_file(folder.initial_embeddings)
        return InitialEmbeddings(kept["rows"], kept["counted"])
    except (OSError, SafetensorError, KeyError) as error:
        screen.say(f"{folder.initial_embeddings}: cannot be read ({one_line(error)}); it is counted anew")
        return None


def _counted(settings: Settings, texts: FirstTexts, encoder: Encoder, width: int, name: str) -> InitialEmbeddings:
    began = time.monotonic()
    length = settings.data.max_seq_length
    counts = cooccurrence.count((encoder.opening(text, length).ids for text in texts), encoder.size)
    if not len(counts.values()):
        raise UserError(f"--init_embeddings: {name} has no text in which tokens could be counted; type random")
    rows, counted = cooccurrence.embeddings(counts, width, settings.training.seed)
    tokens = int(counts.values().sum())
    screen.say(
        f"embeddings made from {tokens:,} neighbours in the first {texts.documents:,} documents of {name} "
        f"({time.monotonic() - began:.0f} s); {encoder.size - int(counted.sum()):,} of {encoder.size:,} tokens do not "
        "stand there and begin at random"
    )
    described = {"from": "cooccurrence", "documents": texts.documents, "neighbours": tokens}
    return InitialEmbeddings(rows.bfloat16(), counted, described)
