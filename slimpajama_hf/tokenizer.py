"""Tokenizers: load one from anywhere, turn the opening of a document into ids at bounded cost, train one.

SentencePiece models stay SentencePiece: their ids come from the `sentencepiece` library itself. The conversions to
`tokenizers` that transformers offers segment some texts differently, and then a model and its tokenizer disagree.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.files import sync_folder

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
BUILTIN_MODEL = Path(__file__).parent / "assets" / "builtin.model"
KINDS = ("sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe")
END_OF_TEXT = "<|endoftext|>"

# Tokens demanded beyond `max_tokens` from a text that was cut; see Encoder.opening.
_MARGIN = 32
# Characters per token of the first guess of where to cut: English prose has 3 to 5.
_GUESS_CHARACTERS = 6
# Characters per token below which a text is tokenized whole, so that `total_tokens` is exact for common documents.
_WHOLE_CHARACTERS = 16
# Characters looked through for a space to cut at.
_LOOK_AHEAD = 4000
_WORD_END = re.compile(r"\S(?=\s)")

# Characters fed to a trainer at once: SentencePiece silently drops longer sentences than it was told to expect.
_CHUNK = re.compile(r"(?s).{1,4000}(?=\s|\Z)|.{1,4000}")
_CHUNK_BYTES = 4 * 4000 + 1
# Printable ASCII, newline, tab and the punctuation of English type get pieces of their own even when the text lacks
# them: as bytes they would be three tokens each, and transformers' own decoding prints byte pieces as "<0x0A>".
# (Not the space: inside SentencePiece it is always U+2581.)
_REQUIRED_CHARACTERS = "\n\t" + "".join(chr(code) for code in range(0x21, 0x7F)) + "‘’“”–—…"
# Fixed, not the machine's: unigram training adds up its counts by thread, and the model's bytes name the number.
_THREADS = 4
# The largest vocabularies in use have some 260,000; trainers reserve memory for the number before they read.
_LARGEST_VOCABULARY = 1_000_000
_HEARTBEAT_SECONDS = 2.0
_HUB_TIMEOUT_SECONDS = 10.0

# Any of these in a folder means that somebody saved a tokenizer there.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
# Control tokens by the names that tokenizer.json files give them; the file itself does not say which is which.
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", END_OF_TEXT)
_UNK_NAMES = ("<unk>", "[UNK]", END_OF_TEXT)


def load_tokenizer(source: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that encodes text as its makers do and that AutoTokenizer can load again once saved.

    `source` is `builtin` (the model shipped with this package), a folder, a `tokenizer.json`, a SentencePiece `.model`
    or the id of a Hub repository, whose `revision` (branch, tag or commit) may be given. Code from the Hub is never
    run. Raises UserError when there is no tokenizer or when it cannot be read or reached.
    """
    if source == BUILTIN:
        return _from_sentencepiece(BUILTIN_MODEL)
    if not source.strip():
        raise UserError(
            "the name of the tokenizer is empty; expected a Hub id, a folder, a tokenizer.json or a SentencePiece"
            f" .model: type --tokenizer {BUILTIN} for the one that comes with this program"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_sentencepiece(path) if path.suffix == ".model" else _from_tokenizer_json(path)
    if path.suffix in (".model", ".json") or path.is_absolute() or source[:1] in ".~" or source.count("/") > 1:
        raise UserError(
            f"there is no tokenizer at {source}; expected a folder, a tokenizer.json or a SentencePiece .model:"
            f" mend the path, or type --tokenizer {BUILTIN} for the one that comes with this program"
        )
    return _from_hub(source, revision)


def _from_hub(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoTokenizer

    # Whatever the Hub, the network and the repository's files can do wrong comes out here, in the exceptions of six
    # libraries (huggingface_hub, httpx, tokenizers raises bare Exception, ...): to the user it is one thing.
    refusal: Exception | None = None
    try:
        # Asked first because transformers asks a Hub that is not there twelve times, which takes 46 s.
        HfApi().model_info(source, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:
        # An overloaded Hub is worth the repeated asking; one that is not there or refuses leaves what is in the cache.
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        refusal = None if status == 429 or status >= 500 else error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False, local_files_only=refusal is not None
        )
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"the tokenizer {source}{at} is no local file and could not be loaded from the Hugging Face Hub"
            f" ({_reason(refusal or error)}); mend the name or the network, or type --tokenizer {BUILTIN}, which needs"
            " none"
        ) from error
    return _checked(tokenizer, source)


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        # AutoTokenizer would convert a bare .model to `tokenizers` and get other ids than sentencepiece.
        models = {path.name: path for path in sorted(folder.glob("*.model"))}
        usual = [models[name] for name in ("tokenizer.model", "spiece.model") if name in models]
        if usual or len(models) == 1:
            return _from_sentencepiece([*usual, *models.values()][0])
        if models:
            raise UserError(
                f"the folder {folder} holds {len(models)} SentencePiece models ({', '.join(models)}); expected one, or"
                f" one named tokenizer.model: type --tokenizer {folder / next(iter(models))}"
            )
        if not any((folder / name).is_file() for name in (*_TOKENIZER_FILES, "vocab.txt")):
            raise UserError(
                f"the folder {folder} holds no tokenizer; expected tokenizer.json, tokenizer_config.json or a"
                f" SentencePiece .model in it: name another folder, or type --tokenizer {BUILTIN}"
            )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception; see _from_hub
        raise UserError(
            f"the tokenizer in {folder} could not be read ({_reason(error)}); expected the files that"
            f" save_pretrained() writes: save it again, or type --tokenizer {BUILTIN}"
        ) from error
    return _checked(tokenizer, str(folder))


def _from_tokenizer_json(path: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        return _from_folder(path.parent)  # The file beside it says which control token is which.
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{path} is not a tokenizer ({_not_a_model(path) or _reason(error)}); expected a tokenizer.json of the"
            f" `tokenizers` library or a SentencePiece .model: name another file, or type --tokenizer {BUILTIN}"
        ) from error

    def named(names: Sequence[str]) -> str | None:
        return next((name for name in names if backend.token_to_id(name) is not None), None)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=named(_EOS_NAMES),
        bos_token=named(_BOS_NAMES),
        unk_token=named(_UNK_NAMES),
    )
    return _checked(tokenizer, str(path))


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    from sentencepiece import SentencePieceProcessor

    # Looked at first: an empty file is no error to sentencepiece.
    reason = _not_a_model(path)
    processor: SentencePieceProcessor | None = None
    if reason is None:
        try:
            processor = SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError, ValueError):
            reason = "its bytes are something else, or cut off"
    if processor is None:
        raise UserError(
            f"{path} is not a SentencePiece model ({reason}); expected the .model file that sentencepiece trained:"
            f" download it again, or type --tokenizer {BUILTIN}"
        )

    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    return _sentencepiece_class()(
        vocab_file=str(path),
        # -1: the model has no such token.
        **{name: processor.id_to_piece(index) for name, index in ids.items() if index >= 0},
        # "</s>" in a text is text; sentencepiece never reads its control pieces from one.
        split_special_tokens=True,
        # transformers turns pieces into ids by name: without this an unknown piece is named by its letters, and the
        # letters "</s>" would be the control token in a model that has no piece for any of them.
        sp_model_kwargs={"emit_unk_piece": True},
        # Nothing is put before or behind a text by itself.
        special_tokens_pattern="none",
    )


