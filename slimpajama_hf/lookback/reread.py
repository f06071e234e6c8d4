"""Reads again what a run trained: documents by their place in the corpus, checked by their hash, and tokenized anew.

A ledger holds no text. It says where the text of a step is (mirror, shard, row), its SHA-1, and how many of its tokens
were trained. With the corpus and the tokenizer, these facts give exactly the tokens of the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slimpajama_hf.corpus import documents, unchanged
from slimpajama_hf.corpus.documents import Document
from slimpajama_hf.corpus.patience import OutOfPatience, Patience
from slimpajama_hf.corpus.shards import BrokenShard, Shard, read_shard
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints, ledger
from slimpajama_hf.samples.cutting import tokens_in_pieces

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder


#: How long to wait for a failing Hub, in seconds; short, because a user is waiting.
PATIENCE_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Place:
    """The part of one document that is in a step."""

    shard: str
    row: int
    sha1: str
    """SHA-1 of the whole document in UTF-8, 40 hex digits."""
    first_token: int
    tokens: int
    """Its tokens in the step; in `pack` with the EOS at the end of the document."""

    @property
    def name(self) -> str:
        return f"{self.shard} row {self.row:,}"


@dataclasses.dataclass(frozen=True)
class TokenAgain:
    """One token of a step."""

    id: int
    document: int
    """Which of the step's documents it belongs to, from 0."""
    start: int
    end: int
    """Its characters in that document; none if it ends inside a character or is the EOS."""


class NotTheDocument(UserError):
    """The corpus has no document at this place, or another than the one that was trained."""


# ---- where the text of a step is ----


def places(row: dict[str, Any], mode: str, max_length: int) -> list[Place]:
    """The documents of a ledger row, with all its samples, in their order in the step. `mode`: the run's sample mode.

    The first of a last window's 2 tokens may belong to the window before: `tokens_again` finds that out. Raises
    UserError for a packed row of a version that recorded only the first of its documents.
    """
    if row.get("samples"):
        return [place for sample in ledger.each_sample(row) for place in places(sample, mode, max_length)]
    if mode == "pack":
        found = [
            Place(each["shard"], each["row"], each["text_sha1"], each["first_token"], each["tokens"])
            for each in row.get("documents") or []
        ]
        if sum(place.tokens for place in found) != row["tokens"]:
            raise UserError(
                f"step {row['step']}: its row does not say which documents its block was packed of; runs of this "
                "version do"
            )
        return found
    first = row.get("part", 0) * max_length if mode == "window" else 0
    return [Place(row["shard"], row["row"], row["text_sha1"], first, row["tokens"])]


def corpus_of(record: dict[str, Any]) -> Corpus:
    """The corpus that a run recorded in its `run.json`. An embedded one whose cache is gone is built again."""
    corpus = unchanged.recorded(record["corpus"])
    if corpus.mirror == "embedded" and not all(os.path.isfile(shard.path) for shard in corpus.files):
        return unchanged.check_unchanged(corpus)
    return corpus


def shard_of(corpus: Corpus, name: str) -> Shard:
    """The shard with that name. Raises NotTheDocument if the corpus has none."""
    if corpus.repo is not None:
        # The commit pins the file, so the 59,166 names need not be listed.
        return Shard(name, f"hf://datasets/{corpus.repo}@{corpus.revision}/{name}")
    for shard in corpus.files:
        if shard.name == name:
            return shard
    raise NotTheDocument(f"{name}: not among the {len(corpus.files):,} files of {corpus.name}")


# ---- documents ----


class Rereader:
    """Reads documents again by their places. Places in the order of the corpus are read in one pass."""

    def __init__(self, corpus: Corpus, patience: Patience | None = None) -> None:
        self.corpus = corpus
        self._patience = patience or Patience(PATIENCE_SECONDS)
        self._shard: str | None = None
        self._records: Iterator[tuple[int, Any]] = iter(())
        self._next_row = 0

    def close(self) -> None:
        """Close the open shard."""
        close = getattr(self._records, "close", None)
        if close is not None:
            close()
        self._shard, self._records, self._next_row = None, iter(()), 0

    def __enter__(self) -> Rereader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, place: Place) -> Document:
        """The document at `place`. Raises NotTheDocument if it is not the one that was trained or cannot be read,
        and OutOfPatience if the Hub does not answer."""
        if self._shard != place.shard or place.row < self._next_row:
            self.close()
            shard = shard_of(self.corpus, place.shard)
            self._records = read_shard(shard, place.row, self.corpus.reading, self._patience)
            self._shard = place.shard
        try:
            for row, record in self._records:
                self._next_row = row + 1
                if row == place.row:
                    return self._checked(record, place)
                if row > place.row:
                    break
        except OutOfPatience:
            raise
        except BrokenShard as error:
            self.close()
            raise NotTheDocument(f"{place.name}: {error.reason}") from None
        self.close()
        raise NotTheDocument(f"{place.name}: the file has no such row any more")

    def _checked(self, record: Any, place: Place) -> Document:
        found = record
        if not isinstance(record, str):
            found = documents.to_document(record, self.corpus.text_column, self.corpus.mirror, place.shard, place.row)
        if not isinstance(found, Document):
            reason = found if isinstance(found, str) else found.reason
            raise NotTheDocument(f"{place.name}: no document there any more ({reason})")
        if found.sha1 != place.sha1:
            raise NotTheDocument(
                f"{place.name}: another document than the one that was trained (its SHA-1 is {found.sha1}, the ledger "
                f"has {place.sha1})"
            )
        return found


