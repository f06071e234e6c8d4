"""Tokenizers with real parts: the shipped model, models trained here, sentencepiece and transformers themselves."""

from __future__ import annotations

import base64
import json
import pickle
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
from backports import zstd
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from slimpajama_hf.corpus import embedded
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples import tokenizer_training
from slimpajama_hf.samples.encoder import Encoder
from slimpajama_hf.samples.tokenizer import BUILTIN_MODEL, KINDS, load_tokenizer
from slimpajama_hf.samples.tokenizer_training import train_tokenizer

ENGLISH = "The quick brown fox, it’s said, didn't jump over 1,234 lazy dogs — “twice”. Why not? "
CODE = "def f(a, *b):\n    if a:\n\t\treturn {'x': [1, 2.50e-3]}  # why\n\n\n    return None\r\n"
CHINESE = "语言模型一次学习一个文档每一步都可以看见可以解释也可以重放"
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\t\n \r\n",
    "  leading",
    "trailing   ",
    "a  b   c    d",
    "<s>",
    "</s>",
    "<unk> and <s>x</s> <|endoftext|>",
    "<0x0A><0x41>",
    "a\x00b\x01\x7f\x1b[0m",
    "\ufeffbom\u200bzero\u200dwidth\u2060\u00ad",
    "👩‍👩‍👧‍👦🏳️‍🌈😀 ok",
    "Привет, мир! Съешь ещё этих булок",
    CHINESE,
    "日本語テキスト、カタカナ。한국어 عربى עברית ไทย",
    "e\u0301 é ﬁ ½ Å ẞ İ",
    "\u2028\u2029\x85\xa0\u3000",
    "x" * 3000,
    "ab" * 999 + "😀" * 500,
    ENGLISH * 3,
    CODE * 3,
    "\U0010ffff\ue000\ufffd",
]
SIZES = {"sentencepiece-bpe": 1000, "sentencepiece-unigram": 800, "byte-bpe": 1500}
# Text in which sentencepiece's own mark stands comes back with a space: nothing else may change.
MARK = "▁under▁ ▁score▁"

FRESH = """
import json, sys
from transformers import AutoTokenizer
folders, texts = json.load(sys.stdin)
answers = {}
for name, folder in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers[name] = [len(tokenizer), tokenizer.eos_token_id, [tokenizer.encode(text) for text in texts]]
assert not any(name.startswith("slimpajama_hf") for name in sys.modules)
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Texts of the embedded corpus: `train` and `validation`."""
    folder = embedded.build(tmp_path_factory.mktemp("corpus"))
    parts = {}
    for name in (embedded.TRAIN, embedded.VALIDATION):
        with zstd.open(folder / name, "rt", encoding="utf-8", newline="\n") as file:
            parts[name.split(".")[0]] = [json.loads(line)["text"] for line in file]
    return parts


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small tokenizer of each kind."""
    root = tmp_path_factory.mktemp("trained")
    return {kind: train_tokenizer(corpus["train"][:1200], kind, SIZES[kind], root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def foreign(corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SentencePiece models as others train them: defaults (folds text, drops spaces), unigram without bytes."""
    root = tmp_path_factory.mktemp("foreign")
    lines = [line for text in corpus["train"][:800] for line in text.splitlines() if line.strip()]
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(root / kind),
            model_type=kind,
            vocab_size=700,
            character_coverage=0.98,
            minloglevel=2,
        )
    return {kind: root / f"{kind}.model" for kind in ("bpe", "unigram")}


@pytest.fixture(scope="module")
def encoders(trained, foreign) -> dict[str, Encoder]:
    sources = {"builtin": "builtin", **{k: str(v) for k, v in trained.items()}}
    sources |= {f"foreign-{k}": str(v) for k, v in foreign.items()}
    return {name: Encoder(load_tokenizer(source)) for name, source in sources.items()}