@functools.cache
def _sentencepiece_class() -> Any:
    """A class for SentencePiece models: transformers' exact one with its decoding mended.

    `transformers.SentencePieceBackend` takes ids from sentencepiece, but decodes by joining pieces: it strips spaces
    and prints bytes as "<0x0A>". The class here has the same name, because save_pretrained() writes the name and
    AutoTokenizer finds transformers' own by it, without this package: same ids, only the plainer decoding.
    """
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend as TransformersBackend

    class SentencePieceBackend(TransformersBackend):
        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            """Text of pieces as sentencepiece gives it; control tokens are shown by name."""
            control = set(self.all_special_tokens)
            runs = itertools.groupby(tokens, key=control.__contains__)
            return "".join("".join(run) if named else self.sp_model.decode(list(run)) for named, run in runs)

    # Where pickle finds it: see __getattr__.
    SentencePieceBackend.__module__, SentencePieceBackend.__qualname__ = __name__, "SentencePieceBackend"
    return SentencePieceBackend


def __getattr__(name: str) -> Any:
    """The class above as an attribute of this module, made when asked for: transformers takes seconds to import."""
    if name == "SentencePieceBackend":
        return _sentencepiece_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _checked(tokenizer: Any, source: str) -> PreTrainedTokenizerBase:
    """Refuse what transformers returns without complaint when files are missing: nothing but control tokens."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"the tokenizer {source} knows {len(tokenizer)} control tokens and nothing else: its vocabulary is missing;"
            " expected a tokenizer.json or a SentencePiece .model beside its configuration: save it again, or type"
            f" --tokenizer {BUILTIN}"
        )
    if type(tokenizer) is SentencePieceBackend:
        # Only the decoding differs (see _sentencepiece_class), the object holds the same.
        tokenizer.__class__ = _sentencepiece_class()
    return tokenizer


def _reason(error: BaseException) -> str:
    """First line of what a library said, short enough to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


