"""The text of single tokens inside a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimpajama_hf.samples.encoder import Encoder


def pieces(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """The text of each token of `ids`. Joined they are the text of all.

    A token that ends inside a character gives "", and the token that completes the character gives it whole. Control
    tokens give their names.
    """
    found: list[str] = []
    begin = 0  # Decoding starts here: far enough back to get the spaces right, near enough to be cheap.
    shown = ""
    for index, token in enumerate(ids):
        text = encoder.decode(ids[begin : index + 1])
        if text.endswith("\ufffd") and index - begin < 16:
            found.append("")
            continue
        new = text[len(shown) :] if text.startswith(shown) else text
        found.append(new or _control_name(encoder, token))
        # The next token is decoded after this one alone. A piece that is no whole character cannot be the start.
        begin = index
        shown = encoder.decode(ids[begin : index + 1])
    return found


def _control_name(encoder: Encoder, token: int) -> str:
    name = encoder.piece(token)
    return name if name in encoder.tokenizer.all_special_tokens else ""


class Guesses:
    """The text of single tokens inside a text, for guesses of a model. Each token is decoded once in a run."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[int, str] = {}
        # Decoded after "a", because SentencePiece drops the space of a token that begins a text.
        self._before = encoder.encode("a")[0][-1:]
        self._length = len(encoder.decode(self._before))

    def text(self, token: int) -> str:
        if token not in self._known:
            text = self._encoder.decode([*self._before, token])[self._length :]
            # A part of a character is shown by its name in the vocabulary.
            self._known[token] = text if text and "\ufffd" not in text else self._encoder.piece(token)
        return self._known[token]
