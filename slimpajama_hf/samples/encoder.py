"""Text becomes ids at a bounded cost: of a long document, only the opening that is used is tokenized."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimpajama_hf import screen
from slimpajama_hf.errors import UserError, one_line
from slimpajama_hf.samples.tokenizer import BUILTIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Tokens that a cut text must give beyond `max_tokens`; see Encoder.opening.
_MARGIN = 32


# Characters per token for the first guess of where to cut. English prose has 3 to 5.
_GUESS_CHARACTERS = 6


# With fewer characters per wanted token, a text is tokenized whole, so that `total_tokens` is exact for most documents.
_WHOLE_CHARACTERS = 16


# Characters after the guess in which a space to cut at is looked for.
_LOOK_AHEAD = 4000


_WORD_END = re.compile(r"\S(?=\s)")


@dataclass
class Opening:
    """The first tokens of a document.

    `ids` are at most the tokens asked for. `end` is how many characters of the text they cover: all of them if no token
    was cut off. `total_tokens` is the number of tokens of the whole text, or None if the text was too long to be
    tokenized whole.
    """

    ids: list[int]
    end: int
    total_tokens: int | None


class Encoder:
    """Text to ids and character offsets, for training. No tokens are added, and letters never become control tokens.

    A document that holds "<|endoftext|>" or "</s>" gets the tokens of those letters, never the control token. The given
    tokenizer is not changed. Works in threads and can be pickled. Raises UserError for a tokenizer that gives no
    offsets (a Python tokenizer that is not plain SentencePiece).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1
        """The largest id plus one. If ids have holes, this is more than the number of tokens."""
        self._processor: SentencePieceProcessor | None = None
        self._backend: Any = None
        if getattr(tokenizer, "is_fast", False):
            from tokenizers import Tokenizer

            # A copy, because truncation, padding and the reading of control tokens are settings of the object.
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            self._control = _control_ids(tokenizer)
            self._refuse_without_unknown_token()
        elif _is_plain_sentencepiece(tokenizer):
            from sentencepiece import SentencePieceProcessor

            # A copy: a processor that names unknown pieces, like the tokenizer's, gives no offsets.
            self._processor = SentencePieceProcessor(model_proto=tokenizer.sp_model.serialized_model_proto())
            self._control = frozenset()  # sentencepiece itself never gives one.
        else:
            raise UserError(
                f"the tokenizer is a {type(tokenizer).__name__}, which does not say which characters a token stands"
                " for; expected one with a tokenizer.json or a SentencePiece .model: convert it, or type"
                f" --tokenizer {BUILTIN}"
            )

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text` and, for each, how many characters of `text` come before its end (never decreasing).

        Several tokens may stand for one character (its bytes). The ends of those in its middle are before or after it,
        as the library says. The last end is below len(text) if the tokenizer drops text, such as spaces at the end.
        Raises UnicodeEncodeError for lone surrogates, which are no text.
        """
        text.encode("utf-8")  # Raises for lone surrogates, which the libraries treat differently.
        if self._processor is not None:
            mapping = self._processor.encode(text, out_type="offset_mapping")
            ids, ends = mapping["ids"], [end for _, end in mapping["offsets"]]
        else:
            encoding = self._encoding_of(text)
            ids, ends = encoding.ids, [end for _, end in encoding.offsets]
            if not self._control.isdisjoint(ids):
                ids, ends = self._without_control(text, ids, encoding.offsets)
        # With some pre-tokenizers, trimmed offsets step back by a space.
        return ids, list(itertools.accumulate(ends, max))

    def opening(self, text: str, max_tokens: int) -> Opening:
        """The first `max_tokens` ids of `text`, as `encode(text)[0][:max_tokens]`, without reading all of a long text.

        The time depends on `max_tokens` and on the characters that those tokens cover, not on len(text): a long text is
        cut before it is tokenized. Why the ids are the same: pre-tokenizers and SentencePiece split a text into words
        and tokenize each word by itself, from left to right. The cut falls between words, after a word and before a
        space, so it changes nothing before it. A text without spaces is cut anywhere. There, or if a pattern looks at
        the character after a word, the text after the cut can change the tokens next to it: merges and best paths
        depend on neighbours, but agree again some pieces away. So a cut text must give 32 more tokens than asked for,
        which are thrown away; if it gives fewer, twice as many characters are read. This is no proof for patterns that
        look ahead without bound, such as one that groups the digits of a number from its end. Only numbers of thousands
        of digits would show that.

        Raises ValueError when `max_tokens` is below 1.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
        wanted = max_tokens + _MARGIN
        if len(text) <= max(_WHOLE_CHARACTERS * max_tokens, _GUESS_CHARACTERS * wanted):
            return self._whole(text, max_tokens)
        guess = _GUESS_CHARACTERS * wanted
        while True:
            cut = _cut(text, guess)
            if cut >= len(text):
                return self._whole(text, max_tokens)
            ids, ends = self.encode(text[:cut])
            if len(ids) >= wanted:
                return Opening(ids[:max_tokens], ends[max_tokens - 1], None)
            guess *= 2

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control tokens, and ids beyond the vocabulary (padded embeddings have them), give nothing."""
        # Tokens that were added to a SentencePiece model have ids after those of the model.
        size = self.size if self._processor is None else self._processor.get_piece_size()
        known = [int(index) for index in ids if 0 <= index < size]
        if self._processor is not None:
            return self._processor.decode(known)
        return str(self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self, token: int) -> str:
        """The name of a token in the vocabulary; `<id>` for an id beyond it."""
        name = self.tokenizer.convert_ids_to_tokens(int(token)) if 0 <= token < self.size else None
        return f"<{token}>" if name is None else str(name)

    def _encoding_of(self, text: str) -> Any:
        """Encode a text with the `tokenizers` library. Raises UserError if the library cannot encode it."""
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(
                f"the tokenizer has no token for some of the text ({one_line(error)}); expected one with an unknown"
                f" token or with bytes: train one on this corpus, or type --tokenizer {BUILTIN}"
            ) from None

    def _refuse_without_unknown_token(self) -> None:
        """Raise UserError for a tokenizer that fails on unknown characters. For one that drops them, say so on
        screen."""
        unusual = "\U0010fffd"
        if not self._encoding_of(unusual).ids:
            screen.say(
                "the tokenizer leaves out characters that it does not know, for it has neither an unknown token nor"
                " bytes"
            )

    def _whole(self, text: str, max_tokens: int) -> Opening:
        ids, ends = self.encode(text)
        if len(ids) <= max_tokens:
            return Opening(ids, len(text), len(ids))
        return Opening(ids[:max_tokens], ends[max_tokens - 1], len(ids))

    def _without_control(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        """Replace control tokens that plain letters gave by the tokens of those letters, in two parts.

        Needed for Unigram models in `tokenizers`, which have "</s>" among the ordinary pieces.
        """
        new_ids: list[int] = []
        ends: list[int] = []
        for index, (begin, end) in zip(ids, offsets, strict=True):
            if index not in self._control:
                new_ids.append(index)
                ends.append(end)
                continue
            for start, stop in ((begin, begin + 1), (begin + 1, end)):
                part = self._encoding_of(text[start:stop])
                for new, (_, part_end) in zip(part.ids, part.offsets, strict=True):
                    if new not in self._control:
                        new_ids.append(new)
                        ends.append(start + part_end)
        return new_ids, ends


def _cut(text: str, guess: int) -> int:
    """Where to cut `text`: after the first word that ends at or soon after `guess` characters, else at `guess`."""
    found = _WORD_END.search(text, guess - 1, guess + _LOOK_AHEAD)
    return found.end() if found else guess


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no text may give. The unknown token counts only if it is also another special token (as in GPT-2)."""
    tokens: dict[str, Any] = tokenizer.special_tokens_map
    ordinary = {tokens.get("unk_token")} - {token for name, token in tokens.items() if name != "unk_token"}
    names = [str(token) for token in tokenizer.all_special_tokens if token not in ordinary]
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)  # type: ignore[assignment]
    return frozenset(index for index in ids if index is not None)


def _is_plain_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` takes its ids unchanged from its sentencepiece model (some subclasses shift or clean)."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    own = ("_tokenize", "_convert_token_to_id", "tokenize", "prepare_for_tokenization")
    return (
        isinstance(tokenizer, SentencePieceBackend)
        and all(getattr(type(tokenizer), name) is getattr(SentencePieceBackend, name) for name in own)
        and bool(tokenizer.legacy)  # Otherwise the model's dummy prefix was changed in memory.
    )