def _not_a_model(path: Path) -> str | None:
    """What a file is that a failed download often leaves in place of a tokenizer; None when it is none of these."""
    try:
        with open(path, "rb") as file:
            start = file.read(200).lstrip().lower()
    except OSError as error:
        return error.strerror
    if not start:
        return "it is empty"
    if start.startswith((b"<!doctype", b"<html")):
        return "it is an HTML page"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: git lfs pull fetches that"
    return None


@dataclass
class Opening:
    """The first tokens of a document.

    `ids` are at most the tokens asked for; `end` is the number of characters of the text that they cover, all of it
    when no token was cut off; `total_tokens` is the number of tokens of the whole text, None when the text was too
    long to be tokenized whole.
    """

    ids: list[int]
    end: int
    total_tokens: int | None


class Encoder:
    """Text to ids and character offsets, for training: no token added, none read from the text's own letters.

    A document that holds "<|endoftext|>" or "</s>" gets the tokens of those letters, never the control token. The
    tokenizer given is left as it is. Works in threads and can be pickled. Raises UserError for a tokenizer that can
    say neither (a Python tokenizer that is not plain SentencePiece).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._processor: SentencePieceProcessor | None = None
        self._backend: Any = None
        if getattr(tokenizer, "is_fast", False):
            from tokenizers import Tokenizer

            # A copy: truncation, padding and the reading of control tokens are switches of the object.
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            self._control = _control_ids(tokenizer)
        elif _is_plain_sentencepiece(tokenizer):
            from sentencepiece import SentencePieceProcessor

            # A copy: offsets are refused to a processor that names unknown pieces, as the tokenizer's does.
            self._processor = SentencePieceProcessor(model_proto=tokenizer.sp_model.serialized_model_proto())
            self._control = frozenset()  # sentencepiece itself never gives one.
        else:
            raise UserError(
                f"the tokenizer is a {type(tokenizer).__name__}, which does not say which characters a token stands"
                " for; expected one with a tokenizer.json or a SentencePiece .model: convert it, or type"
                f" --tokenizer {BUILTIN}"
            )

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text` and, for each, the number of characters of `text` up to where it ends (never decreasing).

        Several tokens may stand for one character (its bytes); those in its middle end before or behind it, as the
        library says. The last end is below len(text) when the tokenizer drops text, say spaces at the end.
        Raises UnicodeEncodeError for lone surrogates, which are no text.
        """
        text.encode("utf-8")  # Lone surrogates end here: the libraries differ in what they make of them.
        if self._processor is not None:
            mapping = self._processor.encode(text, out_type="offset_mapping")
            ids, ends = mapping["ids"], [end for _, end in mapping["offsets"]]
        else:
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids, ends = encoding.ids, [end for _, end in encoding.offsets]
            if not self._control.isdisjoint(ids):
                ids, ends = self._without_control(text, ids, encoding.offsets)
        # Trimmed offsets of some pre-tokenizers step back by a space.
        return ids, list(itertools.accumulate(ends, max))

    def opening(self, text: str, max_tokens: int) -> Opening:
        """The first `max_tokens` ids of `text`, as `encode(text)[0][:max_tokens]`, without reading all of a long text.

        The time depends on `max_tokens` and on how many characters those tokens cover, not on len(text): a long text
        is cut before it is tokenized. Why the ids are the same: pre-tokenizers and SentencePiece split a text into
        words and tokenize each by itself, left to right, so a cut between words changes nothing before it (the cut
        falls behind a word, before a space). Text without spaces is cut anywhere. There, as with a pattern that looks
        at the character after a word, what lies behind the cut can change the tokens next to it: merges and best
        paths depend on neighbours, and agree again some pieces away. So a cut text must give 32 tokens more than
        asked for, which are thrown away; with fewer, twice as many characters are read. This is no proof for a
        pattern that looks ahead without bound, such as one that groups the digits of a number from its end: only
        numbers of thousands of digits would show it.

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
        """Text of `ids`. Control tokens and ids beyond the vocabulary (padded embeddings have them) give nothing."""
        size = len(self.tokenizer)
        known = [int(index) for index in ids if 0 <= index < size]
        if self._processor is not None:
            return self._processor.decode(known)
        return str(self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self, token: int) -> str:
        """What the vocabulary calls a token, `<id>` beyond it."""
        if not 0 <= token < len(self.tokenizer):
            return f"<{token}>"
        return str(self.tokenizer.convert_ids_to_tokens(int(token)))

    def _whole(self, text: str, max_tokens: int) -> Opening:
        ids, ends = self.encode(text)
        if len(ids) <= max_tokens:
            return Opening(ids, len(text), len(ids))
        return Opening(ids[:max_tokens], ends[max_tokens - 1], len(ids))

    def _without_control(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        """Replace control tokens that came out of plain letters by the tokens of those letters, in two parts.

        Needed for Unigram models in `tokenizers`: they hold "</s>" among the ordinary pieces.
        """
        new_ids: list[int] = []
        ends: list[int] = []
        for index, (begin, end) in zip(ids, offsets, strict=True):
            if index not in self._control:
                new_ids.append(index)
                ends.append(end)
                continue
            for start, stop in ((begin, begin + 1), (begin + 1, end)):
                part = self._backend.encode(text[start:stop], add_special_tokens=False)
                for new, (_, part_end) in zip(part.ids, part.offsets, strict=True):
                    if new not in self._control:
                        new_ids.append(new)
                        ends.append(start + part_end)
        return new_ids, ends


def _cut(text: str, guess: int) -> int:
    """Where to cut `text`: behind the first word that ends at or soon after `guess` characters, else just there."""
    found = _WORD_END.search(text, guess - 1, guess + _LOOK_AHEAD)
    return found.end() if found else guess


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no text may give. The unknown token is one only where it doubles as another (GPT-2's does)."""
    tokens: dict[str, Any] = tokenizer.special_tokens_map
    ordinary = {tokens.get("unk_token")} - {token for name, token in tokens.items() if name != "unk_token"}
    names = [str(token) for token in tokenizer.all_special_tokens if token not in ordinary]
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)  # type: ignore[assignment]
    return frozenset(index for index in ids if index is not None)