def reference(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def saved(encoders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tokenizer as a checkpoint has it: saved beside the configuration of a GPT-2 model."""
    root = tmp_path_factory.mktemp("saved")
    for name, encoder in encoders.items():
        encoder.tokenizer.save_pretrained(root / name)
        # AutoTokenizer looks at the model's type, too.
        GPT2Config(vocab_size=len(encoder.tokenizer)).save_pretrained(root / name)
    return {name: root / name for name in encoders}


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    return [*NASTY, MARK, *corpus["validation"][:100]]


@pytest.fixture(scope="module")
def fresh(saved, texts) -> dict[str, tuple[int, int, list[list[int]]]]:
    """What AutoTokenizer makes of `saved` in a process that cannot import this package: length, eos id, ids."""
    asked = json.dumps([{name: str(folder) for name, folder in saved.items()}, texts])
    done = subprocess.run([sys.executable, "-I", "-c", FRESH], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: tuple(answer) for name, answer in json.loads(done.stdout).items()}


# --- loading ---------------------------------------------------------------------------------------------------------


def test_shipped_model_is_sentencepiece_s_own_on_every_text(corpus) -> None:
    tokenizer = load_tokenizer("builtin")
    processor = reference(BUILTIN_MODEL)
    encoder = Encoder(tokenizer)
    assert len(tokenizer) == processor.vocab_size() == 4096
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    texts = corpus["validation"] + corpus["train"][:200] + NASTY + [MARK]
    assert len(texts) > 500
    for text in texts:
        ids = processor.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer(text)["input_ids"] == ids
        assert encoder.encode(text)[0] == ids
        assert 0 not in ids and 1 not in ids and 2 not in ids
        assert encoder.decode(ids) == tokenizer.decode(ids) == text.replace("▁", " ")


def test_common_characters_of_the_shipped_model_are_pieces_not_bytes() -> None:
    processor = reference(BUILTIN_MODEL)
    for character in [*map(chr, range(0x20, 0x7F)), "\n", "\t", "’", "“", "—"]:
        (index,) = processor.encode(character)
        assert not processor.is_byte(index), character


def test_shipped_model_on_english() -> None:
    text = (
        "The house stood on a slight rise just on the edge of the village. It stood on its own and looked over a broad"
        " spread of farmland. Not a remarkable house by any means; it was about thirty years old."
    )
    assert len(text) / len(Encoder(load_tokenizer("builtin")).encode(text)[0]) > 2.5


@pytest.mark.parametrize(
    "name", ["builtin", "sentencepiece-bpe", "sentencepiece-unigram", "foreign-bpe", "foreign-unigram"]
)
def test_sentencepiece_survives_saving_beside_a_gpt2_model(name, encoders, saved, fresh, texts) -> None:
    processor = reference(saved[name] / "tokenizer.model")
    tokenizer = encoders[name].tokenizer
    expected = [processor.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert fresh[name] == (processor.vocab_size(), processor.eos_id(), expected)
    again = load_tokenizer(str(saved[name]))
    assert [again.encode(text) for text in texts] == expected
    assert again.decode(expected[-1]) == tokenizer.decode(expected[-1])


def test_decoding_shows_control_tokens_unless_told_not_to() -> None:
    tokenizer = load_tokenizer("builtin")
    ids = [*tokenizer.encode("a\nb 😀"), 2, *tokenizer.encode(" c")]
    assert tokenizer.decode(ids) == "a\nb 😀</s> c"
    assert tokenizer.decode(ids, skip_special_tokens=True) == Encoder(tokenizer).decode(ids) == "a\nb 😀 c"
    assert Encoder(tokenizer).decode([*ids, 4096, 10**6, -1]) == "a\nb 😀 c"


def test_a_folder_with_a_bare_model_is_exact_too(foreign, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(foreign["bpe"].read_bytes())
    (tmp_path / "other.model").write_bytes(foreign["unigram"].read_bytes())
    tokenizer = load_tokenizer(str(tmp_path))
    processor = reference(foreign["bpe"])
    assert [tokenizer.encode(text) for text in NASTY] == [processor.encode(text) for text in NASTY]
    (tmp_path / "tokenizer.model").rename(tmp_path / "third.model")
    with pytest.raises(UserError, match=r"2 SentencePiece models \(other.model, third.model\)"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_json_by_itself_and_beside_its_configuration(trained, tmp_path: Path) -> None:
    path = trained["byte-bpe"] / "tokenizer.json"
    alone = tmp_path / "some.json"
    alone.write_bytes(path.read_bytes())
    expected = load_tokenizer(str(trained["byte-bpe"])).encode(CODE)
    for source in (path, alone):
        tokenizer = load_tokenizer(str(source))
        assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
        assert tokenizer.encode(CODE) == expected


def test_a_folder_with_a_sentencepiece_model_gives_its_ids_or_is_refused(foreign, trained, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(foreign["bpe"].read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"other ids than its SentencePiece model tokenizer\.model.*type --tokenizer"):
        load_tokenizer(str(tmp_path))
    # What is saved from one loaded as it should be is the same again.
    processor = reference(foreign["bpe"])
    load_tokenizer(str(tmp_path / "tokenizer.model")).save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert [again.encode(text) for text in NASTY] == [processor.encode(text) for text in NASTY]


def with_holes(source: Path, path: Path, added: list[dict[str, object]]) -> str:
    """A tokenizer.json whose ids begin to be 500 larger in its middle."""
    content = json.loads(source.read_text())
    content["model"]["vocab"] = {
        token: index + 500 * (index >= 300) for token, index in content["model"]["vocab"].items()
    }
    content["added_tokens"] += added
    path.write_text(json.dumps(content))
    return str(path)


def test_ids_with_holes_are_kept_and_the_model_gets_a_row_for_the_largest(trained, tmp_path: Path) -> None:
    from slimpajama_hf.model.presets import vocabulary

    source = trained["byte-bpe"] / "tokenizer.json"
    tokenizer = load_tokenizer(with_holes(source, tmp_path / "holes.json", []))
    encoder = Encoder(tokenizer)
    ids, _ = encoder.encode(CODE)
    largest = max(tokenizer.get_vocab().values())
    assert vocabulary(tokenizer) == encoder.size == largest + 1 == len(tokenizer) + 500
    assert max(ids) >= 800 and encoder.decode(ids) == CODE and encoder.piece(400) == "<400>"
    token = {"id": 5000, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}  # fmt: skip
    with pytest.raises(UserError, match=r"'<x>' has the id 5000 there.*missing"):
        load_tokenizer(with_holes(source, tmp_path / "added.json", [token]))


def test_a_token_added_to_a_sentencepiece_model_keeps_its_id(foreign) -> None:
    tokenizer = load_tokenizer(str(foreign["bpe"]))
    tokenizer.add_tokens(["<added>"])
    encoder = Encoder(tokenizer)
    assert encoder.piece(encoder.size - 1) == "<added>" and encoder.decode([encoder.size - 1]) == ""


def test_a_tokenizer_without_an_unknown_token_is_one_sentence(tmp_path: Path, capsys) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    with pytest.raises(UserError, match=r"no token for some of the text.*--tokenizer builtin"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, []))))
    assert encoder.encode("abc")[0] == [0, 1]
    assert "leaves out characters that it does not know" in capsys.readouterr().err


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: str(root / "gone.model"), "there is no tokenizer at"),
        (lambda root: "./gone", "there is no tokenizer at"),
        (lambda root: " ", "is empty"),
        (lambda root: str(root), "holds no tokenizer"),
        (lambda root: write(root / "a.model", b"<!DOCTYPE html><html>"), "it is an HTML page"),
        (lambda root: write(root / "a.model", b""), "it is empty"),
        (lambda root: write(root / "a.model", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda root: write(root / "a.model", BUILTIN_MODEL.read_bytes()[:5000]), "not a SentencePiece model"),
        (lambda root: write(root / "tokenizer.json", b"no json"), "is not a tokenizer"),
        (lambda root: write(root / "tokenizer.json", b'{"a": 1}'), "is not a tokenizer"),
        (lambda root: write(root / "tokenizer.json", b""), "it is empty"),
        (lambda root: str(Path(write(root / "d" / "tokenizer.json", b"{")).parent), "could not be read"),
        (
            lambda root: str(
                Path(write(root / "tokenizer_config.json", b'{"tokenizer_class":"GPT2Tokenizer"}')).parent
            ),
            "its vocabulary is missing",
        ),
        (lambda root: "no id at all", "could not be loaded from the Hugging Face Hub"),
    ],
)
def test_what_is_no_tokenizer_is_said_in_one_sentence(make, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(make(tmp_path))
    message = str(caught.value)
    assert said in message and "--tokenizer builtin" in message and "\n" not in message


def test_a_hub_that_is_not_there_is_told_soon_and_the_offline_way_is_named(tmp_path: Path) -> None:
    """In a process of its own: the endpoint is read when huggingface_hub is imported."""
    code = (
        "from slimpajama_hf.samples.tokenizer import load_tokenizer\n"
        "from slimpajama_hf.errors import UserError\n"
        "import time\n"
        "import transformers\n"
        "begun = time.monotonic()\n"
        "try: load_tokenizer('me/nothing', revision='main')\n"
        "except UserError as error: print(time.monotonic() - begun, error)\n"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent.parent,
    )
    seconds, message = done.stdout.split(" ", 1)
    assert float(seconds) < 15
    assert "me/nothing at revision main" in message and "--tokenizer builtin" in message


def test_loading_this_module_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, slimpajama_hf.samples.tokenizer, slimpajama_hf.corpus.embedded; print({'torch', 'transformers'} & {*sys.modules})"
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "set()\n"


# --- encoding --------------------------------------------------------------------------------------------------------


def test_control_tokens_in_a_document_are_letters(encoders) -> None:
    for name, encoder in encoders.items():
        tokenizer = encoder.tokenizer
        control = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        for text in ("a</s>b", "<s>", "x <|endoftext|> y", "<|endoftext|>", "</s></s>"):
            ids = encoder.encode(text)[0]
            assert ids and control.isdisjoint(ids), (name, text)
    # Reading them must stay possible for others: the tokenizer given is not changed.
    assert encoders["byte-bpe"].tokenizer.encode("<|endoftext|>") == [0]


def test_control_pieces_of_a_unigram_model_are_letters_too() -> None:
    """Such a model holds "</s>" as an ordinary piece: no switch of `tokenizers` keeps it from matching."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "</s>ab▁")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert 1 in tokenizer.encode("a</s>b", split_special_tokens=True)
    ids, ends = Encoder(tokenizer).encode("a</s>b")
    assert 1 not in ids and ends == sorted(ends) and ends[0] == 1 and ends[-1] == 6
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "a</s>b"


def test_ends_are_characters_never_decrease_and_cut_the_text_where_the_tokens_do(encoders, corpus) -> None:
    exact = {"builtin", *KINDS}
    for name, encoder in encoders.items():
        for text in [*NASTY, *corpus["validation"][:40]]:
            ids, ends = encoder.encode(text)
            assert len(ids) == len(ends) and ends == sorted(ends)
            assert all(0 <= end <= len(text) for end in ends)
            if name not in exact:
                continue
            assert not ids or ends[-1] == len(text), (name, text)
            assert encoder.decode(ids) == text
            for count in {min(1, len(ids)), len(ids) // 2} - {0}:
                decoded = encoder.decode(ids[:count])
                if "\ufffd" not in decoded:  # No character is cut into its bytes there.
                    assert decoded == text[: ends[count - 1]]


def random_text(source: random.Random, words: list[str]) -> str:
    """A text of 1 to 30,000 characters made of runs of one thing each, so that cuts fall into all of them."""
    parts: list[str] = []
    for _ in range(source.randint(1, 12)):
        kind = source.randrange(7)
        length = source.choice([1, 3, 20, 200, 2500])
        if kind == 0:
            parts.append(" ".join(source.choices(words, k=length)))
        elif kind == 1:
            parts.append(source.choice([" ", "\n", "\t", " \n", "\u3000", "a", "=", "é", "</s>"]) * length)
        elif kind == 2:
            parts.append("".join(source.choices(CHINESE, k=length)))
        elif kind == 3:
            parts.append(base64.b64encode(source.randbytes(length)).decode())
        elif kind == 4:
            parts.append("".join(source.choices("😀👩‍🌈🏳️e\u0301\u200b", k=length)))
        elif kind == 5:
            parts.append("".join(chr(source.choice([*range(1, 0x3000), 0x1F600])) for _ in range(length)))
        else:
            parts.append("".join(source.choices("0123456789.,-(){}'\"<>/ \n", k=length)))
    return "".join(parts)[:30_000]


def check_opening(encoder: Encoder, text: str, max_tokens: int, ids: list[int], ends: list[int]) -> None:
    opening = encoder.opening(text, max_tokens)
    assert opening.ids == ids[:max_tokens]
    assert opening.total_tokens in (None, len(ids))
    if len(ids) <= max_tokens:
        assert (opening.end, opening.total_tokens) == (len(text), len(ids))
    else:
        assert opening.end == ends[max_tokens - 1]


@pytest.mark.parametrize("max_tokens", [1, 2, 10, 256])
def test_an_opening_is_the_beginning_of_the_whole(encoders, corpus, max_tokens: int) -> None:
    source = random.Random(0)
    texts = {
        "prose": "\n\n".join(text for text in corpus["validation"] if not text.startswith(("def", "class", "@")))[
            :60_000
        ],
        "code": "\n".join(text for text in corpus["validation"] if text.startswith("def"))[:60_000],
        "chinese": "".join(source.choices(CHINESE, k=20_000)),
        "base64": base64.b64encode(source.randbytes(30_000)).decode(),
        "one letter": "a" * 20_000,
        "emoji": "👩‍👩‍👧‍👦😀🏳️‍🌈" * 1500,
        "digits": "".join(source.choices("0123456789", k=20_000)),
        "mixed": (ENGLISH + CHINESE + CODE + "😀" * 9) * 150,
        "short": ENGLISH,
        "empty": "",
    }
    for name, encoder in encoders.items():
        for kind, text in texts.items():
            ids, ends = encoder.encode(text)
            try:
                check_opening(encoder, text, max_tokens, ids, ends)
            except AssertionError as error:
                raise AssertionError(f"{name}, {kind}") from error


def test_openings_of_random_texts(encoders) -> None:
    words = (ENGLISH + CODE).split()
    for seed in range(15):
        source = random.Random(seed)
        text = random_text(source, words)
        for name, encoder in encoders.items():
            ids, ends = encoder.encode(text)
            for max_tokens in (1, 2, 7, 64, 256, 700):
                try:
                    check_opening(encoder, text, max_tokens, ids, ends)
                except AssertionError as error:
                    raise AssertionError(f"{name}, seed {seed}, {max_tokens} tokens") from error


def test_a_million_spaces_and_then_text(encoders) -> None:
    text = " " * 1_000_000 + ENGLISH * 100
    for encoder in encoders.values():
        ids, ends = encoder.encode(text)
        check_opening(encoder, text, 64, ids, ends)


def test_cost_of_an_opening_does_not_grow_with_the_text(encoders) -> None:
    for encoder in (encoders["builtin"], encoders["byte-bpe"], encoders["sentencepiece-unigram"]):
        for unit in (ENGLISH, CHINESE, "QmFzZTY0", CODE):
            long = unit * (20_000_000 // len(unit))
            encoder.opening(long, 256)
            begun = time.perf_counter()
            for _ in range(5):
                assert len(encoder.opening(long, 256).ids) == 256
            # 1 ms each on a free core; tokenizing all of it takes seconds.
            assert (time.perf_counter() - begun) / 5 < 0.1


def test_encoding_four_kilobytes_is_quick(corpus) -> None:
    encoder = Encoder(load_tokenizer("builtin"))
    text = "\n".join(corpus["validation"])[:4096]
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        encoder.encode(text)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.004  # 1.2 ms on a free core of 2026; the bound is for a crowded one.


def test_an_opening_of_nothing_is_refused_and_surrogates_are_no_text(encoders) -> None:
    with pytest.raises(ValueError, match="max_tokens is 0"):
        encoders["builtin"].opening("a", 0)
    for encoder in encoders.values():
        with pytest.raises(UnicodeEncodeError):
            encoder.encode("a\ud800b")


def test_an_encoder_can_be_pickled(encoders) -> None:
    for encoder in encoders.values():
        copy = pickle.loads(pickle.dumps(encoder))
        assert copy.encode(CODE) == encoder.encode(CODE)
        assert copy.decode(copy.encode(CODE)[0]) == encoder.decode(encoder.encode(CODE)[0])


def test_truncation_and_padding_of_the_tokenizer_do_not_reach_the_encoder(trained) -> None:
    tokenizer = load_tokenizer(str(trained["byte-bpe"]))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(CODE, truncation=True, max_length=3, padding="max_length")
    assert len(Encoder(tokenizer).encode(CODE)[0]) > 20


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_loses_nothing_and_loads_anywhere(kind: str, trained, encoders, fresh, texts) -> None:
    tokenizer, encoder = encoders[kind].tokenizer, encoders[kind]
    length, eos, fresh_ids = fresh[kind]
    assert length == len(tokenizer) and eos == tokenizer.eos_token_id
    for text, ids in zip(texts, fresh_ids, strict=True):
        if text != MARK:
            assert encoder.decode(encoder.encode(text)[0]) == text
        if "<|" not in text:  # byte-level BPE reads its control token from a text unless told not to.
            assert ids == encoder.encode(text)[0]
    assert [path.name for path in trained[kind].parent.iterdir() if path.name.startswith("_")] == []
    if kind != "byte-bpe":
        processor = reference(trained[kind] / "tokenizer.model")
        assert [processor.id_to_piece(index) for index in range(3)] == ["<unk>", "<s>", "</s>"]


def test_the_same_texts_give_the_same_bytes(corpus, trained, tmp_path: Path) -> None:
    """In a process of its own: hashes of strings, which differ between processes, must not decide."""
    (tmp_path / "texts.json").write_text(json.dumps(corpus["train"][:1200]), encoding="utf-8")
    code = (
        "import json, pathlib, sys\n"
        "from slimpajama_hf.samples.tokenizer_training import train_tokenizer\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "texts = json.loads((root / 'texts.json').read_text(encoding='utf-8'))\n"
        "for kind, size in json.loads(sys.argv[2]).items(): train_tokenizer(texts, kind, size, root / kind)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(SIZES)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent.parent)
    for kind in KINDS:
        names = sorted(path.name for path in trained[kind].iterdir())
        assert names == sorted(path.name for path in (tmp_path / kind).iterdir())
        for name in names:
            assert (trained[kind] / name).read_bytes() == (tmp_path / kind / name).read_bytes(), (kind, name)


def test_long_documents_are_not_dropped(tmp_path: Path) -> None:
    """SentencePiece skips sentences longer than it was told to expect: one of a million characters must count."""
    text = " ".join(f"wort{number % 97} satz" for number in range(100_000))
    folder = train_tokenizer([text, "语" * 20_000], "sentencepiece-bpe", 370, tmp_path / "long")
    processor = reference(folder / "tokenizer.model")
    assert len(processor.encode(" satz")) <= 2
    assert not processor.is_byte(processor.encode("语")[-1])


def test_something_is_said_every_two_seconds_while_text_comes_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenizer_training._HEARTBEAT_SECONDS <= 2
    monkeypatch.setattr(tokenizer_training, "_HEARTBEAT_SECONDS", 0.1)  # The same at a pace for tests.
    said: list[str] = []

    def slow() -> object:
        for part in range(5):
            time.sleep(0.1)
            yield ENGLISH * 3 + str(part)

    train_tokenizer(slow(), "sentencepiece-bpe", 370, tmp_path / "slow", said.append)  # type: ignore[arg-type]
    assert sum("reading text for the tokenizer" in line for line in said) >= 2
    assert "written to" in said[-1]


@pytest.mark.parametrize(
    ("kind", "vocab_size", "texts", "said"),
    [
        ("wordpiece", 1000, [ENGLISH], "no tokenizer kind 'wordpiece'"),
        *((kind, 100_000, [ENGLISH] * 5, "expected at most") for kind in KINDS),
        *((kind, 200, [ENGLISH] * 5, "expected at least") for kind in KINDS),
        *((kind, 0, [ENGLISH] * 5, "expected at least") for kind in KINDS),
        *((kind, 1000, [], "too little text") for kind in KINDS),
        *((kind, 1000, ["", "\ud800"], "too little text") for kind in KINDS),
        *((kind, 10**12, [ENGLISH], "more than any model uses") for kind in KINDS),
    ],
)
def test_what_cannot_be_trained_is_said(kind: str, vocab_size: int, texts, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        train_tokenizer(texts, kind, vocab_size, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_that_is_named_works(kind: str, tmp_path: Path) -> None:
    for vocab_size, word in ((100_000, "most"), (1, "least")):
        with pytest.raises(UserError) as caught:
            train_tokenizer([ENGLISH * 5, CODE.replace("\r", "") * 5], kind, vocab_size, tmp_path / word)
        found = re.search(rf"expected at {word} (\d+)", str(caught.value))
        assert found
        train_tokenizer([ENGLISH * 5, CODE.replace("\r", "") * 5], kind, int(found[1]), tmp_path / word)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_texts_comes_through(kind: str, tmp_path: Path) -> None:
    def broken() -> object:
        yield ENGLISH
        raise UserError("the stream ended")

    with pytest.raises(UserError, match="the stream ended"):
        train_tokenizer(broken(), kind, 600, tmp_path / "out")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not overwritten"):
        train_tokenizer([ENGLISH], "byte-bpe", 300, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        train_tokenizer([ENGLISH], "byte-bpe", 300, tmp_path / "mine.txt" / "below")
    assert (tmp_path / "mine.txt").read_text() == "x"
