"""The tokenizer of a run: the one that is named, or with `--tokenizer corpus:N` one trained on the run's own corpus.

If none is named (`auto`), it is `gpt2` for a corpus on the Hub, `corpus:8192` for local files with enough text, else
`builtin`. A tokenizer of the corpus has N tokens and is trained before the first step, on the first documents; the run
then learns these documents too. It is saved in every checkpoint and in the run's `tokenizer/`. A resumed run takes it
from there and trains none.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import screen
from slimpajama_hf.corpus.documents import Cursor, Document
from slimpajama_hf.corpus.patience import Patience
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples.tokenizer import BUILTIN, from_sentencepiece, load_tokenizer
from slimpajama_hf.samples.tokenizer_training import train_tokenizer
from slimpajama_hf.session.resume import is_asked
from slimpajama_hf.settings.arguments import CORPUS_VOCABULARY, corpus_vocabulary

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.settings.arguments import DataArguments
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.processes import Processes

#: The most text that a tokenizer is trained on. More hardly changes its pieces, and takes longer (docs/recipe.md).
DOCUMENTS, CHARACTERS = 10_000, 8_000_000

#: From how much text on a corpus gets a tokenizer of its own unasked: about what the measurements had.
ENOUGH_CHARACTERS = 7_000_000


def load(
    settings: Settings,
    corpus: Corpus,
    folder: RunFolder,
    checkpoint: Path | None,
    team: Processes,
    waiting: Callable[[str], None],
) -> tuple[str, Any]:
    """Return (name, tokenizer) of a run that starts, or that goes on from `checkpoint` (None: from the very start).

    Raises UserError if there is no such tokenizer, or too little text to train one.
    """
    goes_on = is_asked(settings.training.resume_from_checkpoint) and folder.record.is_file()
    begun_with = folder.read_record()["tokenizer"] if goes_on else None
    asked = settings.model.tokenizer
    data = settings.data
    texts = FirstTexts(corpus, data)
    name = asked
    if asked == "auto":
        name = begun_with or team.first_does(lambda: _usual(corpus, texts, waiting))
    size = corpus_vocabulary(name)
    if size is None:
        return name, load_tokenizer(name)
    kept = [place for place in (checkpoint, folder.tokenizer) if place is not None and place.is_dir()]
    # If `--allow_changes tokenizer` allowed another number, it is another tokenizer.
    if kept and begun_with is not None and corpus_vocabulary(begun_with) == size:
        return name, load_tokenizer(str(kept[0]))
    waiting(f"training a tokenizer of {size:,} tokens on the first documents of {corpus.name}")
    # Nobody named a size: the text of a run that starts may be too monotonous for ours.
    train = _train_if_possible if asked == "auto" and begun_with is None else _train
    model = team.first_does(lambda: train(texts, corpus.name, size))
    if model is None:
        return BUILTIN, load_tokenizer(BUILTIN)
    with tempfile.TemporaryDirectory(prefix="slimpajama_hf-tokenizer-") as place:
        path = Path(place) / "tokenizer.model"
        path.write_bytes(model)
        return name, from_sentencepiece(path)


def keep(folder: RunFolder, name: str, tokenizer: Any) -> None:
    """Save a tokenizer that was trained for the run in its folder, if it is not there."""
    if corpus_vocabulary(name) is not None and not folder.tokenizer.exists():
        tokenizer.save_pretrained(folder.tokenizer)


def _usual(corpus: Corpus, texts: FirstTexts, waiting: Callable[[str], None]) -> str:
    """The name of the tokenizer for `auto`. Local files get one of their own if they have about as much text as the
    measurements had (docs/recipe.md). If they have less, the built-in one has seen more text."""
    if corpus.comes_from_hub:
        return "gpt2"
    if corpus.is_on_this_machine:
        waiting(f"looking how much text {corpus.name} has for a tokenizer")
        if texts.fill():
            return f"corpus:{CORPUS_VOCABULARY}"
    return BUILTIN


def _train(texts: FirstTexts, name: str, size: int) -> bytes:
    """Train a SentencePiece model of `size` tokens on the texts of the corpus `name`, and return its bytes."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slimpajama_hf-tokenizer-") as place:
        try:
            made = train_tokenizer(texts, "sentencepiece-bpe", size, Path(place) / "made")
        except UserError as error:
            words = re.sub(r"--vocab_size (\d+)", r"--tokenizer corpus:\1", str(error))
            raise UserError(f"--tokenizer corpus:{size}: {words}") from None
        model = (made / "tokenizer.model").read_bytes()
    screen.say(
        f"tokenizer of {size:,} tokens trained on the first {texts.documents:,} documents of {name} "
        f"({texts.characters / 1e6:.1f} million characters, {time.monotonic() - began:.0f} s)"
    )
    return model


def _train_if_possible(texts: FirstTexts, name: str, size: int) -> bytes | None:
    """The same; None, and a sentence on the screen, if the texts have too few different pieces."""
    try:
        return _train(texts, name, size)
    except UserError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        screen.say(f"no tokenizer of its own for {name}: {reason}; the built-in one is used")
        return None


class FirstTexts:
    """The first texts of a corpus, in order and counted, without held-out documents and those of `--leave_out`. The
    corpus is read only once."""

    def __init__(self, corpus: Corpus, data: DataArguments) -> None:
        patience = Patience(data.stream_patience, visible=True)
        self._records = lambda: corpus.records(Cursor(), skip_broken_shards=data.skip_broken_shards, patience=patience)
        self._left_out = frozenset(data.leave_out or ())
        self.documents, self.characters = 0, 0
        self._kept: list[str] | None = None

    def fill(self) -> bool:
        """Read the texts. Returns whether they are enough for a tokenizer that nobody asked for.

        Reading ends where something cannot be read. The stream reports that when it comes there, so that the run learns
        what lies before it.
        """
        kept: list[str] = []
        with contextlib.suppress(UserError, OSError):
            kept.extend(self)
        self._kept = kept
        return self.characters >= ENOUGH_CHARACTERS

    def __iter__(self) -> Iterator[str]:
        if self._kept is not None:
            yield from self._kept
            return
        for record in self._records():
            if self.documents >= DOCUMENTS or self.characters >= CHARACTERS:
                return
            if isinstance(record, Document) and f"{record.shard}#{record.row}" not in self._left_out:
                self.documents += 1
                # Only the first part of a long text, so that a book does not count for more than many pages.
                text = record.text[: CHARACTERS // 100]
                self.characters += len(text)
                yield text
