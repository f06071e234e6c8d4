"""Save a model's tokenizer so that every `transformers` loads it: 4.57, 5, and what builds on them.

transformers 5 saves a SentencePiece model under a class that 4.57 does not have and that prints bytes as "<0x0A>" in 5.
A BPE model that takes text as it is, like those made here, has an exact twin in the `tokenizers` library: same ids, and
the same text back. The twin is written only after it gave the same results on texts that are meant to break it.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from slimpajama_hf import files
from slimpajama_hf.samples.tokenizer import AS_TRAINED, KEPT_AS_TRAINED

#: The class name that both 4.57 and 5 know; 5 writes one that 4.57 does not know.
CLASS_NAME = "PreTrainedTokenizerFast"
_NEW_CLASS_NAMES = ("TokenizersBackend",)

_SPACE = "▁"

#: Texts on which a twin that is only nearly right differs.
_HARD_TEXTS = (
    "", " ", "  two  spaces  ", *(" " * count + "x" for count in range(1, 80)), f"{_SPACE} a{_SPACE}b", "1234567 89",
    "\n\n\ttabs\r\n", "ünïcödé e\u0301 naïve", "日本語のテキスト 🎉🎉", "\x00\x01\x7f\u200b\u202e", "<unk><s></s>",
    "<0x0A>", "a" * 60, "ab" * 40, "def f(x):\n    return x**2\n",
)  # fmt: skip

#: How many random texts, made of the model's own pieces, are tried too.
_RANDOM_TEXTS = 500


def files_for(folder: Path, positions: int | None) -> dict[str, bytes]:
    """Return name -> content of the files that replace those of `folder` (a saved model); none if it is portable.

    `positions`: the longest text that the model takes, in tokens; None if it has no limit. What is changed is also kept
    under `AS_TRAINED`: from that, `load_tokenizer` makes the tokenizer that the model was trained with.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    before: dict[str, Any] = files.read_json(path)
    if AS_TRAINED in before:
        return {}
    config, changed = dict(before), dict[str, bytes]()
    if before.get("tokenizer_class") == "SentencePieceBackend" and (folder / "tokenizer.model").is_file():
        twin = None if _has_tokens_beside(before, folder) else _twin((folder / "tokenizer.model").read_bytes())
        if twin is not None:
            changed["tokenizer.json"] = twin.encode()
            # Other programs write "</s>" after a text and mean the token. Only training reads it as letters.
            of_ours = ("backend", "sp_model_kwargs", "split_special_tokens")
            config = {name: value for name, value in config.items() if name not in of_ours}
            config["tokenizer_class"] = CLASS_NAME
    elif before.get("tokenizer_class") in _NEW_CLASS_NAMES:
        config["tokenizer_class"] = CLASS_NAME
    if isinstance(config.get("extra_special_tokens"), list):
        # 4.57 wants a mapping under this name, and has another name for the list.
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # How it was loaded for training does not concern others.
    config = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    # GPT-2 adds embeddings for token types if it gets any. Without this line 4.57 passes some.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["clean_up_tokenization_spaces"] = False
    if positions is not None:
        config["model_max_length"] = positions
    if config.get("pad_token") is None and (token := config.get("eos_token") or config.get("unk_token")) is not None:
        # Batches need a padding token. Attention never looks at it, and no loss counts it.
        config["pad_token"] = token
    config[AS_TRAINED] = {name: before.get(name) for name in KEPT_AS_TRAINED if before.get(name) != config.get(name)}
    changed["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def why_not_everywhere(config: dict[str, Any]) -> str | None:
    """Why transformers 4 does not load a saved tokenizer with this tokenizer_config.json, in a few words; None if it
    does."""
    if config.get("tokenizer_class") != "SentencePieceBackend":
        return None
    return "the `tokenizers` library has no exact form of this SentencePiece model"


def _has_tokens_beside(config: dict[str, Any], folder: Path) -> bool:
    """Whether tokens were added to those of the SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    size = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    return any(int(index) >= size for index in config.get("added_tokens_decoder", {}))


@functools.lru_cache(maxsize=2)  # Every checkpoint of a run asks for the same twin, and so does its average.
def _twin(model: bytes) -> str | None:
    """`tokenizer.json` that gives the same ids as a SentencePiece BPE model; None if there is no exact one."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor = SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    plain = {
        piece: index
        for index, piece in enumerate(pieces)
        if not (
            processor.is_control(index)
            or processor.is_unknown(index)
            or processor.is_byte(index)
            or processor.is_unused(index)
        )
    }
    unknown = pieces[processor.unk_id()]
    bytes_known = sum(processor.is_byte(index) for index in range(len(pieces))) == 256
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = _merges(plain, processor)
    try:
        twin = Tokenizer(
            models.BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=bytes_known, fuse_unk=True)
        )
    except Exception:  # tokenizers raises bare Exception, here for pieces that it cannot hold.
        return None
    twin.normalizer = normalizers.Replace(" ", _SPACE)
    twin.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if not all(_same(processor, twin, text) for text in [*_HARD_TEXTS, *_random_texts(plain)]):
        return None
    control = [
        piece for index, piece in enumerate(pieces) if processor.is_control(index) or processor.is_unknown(index)
    ]
    twin.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return twin.to_str(pretty=False)


def _merges(plain: dict[str, int], processor: Any) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which SentencePiece merges them: by score, the best piece first."""
    ranked = []
    for piece, index in plain.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in plain and pair[1] in plain]
        known.sort(key=lambda pair: (plain[pair[0]], plain[pair[1]]))
        ranked += [(-processor.get_score(index), index, pair) for pair in known]
    ranked.sort(key=lambda entry: entry[:2])
    return [pair for _, _, pair in ranked]


def _same(processor: Any, twin: Any, text: str) -> bool:
    ids = processor.encode(text)
    return ids == twin.encode(text).ids and processor.decode(ids) == twin.decode(ids, skip_special_tokens=False)


def _random_texts(plain: dict[str, int]) -> list[str]:
    """Texts made of the model's own pieces. Some pieces are repeated, which makes merges tie."""
    draw, pieces = random.Random(0), list(plain)
    return [
        "".join(
            draw.choice(pieces).replace(_SPACE, " ") * draw.choice((1, 1, 1, 5)) for _ in range(draw.randint(1, 60))
        )
        for _ in range(_RANDOM_TEXTS)
    ]