def read_places(corpus: Corpus, wanted: Iterable[Place], patience: Patience | None = None) -> list[Document]:
    """The documents at `wanted`, in that order. Raises UserError that names one that is not what was trained."""
    with Rereader(corpus, patience) as rereader:
        try:
            return [rereader.read(place) for place in wanted]
        except NotTheDocument as error:
            raise UserError(f"{error}; put {corpus.name} back as it was when the run read it") from None


# ---- tokens ----


def vocabulary_sha256(tokenizer: Any) -> str:
    """The `tokenizer_sha256` of `run.json`."""
    content = json.dumps(sorted(tokenizer.get_vocab().items()), sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def encoder_of(folder: RunFolder, record: dict[str, Any]) -> Encoder:
    """The tokenizer of a run: from a checkpoint, or else the one with which the run was started.

    Raises UserError if its vocabulary is not the one that the run recorded.
    """
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    steps = checkpoints.steps(folder.path)
    kept = [*(checkpoints.path_of(folder.path, step) for step in steps[-1:]), folder.tokenizer]
    source = next((str(place) for place in kept if place.is_dir()), record["tokenizer"])
    tokenizer = load_tokenizer(source)
    if vocabulary_sha256(tokenizer) != record["tokenizer_sha256"]:
        raise UserError(
            f"{source}: its vocabulary is not that of the tokenizer that {folder.path} was trained with; put that "
            "one back"
        )
    return Encoder(tokenizer)


def tokens_again(encoder: Encoder, found: list[Place], documents: list[Document], mode: str) -> list[TokenAgain]:
    """The tokens of a step from its places and their documents, as training made them (`samples/stream.py`).

    Raises UserError if the number of tokens differs: then the tokenizer or its library has changed.
    """
    tokens: list[TokenAgain] = []
    for number, (place, document) in enumerate(zip(found, documents, strict=True)):
        own = list(_tokens_of(encoder, place, document, mode))
        if len(own) != place.tokens:
            raise UserError(
                f"{place.name}: {len(own)} tokens from its token {place.first_token:,} on, and the run trained "
                f"{place.tokens}: its tokenizer, or the library behind it, is another now"
            )
        tokens += [TokenAgain(index, number, start, end) for index, start, end in own]
    return tokens


def _tokens_of(encoder: Encoder, place: Place, document: Document, mode: str) -> Iterator[tuple[int, int, int]]:
    """(id, first character, one past the last character) of each token that a step has of a document."""
    text = document.text
    first, last = place.first_token, place.first_token + place.tokens
    with contextlib.closing(_all_tokens(encoder, text, mode)) as every:
        kept: list[tuple[int, int, int]] = []
        for position, token in enumerate(every):
            if position >= last:
                break
            # One token before is kept, because a last window of one token borrows it.
            if position >= first - 1:
                kept.append(token)
    borrowed = mode == "window" and place.tokens == 2 and first > 0 and len(kept) == 2
    yield from kept if first == 0 or borrowed else kept[1:]


def _all_tokens(encoder: Encoder, text: str, mode: str) -> Generator[tuple[int, int, int], None, None]:
    before = 0
    for ids, ends in tokens_in_pieces(encoder, text):
        for index, end in zip(ids, ends, strict=True):
            yield index, before, end
            before = end
    if mode == "pack":
        yield encoder.tokenizer.eos_token_id, len(text), len(text)


def covered(tokens: list[TokenAgain], document: int) -> tuple[int, int]:
    """The characters [start, end) of a document that a step's tokens cover."""
    own = [token for token in tokens if token.document == document]
    return own[0].start, own[-1].end


def quiet_encoder_of(folder: RunFolder, record: dict[str, Any]) -> Encoder:
    """The encoder of a run, loaded without messages of the libraries."""
    from slimpajama_hf import screen

    screen.quiet_libraries()
    return encoder_of(folder, record)
