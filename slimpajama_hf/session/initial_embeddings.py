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
from slimpajama_hf.model import cooccurrence, final_norm
from slimpajama_hf.session.own_tokenizer import FirstTexts
from slimpajama_hf.settings.arguments import corpus_vocabulary

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.processes import Processes

#: Where the weight of the last norm begins beside embeddings from counts, which are long; 1 is usual (docs/recipe.md).
FINAL_NORM = 0.25


class InitialEmbeddings:
    """Embeddings made from counts. `rows`: (tokens, width), bfloat16; those that were `counted`, (tokens,), count.
    `final_norm`: where the weight of the last norm begins, as a share of what is usual."""

    def __init__(
        self, rows: torch.Tensor, counted: torch.Tensor, final_norm: float, described: dict[str, Any] | None = None
    ) -> None:
        self.rows, self.counted, self.final_norm = rows, counted, final_norm
        self.described = described
        """What `run.json` says of them; None if it says it already."""

    def put_into(self, model: Any) -> None:
        """Give them to a fresh model. Tokens that were not counted keep what they were drawn."""
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight[: len(self.rows)][self.counted] = self.rows[self.counted].to(weight)
        if self.final_norm != 1.0 and not final_norm.begin_at(model, self.final_norm):
            self.final_norm = 1.0
        if self.described is not None:
            self.described["final_norm"] = self.final_norm

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
    """Give `model` its embeddings, if a run begins or goes on from its very start; None if they stay drawn at random.

    Raises UserError if there is no text to count.
    """
    if not are_counted(settings.model.init_embeddings, tokenizer_name):
        return None
    waiting(f"counting which tokens stand side by side in the first documents of {corpus.name}")
    width = model.get_input_embeddings().weight.shape[1]

    def made() -> InitialEmbeddings:
        recorded = folder.read_record().get("initial_embeddings") if resuming and folder.record.is_file() else None
        strength = FINAL_NORM if recorded is None else _recorded_norm(recorded, folder)
        kept = _kept(folder, strength) if recorded is not None else None
        return kept or _counted(settings, FirstTexts(corpus, settings.data), encoder, width, corpus.name, strength)

    found = team.first_does(made)
    asked = found.final_norm
    found.put_into(model)
    if team.is_first and found.described is not None and found.final_norm != 1.0:
        screen.say(f"the weight of the last norm begins at {found.final_norm:g} of what is usual")
    if team.is_first and found.final_norm != asked:
        screen.say(
            f"the last norm of {type(model).__name__} begins as usual, not at {asked:g}: that is for a head that "
            "is the embedding and reads one norm"
        )
    return found


def _recorded_norm(recorded: Any, folder: RunFolder) -> float:
    """Where the last norm of a run began. Older runs began with the usual one. Raises UserError for anything else."""
    strength = recorded.get("final_norm", 1.0) if isinstance(recorded, dict) else None
    if isinstance(strength, int | float) and 0 < strength <= 1:
        return float(strength)
    raise UserError(
        f"{folder.record}: what it says of initial_embeddings is damaged; expected a final_norm above 0 and at most 1; "
        "put the file back, or start a run in another --output_dir"
    )


def _kept(folder: RunFolder, strength: float) -> InitialEmbeddings | None:
    """Those of the run in `folder`; None if they cannot be read."""
    try:
        kept = load_file(folder.initial_embeddings)
        return InitialEmbeddings(kept["rows"], kept["counted"], strength)
    except (OSError, SafetensorError, KeyError) as error:
        screen.say(f"{folder.initial_embeddings}: cannot be read ({one_line(error)}); it is counted anew")
        return None


def _counted(
    settings: Settings, texts: FirstTexts, encoder: Encoder, width: int, name: str, strength: float
) -> InitialEmbeddings:
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
    return InitialEmbeddings(rows.bfloat16(), counted, strength, described)
