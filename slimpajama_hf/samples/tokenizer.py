"""Load a tokenizer from anywhere.

SentencePiece models stay SentencePiece: their ids come from the `sentencepiece` library itself. The conversions of
transformers to `tokenizers` segment some texts differently, and then a model and its tokenizer disagree.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import ROOT, files
from slimpajama_hf.corpus.sniffing import not_a_download
from slimpajama_hf.errors import UserError
from slimpajama_hf.files import looks_local

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
BUILTIN_MODEL = ROOT / "slimpajama_hf" / "assets" / "builtin.model"
KINDS = ("sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe")
END_OF_TEXT = "<|endoftext|>"
_HUB_TIMEOUT_SECONDS = 10.0
#: Key in the tokenizer_config.json of a saved model: the original values of fields that were changed for others.
AS_TRAINED = "as_trained"
#: Fields that may be under that key. The file may be a stranger's, so all others are ignored.
KEPT_AS_TRAINED = ("tokenizer_class", "backend", "sp_model_kwargs", "split_special_tokens", "pad_token")

# If a folder holds any of these, somebody saved a tokenizer there.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
# Names that tokenizer.json files give to control tokens. The file itself does not say which is which.
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", END_OF_TEXT)
_UNK_NAMES = ("<unk>", "[UNK]", END_OF_TEXT)

#: Texts on which a conversion of a SentencePiece model differs, and how many more are made of its own pieces.
_HARD_TEXTS = (
    "a",
    " ",
    "  two  spaces  ",
    "\n\n\ttabs",
    "1234567 89",
    "na\u00efve e\u0301",
    "\u65e5\u672c\u8a9e \U0001f389",
)
_RANDOM_TEXTS = 200


def load_tokenizer(source: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that encodes text as its makers do, and that AutoTokenizer can load again after saving.

    `source` is `builtin` (the model shipped with this package), a folder, a `tokenizer.json`, a SentencePiece `.model`
    or the id of a Hub repository. `revision` is a branch, tag or commit of that repository. Code from the Hub is never
    run. Raises UserError when there is no tokenizer, or when it cannot be read or reached.
    """
    if source == BUILTIN:
        return from_sentencepiece(BUILTIN_MODEL)
    if not source.strip():
        raise UserError(
            "the name of the tokenizer is empty; expected a Hub id, a folder, a tokenizer.json or a SentencePiece"
            f" .model: type --tokenizer {BUILTIN} for the one that comes with this program"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return from_sentencepiece(path) if path.suffix == ".model" else _from_tokenizer_json(path)
    if looks_local(source) or path.is_absolute():
        raise UserError(
            f"there is no tokenizer at {source}; expected a folder, a tokenizer.json or a SentencePiece .model:"
            f" mend the path, or type --tokenizer {BUILTIN} for the one that comes with this program"
        )
    return _from_hub(source, revision)


def _from_hub(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoTokenizer

    # All failures of the Hub, the network and the repository's files end here, as exceptions of six libraries
    # (huggingface_hub, httpx, tokenizers raises bare Exception, ...). To the user they are one thing.
    refusal: Exception | None = None
    try:
        # Asked first, because transformers asks a Hub that is not there twelve times, which takes 46 s.
        HfApi().model_info(source, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:
        # transformers' retries are worth it for an overloaded Hub. If the Hub is missing or refuses, use the cache.
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
        # AutoTokenizer would convert a bare .model to `tokenizers`, whose ids differ from those of sentencepiece.
        models = {path.name: path for path in sorted(folder.glob("*.model"))}
        usual = [models[name] for name in ("tokenizer.model", "spiece.model") if name in models]
        if usual or len(models) == 1:
            return from_sentencepiece([*usual, *models.values()][0])
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
        was = _as_trained(folder)
        kind = _sentencepiece_class() if was.pop("tokenizer_class", None) == "SentencePieceBackend" else AutoTokenizer
        tokenizer = kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **was)
    except Exception as error:  # tokenizers raises bare Exception; see _from_hub
        raise UserError(
            f"the tokenizer in {folder} could not be read ({_reason(error)}); expected the files that"
            f" save_pretrained() writes: save it again, or type --tokenizer {BUILTIN}"
        ) from error
    _refuse_other_ids(tokenizer, folder)
    _refuse_renumbered(tokenizer, folder / "tokenizer.json")
    return _checked(tokenizer, str(folder))


def _as_trained(folder: Path) -> dict[str, Any]:
    """If a checkpoint's tokenizer was changed for other programs: the fields with which it was trained."""
    path = folder / "tokenizer_config.json"
    was = files.read_json(path).get(AS_TRAINED, {}) if path.is_file() else {}
    return {name: was[name] for name in KEPT_AS_TRAINED if name in was}


def _refuse_other_ids(tokenizer: Any, folder: Path) -> None:
    """Raise UserError if a folder holds a SentencePiece model and the tokenizer of transformers gives other ids than
    `sentencepiece` does: its conversions split some texts differently."""
    from sentencepiece import SentencePieceProcessor

    models = sorted(folder.glob("*.model"))
    if len(models) != 1 or not getattr(tokenizer, "is_fast", False):
        # Tokenizers of other classes take their ids from sentencepiece, or are refused (`samples/encoder.py`).
        return
    try:
        processor = SentencePieceProcessor(model_proto=models[0].read_bytes())
    except (RuntimeError, OSError, ValueError):
        return
    odd = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    size = processor.get_piece_size()
    own = [processor.id_to_piece(index) for index in range(size) if not any(is_odd(index) for is_odd in odd)]
    draw = random.Random(0)
    made = ("".join(draw.choices(own, k=12)).replace("\u2581", " ") for _ in range(_RANDOM_TEXTS))
    for text in (*_HARD_TEXTS, *made):
        ids, here = processor.encode(text), tokenizer.encode(text, add_special_tokens=False)
        if ids != here:
            raise UserError(
                f"the tokenizer in {folder} has other ids than its SentencePiece model {models[0].name}: {text!r} is"
                f" {here} and not {ids}; for those of sentencepiece type --tokenizer {models[0]}"
            )


def _refuse_renumbered(tokenizer: Any, path: Path) -> None:
    """Raise UserError if the `tokenizers` library gave an added token another id than its file says. It numbers added
    tokens on from the number of tokens, which is wrong if ids are missing."""
    try:
        added = files.read_json(path).get("added_tokens") or []
        wanted = {str(token["content"]): int(token["id"]) for token in added}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for content, index in wanted.items():
        if tokenizer.convert_tokens_to_ids(content) != index:
            raise UserError(
                f"{path}: the token {content!r} has the id {index} there, and the `tokenizers` library makes it"
                f" {tokenizer.convert_tokens_to_ids(content)}, because ids before it are missing; give the missing ids"
                f" to tokens of your own in its vocabulary, or type --tokenizer {BUILTIN}"
            )


def _from_tokenizer_json(path: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        return _from_folder(path.parent)  # tokenizer_config.json says which control token is which.
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
    _refuse_renumbered(tokenizer, path)
    return _checked(tokenizer, str(path))


def from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a SentencePiece model. Raises UserError if the file is not one."""
    from sentencepiece import SentencePieceProcessor

    # Checked first, because sentencepiece accepts an empty file.
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
        # "</s>" in a text is text. sentencepiece never makes control pieces from a text.
        split_special_tokens=True,
        # transformers maps pieces to ids by name. Without this, an unknown piece has its letters as its name, and the
        # letters "</s>" would be the control token in a model that has no piece for any of them.
        sp_model_kwargs={"emit_unk_piece": True},
        # Nothing is added before or after a text.
        special_tokens_pattern="none",
    )


@functools.cache
def _sentencepiece_class() -> Any:
    """Return a class for SentencePiece models: the exact one of transformers, with its decoding repaired.

    `transformers.SentencePieceBackend` takes ids from sentencepiece, but decodes by joining pieces: it strips spaces
    and prints bytes as "<0x0A>". Our class has the same name, because save_pretrained() writes that name. Without this
    package AutoTokenizer then finds the class of transformers: the same ids, and only the plainer decoding.
    """
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend as TransformersBackend

    class SentencePieceBackend(TransformersBackend):
        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            """The text of pieces as sentencepiece gives it. Control tokens are shown by name."""
            control = set(self.all_special_tokens)
            runs = itertools.groupby(tokens, key=control.__contains__)
            return "".join("".join(run) if named else self.sp_model.decode(list(run)) for named, run in runs)

    # pickle looks the class up here; see __getattr__.
    SentencePieceBackend.__module__, SentencePieceBackend.__qualname__ = __name__, "SentencePieceBackend"
    return SentencePieceBackend


def __getattr__(name: str) -> Any:
    """Make the class above an attribute of this module when asked for, because transformers takes seconds to import."""
    if name == "SentencePieceBackend":
        return _sentencepiece_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _checked(tokenizer: Any, source: str) -> PreTrainedTokenizerBase:
    """Refuse a tokenizer of control tokens alone, which transformers returns silently when files are missing."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"the tokenizer {source} knows {len(tokenizer)} control tokens and nothing else: its vocabulary is missing;"
            " expected a tokenizer.json or a SentencePiece .model beside its configuration: save it again, or type"
            f" --tokenizer {BUILTIN}"
        )
    if type(tokenizer) is SentencePieceBackend:
        # Only the decoding differs (see _sentencepiece_class). The object has the same contents.
        tokenizer.__class__ = _sentencepiece_class()
    return tokenizer


def _reason(error: BaseException) -> str:
    """The first line of a library's error, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


def _not_a_model(path: Path) -> str | None:
    """What a failed download left in place of a tokenizer file; None if the file looks like neither."""
    try:
        with open(path, "rb") as file:
            start = file.read(200).lstrip()
    except OSError as error:
        return error.strerror
    return not_a_download(start) if start else "it is empty"
