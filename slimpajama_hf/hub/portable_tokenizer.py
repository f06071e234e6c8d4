"""The tokenizer of a checkpoint as every `transformers` loads it: 4.57, 5, and what stands on them.

A SentencePiece model is saved by transformers 5 under a class that 4.57 does not have, and that prints bytes as
"<0x0A>" in 5. Its exact twin for the `tokenizers` library can be written wherever the model takes text as it is (as
those made here do): same ids, same text back. It is written only after it was found the same on texts that are meant to
break it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

#: The class name that both 4.57 and 5 know; the one that 5 writes, 4.57 does not.
CLASS_NAME = "PreTrainedTokenizerFast"
_NEW_CLASS_NAMES = ("TokenizersBackend",)

_SPACE = "▁"

#: Texts on which a twin that is only nearly right gives itself away.
_HARD_TEXTS = (
    "", " ", "  two  spaces  ", "\n\n\ttabs\r\n", " " * 70 + "x", f"{_SPACE} a{_SPACE}b", "1234567 89",
    "ünïcödé e\u0301", "日本語のテキスト 🎉🎉", "\x00\x01\x7f\u200b\u202e", "<unk><s></s>", "<0x0A>", "a" * 60,
    "def f(x):\n    return x**2\n",
)  # fmt: skip

#: Random texts of the model's own pieces beside them.
_RANDOM_TEXTS = 500


def files_for(folder: Path, texts: list[str]) -> dict[str, bytes]:
    """Files to be put in place of those of `folder` (a checkpoint), by name; none where they are portable as they are.

    `texts`: of the run's own corpus, to try a twin on.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    changed: dict[str, bytes] = {}
    if config.get("tokenizer_class") == "SentencePieceBackend" and (folder / "tokenizer.model").is_file():
        twin = _twin(folder / "tokenizer.model", texts)
        if twin is None:
            return {}
        changed["tokenizer.json"] = twin.encode()
        config = {name: value for name, value in config.items() if name not in ("backend", "sp_model_kwargs")}
        config["tokenizer_class"] = CLASS_NAME
    elif config.get("tokenizer_class") in _NEW_CLASS_NAMES:
        config["tokenizer_class"] = CLASS_NAME
    if isinstance(config.get("extra_special_tokens"), list):
        # 4.57 wants a mapping there, and has this name for the list.
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    if json.loads(text) != json.loads(path.read_text(encoding="utf-8")):
        changed["tokenizer_config.json"] = text.encode()
    return changed


def _twin(model: Path, texts: list[str]) -> str | None:
    """`tokenizer.json` with the ids of a SentencePiece BPE model; None where there is none that is the same."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor = SentencePieceProcessor(model_file=str(model))
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
    twin = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=_merges(plain, processor),
            unk_token=unknown,
            byte_fallback=bytes_known,
            fuse_unk=True,
        )
    )
    twin.normalizer = normalizers.Replace(" ", _SPACE)
    twin.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if not all(_same(processor, twin, text) for text in [*_HARD_TEXTS, *texts, *_random_texts(plain)]):
        return None
    control = [
        piece for index, piece in enumerate(pieces) if processor.is_control(index) or processor.is_unknown(index)
    ]
    twin.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return twin.to_str(pretty=False)


def _merges(plain: dict[str, int], processor: Any) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece joins them: the better piece first, by its score."""
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
    draw, pieces = random.Random(0), list(plain)
    return [
        "".join(draw.choice(pieces).replace(_SPACE, " ") for _ in range(draw.randint(1, 60)))
        for _ in range(_RANDOM_TEXTS)
    ]