def _is_plain_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of `tokenizer` are those of its sentencepiece model (some subclasses shift or clean)."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    own = ("_tokenize", "_convert_token_to_id", "tokenize", "prepare_for_tokenization")
    return (
        isinstance(tokenizer, SentencePieceBackend)
        and all(getattr(type(tokenizer), name) is getattr(SentencePieceBackend, name) for name in own)
        and bool(tokenizer.legacy)  # Otherwise the model's dummy prefix was changed in memory.
    )


def train_tokenizer(
    texts: Iterable[str],
    kind: str,
    vocab_size: int,
    output: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a tokenizer of `vocab_size` tokens on `texts` and save it as the folder `output`, which is returned.

    `kind` is one of `KINDS`. All of them lose nothing: decode(encode(text)) == text (save that SentencePiece takes
    U+2581 for a space). SentencePiece kinds have `<unk>` 0, `<s>` 1, `</s>` 2 and fall back to bytes; byte-bpe has
    GPT-2's pre-tokenizer and `<|endoftext|>` 0. The same texts give the same model. `say` gets a line at least every
    2 s, partly from another thread; in a terminal the documents read are a progress bar.

    The folder appears whole or not at all and loads with load_tokenizer() and with AutoTokenizer. Raises UserError for
    an unknown kind, too little text, a vocabulary the text cannot fill or that cannot hold its characters, and when
    `output` already holds something.
    """
    if kind not in KINDS:
        raise UserError(f"there is no tokenizer kind {kind!r}; expected one of {', '.join(KINDS)}")
    if vocab_size > _LARGEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is more than any model uses; expected at most {_LARGEST_VOCABULARY}:"
            " type --vocab_size 32000"
        )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} already holds something and is not overwritten; name a folder that is not there yet")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="_tokenizer-", dir=output.parent))
    except OSError as error:
        raise UserError(
            f"the tokenizer cannot be written to {output} ({error.strerror}); name a folder that can be written"
        ) from error
    try:
        with _Feed(texts, say) as feed:
            train = _train_byte_bpe if kind == "byte-bpe" else _train_sentencepiece
            train(feed, kind, vocab_size, temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private.
        sync_folder(temporary)
        if output.is_dir():
            output.rmdir()  # Empty, as checked above; not every platform renames onto a folder.
        os.rename(temporary, output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"tokenizer of {vocab_size} tokens written to {output}")
    return output


class _Feed:
    """Documents on their way to a trainer: cut into chunks, counted, with a sign of life every 2 s."""

    def __init__(self, texts: Iterable[str], say: Callable[[str], None]) -> None:
        self.documents = 0
        self.characters = 0
        self.error: BaseException | None = None
        self._texts = texts
        self._say = say
        self._begun = time.monotonic()
        self._reading = True
        self._bar: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tokenizer-heartbeat", daemon=True)

    def __enter__(self) -> _Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def chunks(self) -> Iterator[str]:
        """Pieces of the documents, at most 4000 characters each, cut between words where there are words."""
        from tqdm import tqdm

        # None: no bar where there is no terminal; then the heartbeat tells how far it is.
        self._bar = tqdm(self._texts, desc="Reading documents", unit=" documents", disable=None, mininterval=0.5)
        try:
            for text in self._bar:
                text = text.encode("utf-8", "ignore").decode("utf-8")  # Lone surrogates are no text.
                self.documents += 1
                self.characters += len(text)
                yield from _CHUNK.findall(text)
        except Exception as error:
            self.error = error  # A trainer written in C++ may swallow it; it is raised again behind it.
            raise
        finally:
            self._bar.close()
            self._reading = False

    def _beat(self) -> None:
        while not self._over.wait(_HEARTBEAT_SECONDS):
            elapsed = time.monotonic() - self._begun
            read = f"{self.documents} documents, {self.characters / 1e6:.1f} million characters"
            if not self._reading:
                self._say(f"training the tokenizer on {read}: {elapsed:.0f} s")
            elif self._bar is None or self._bar.disable:
                self._say(f"reading text for the tokenizer: {read}, {elapsed:.0f} s")


def _train_sentencepiece(feed: _Feed, kind: str, vocab_size: int, folder: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    fewest = 3 + 256 + 1 + len(_REQUIRED_CHARACTERS)  # Control tokens, bytes, the space.
    if vocab_size < fewest:
        raise _vocabulary_too_low(vocab_size, fewest)
    model = folder / "tokenizer.model"
    try:
        with open(model, "wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=feed.chunks(),
                model_writer=file,
                model_type=kind.removeprefix("sentencepiece-"),
                vocab_size=vocab_size,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                byte_fallback=True,
                required_chars=_REQUIRED_CHARACTERS,
                # The text is kept as it is: no Unicode folding, every space counts, none is put before it.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                max_sentence_length=_CHUNK_BYTES,
                num_threads=_THREADS,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise feed.error or _sentencepiece_refusal(str(error), vocab_size, feed) from error
    if feed.error is not None:
        raise feed.error
    _from_sentencepiece(model).save_pretrained(folder)


def _sentencepiece_refusal(message: str, vocab_size: int, feed: _Feed) -> Exception:
    """What sentencepiece's message means to the user."""
    too_high = re.search(r"Vocabulary size too high.*?<= (\d+)", message)
    too_low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if not feed.characters or "sentences_.empty()" in message:
        return _no_text(feed)
    if too_high:
        return _vocabulary_too_high(vocab_size, int(too_high[1]), feed)
    if too_low:
        return _vocabulary_too_low(vocab_size, int(too_low[1]))
    return RuntimeError(f"sentencepiece could not train: {message}")


def _train_byte_bpe(feed: _Feed, kind: str, vocab_size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fewest = 256 + 1
    if vocab_size < fewest:
        raise _vocabulary_too_low(vocab_size, fewest)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # Sorted: alphabet() gives another order in every process, and the ids of the bytes follow it.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        backend.train_from_iterator(feed.chunks(), trainer)
    except Exception:
        if feed.error is not None:
            raise feed.error from None
        raise
    if not feed.characters:
        raise _no_text(feed)
    if backend.get_vocab_size() < vocab_size:
        raise _vocabulary_too_high(vocab_size, backend.get_vocab_size(), feed)
    names = dict.fromkeys(("eos_token", "bos_token", "unk_token"), END_OF_TEXT)
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def _no_text(feed: _Feed) -> UserError:
    return UserError(
        f"there is too little text to train a tokenizer on ({feed.documents} documents, {feed.characters} characters);"
        " expected some hundred documents: name a larger corpus"
    )


def _vocabulary_too_high(vocab_size: int, most: int, feed: _Feed) -> UserError:
    return UserError(
        f"a vocabulary of {vocab_size} tokens is more than {feed.documents} documents of {feed.characters} characters"
        f" can fill; expected at most {most}: type --vocab_size {most}, or give it more text"
    )


def _vocabulary_too_low(vocab_size: int, fewest: int) -> UserError:
    return UserError(
        f"a vocabulary of {vocab_size} tokens cannot hold the 256 bytes, the control tokens and the common characters"
        f" of the text; expected at least {fewest}: type --vocab_size {fewest} or more"
    )
