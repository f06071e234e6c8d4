"""Train a tokenizer on a stream of documents, in memory that does not grow with the stream."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.files import sync_folder
from slimpajama_hf.samples.tokenizer import END_OF_TEXT, KINDS, from_sentencepiece

# Pieces of text for a trainer. SentencePiece silently drops sentences that are longer than it was told to expect.
_CHUNK = re.compile(r"(?s).{1,4000}(?=\s|\Z)|.{1,4000}")


_CHUNK_BYTES = 4 * 4000 + 1


# Printable ASCII, newline, tab and English punctuation get pieces of their own even if the text lacks them. As bytes
# they would be up to three tokens each, and transformers' own decoding prints byte pieces as "<0x0A>". (Not the space:
# inside SentencePiece it is always U+2581.)
_REQUIRED_CHARACTERS = "\n\t" + "".join(chr(code) for code in range(0x21, 0x7F)) + "‘’“”–—…"


# Fixed, not the machine's number: unigram training adds its counts by thread, and the model's bytes hold the number.
_THREADS = 4


# The largest vocabularies in use have some 260,000. Trainers reserve memory for the number before they read.
_LARGEST_VOCABULARY = 1_000_000


_HEARTBEAT_SECONDS = 2.0


def train_tokenizer(
    texts: Iterable[str],
    kind: str,
    vocab_size: int,
    output: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a tokenizer of `vocab_size` tokens on `texts` and save it as the folder `output`, which is returned.

    `kind` is one of `KINDS`. All of them lose nothing: decode(encode(text)) == text (except that SentencePiece takes
    U+2581 for a space). SentencePiece kinds have `<unk>` 0, `<s>` 1, `</s>` 2 and fall back to bytes. byte-bpe has the
    pre-tokenizer of GPT-2 and `<|endoftext|>` 0. The same texts give the same model. `say` gets a line at least every
    2 s, partly from another thread. In a terminal, a progress bar counts the documents.

    The folder appears whole or not at all, and loads with load_tokenizer() and with AutoTokenizer. Raises UserError for
    an unknown kind, for too little text, for a vocabulary that the text cannot fill or that cannot hold its characters,
    and when `output` already holds something.
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
    """Feeds documents to a trainer: cut into chunks, counted, with a sign of life every 2 s."""

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
        """Yield pieces of the documents, at most 4000 characters each, cut between words if possible."""
        from tqdm import tqdm

        # None: no bar without a terminal. Then `_beat` reports the progress.
        self._bar = tqdm(self._texts, desc="Reading documents", unit=" documents", disable=None, mininterval=0.5)
        try:
            for text in self._bar:
                text = text.encode("utf-8", "ignore").decode("utf-8")  # Lone surrogates are no text.
                self.documents += 1
                self.characters += len(text)
                yield from _CHUNK.findall(text)
        except Exception as error:
            self.error = error  # A trainer written in C++ may swallow it. It is raised again after training.
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
                # The text is kept as it is: no Unicode folding, every space counts, none is added before it.
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
    from_sentencepiece(model).save_pretrained(folder)


def _sentencepiece_refusal(message: str, vocab_size: int, feed: _Feed) -> Exception:
    """Turn sentencepiece's message into an error that says what it means to the user."""
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
        # Sorted, because alphabet() has another order in every process, and the ids of the bytes follow it.
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
