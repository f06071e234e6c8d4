"""Files as people have them: each gives what can be read of it, and says what cannot."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from slimpajama_hf.corpus import documents, local_files, opening, unchanged
from slimpajama_hf.corpus.documents import HELD_OUT, Cursor, Document, Unusable, is_held_out
from slimpajama_hf.corpus.shards import BrokenShard, path_of
from slimpajama_hf.errors import UserError
from slimpajama_hf.files import looks_local
from slimpajama_hf.samples.stream import SampleStream
from tests.conftest import make_records, write_records
from tests.corpus.odd_files import LFS_POINTER, compressed, make

TEXTS = [f"document number {number} about the river and the city stone" for number in range(6)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(place: Path | str, **how: Any) -> tuple[list[Document], Counter[str]]:
    """Documents of what `--dataset` would name, and what was passed over, by reason."""
    documents, passed_over = [], Counter[str]()
    for record in opening.open_corpus(str(place), **how).records(Cursor()):
        if isinstance(record, Document):
            documents.append(record)
        else:
            passed_over[record.reason] += 1
    return documents, passed_over


def texts_of(place: Path | str, **how: Any) -> list[str]:
    return [document.text for document in read(place, **how)[0]]


def refused(place: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(place)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ---- parquet -------------------------------------------------------------------------------------------------------


def table(path: Path, **columns: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_bad_value_in_a_parquet_batch_costs_its_record_alone(tmp_path):
    import pyarrow

    data = pyarrow.array([text.encode() if number != 2 else b"caf\xe9" for number, text in enumerate(TEXTS)])
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), "dictionary"):
        column = (
            data.view(pyarrow.string()).dictionary_encode() if kind == "dictionary" else data.cast(kind, safe=False)
        )
        documents, passed_over = read(table(tmp_path / "a.parquet", text=column))
        assert [document.row for document in documents] == [0, 1, 3, 4, 5]
        assert passed_over == {"not UTF-8": 1}


def test_a_column_that_is_not_the_text_never_stops_reading(tmp_path):
    import pyarrow

    far = pyarrow.StructArray.from_arrays([pyarrow.array([2**62] * 6, pyarrow.timestamp("us"))], ["timestamp"])
    documents, _ = read(table(tmp_path / "far.parquet", text=pyarrow.array(TEXTS), meta=far))
    assert [(document.text, document.domain) for document in documents] == [(text, "unknown") for text in TEXTS]
    bad = pyarrow.array([b"caf\xe9"] * 6).view(pyarrow.string())
    documents, _ = read(table(tmp_path / "bad.parquet", text=pyarrow.array(TEXTS), source=bad))
    assert [document.domain for document in documents] == ["caf\ufffd"] * 6
    # A column whose pages are damaged, that of the text being whole.
    path = table(tmp_path / "damaged.parquet", text=pyarrow.array(TEXTS), source=pyarrow.array(["the web"] * 6))
    whole = path.read_bytes()
    at = whole.index(b"the web")
    path.write_bytes(whole[: at - 8] + b"\xff" * 16 + whole[at + 8 :])
    assert texts_of(path) == TEXTS


# ---- bytes that are not what the name says -------------------------------------------------------------------------


def test_a_lone_surrogate_in_a_domain_is_replaced_once_at_the_door(tmp_path):
    documents, _ = read(written(tmp_path / "a.jsonl", b'{"text": "fine", "source": "cut emoji \\ud83d"}\n'))
    assert documents[0].domain == "cut emoji \ufffd"


@pytest.mark.parametrize("name", ["A.JSONL.ZST", "A.Jsonl.GZ", "A.JSONL", "A.NDJSON"])
def test_upper_case_endings_are_endings(tmp_path, name):
    assert texts_of(written(tmp_path / name, compressed(LINES, name.lower()))) == TEXTS


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", LFS_POINTER, "git lfs pull"),
        ("a.jsonl.zst", LFS_POINTER, "git lfs pull"),
        ("a.parquet", LFS_POINTER, "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html></html>", "HTML"),
        ("a.jsonl.gz", b"<html></html>", "HTML"),
        ("a.txt", "\ufeffdocument\n".encode("utf-16-le"), "iconv -f UTF-16"),
        ("a.jsonl", LINES.decode().encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("a.jsonl.gz", gzip.compress(LINES.decode().encode("utf-32")), "iconv -f UTF-32"),
        ("a.jsonl", gzip.compress(LINES), "a.jsonl.gz"),
        ("a.jsonl.gz", compressed(LINES, ".zst"), "a.jsonl.zst"),
        ("a.jsonl.zst", LINES, "plain text"),
        ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "jq -c"),
        ("a.jsonl", b"/nowhere/blob", "link"),
        ("a.parquet", LINES, "plain text"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named_with_what_to_type(tmp_path, name, data, words):
    refused(written(tmp_path / name, data), name, words)


def test_one_such_file_among_others_is_refused_before_anything_is_read_or_set_aside(tmp_path):
    for number, data in enumerate((LINES, LFS_POINTER, LINES)):
        written(tmp_path / f"{number}.jsonl", data)
    refused(tmp_path / "*.jsonl", "1.jsonl", "git lfs pull")
    documents, passed_over = [], []
    corpus = opening.open_corpus(str(tmp_path), skip_broken_shards=True)
    for record in corpus.records(Cursor(), skip_broken_shards=True):
        (documents if isinstance(record, Document) else passed_over).append(record)
    assert (len(documents), [(gap.shard, "git lfs pull" in gap.reason) for gap in passed_over]) == (
        12, [("1.jsonl", True)],
    )  # fmt: skip


def test_a_mark_at_the_beginning_is_no_text_but_a_run_of_an_older_version_goes_on_with_it(tmp_path):
    path = written(tmp_path / "a.txt", b"\xef\xbb\xbffirst\nsecond\n")
    corpus = opening.open_corpus(str(path))
    assert [record.text for record in corpus.records(Cursor())] == ["first", "second"]
    older = {
        name: value for name, value in corpus.describe().items() if name not in ("txt_documents", "held_out_fraction")
    }
    assert [record.text for record in unchanged.recorded(older).records(Cursor())] == ["\ufefffirst", "second"]


# ---- what comes before an error ------------------------------------------------------------------------------------


def until_broken(path: Path) -> tuple[list[str], int]:
    found: list[str] = []
    with pytest.raises(BrokenShard) as caught:
        for record in opening.open_corpus(str(path)).records(Cursor()):
            found.append(record.text if isinstance(record, Document) else record.reason)
    return found, caught.value.row


@pytest.mark.parametrize("ending", [".zst", ".gz"])
def test_what_was_unpacked_before_an_error_is_given_out_before_it(tmp_path, ending):
    packed = compressed(LINES, ending)
    garbage = written(tmp_path / f"garbage.jsonl{ending}", packed + b"garbage")
    assert until_broken(garbage) == (TEXTS, 6)
    # Damage in the middle of one frame: as many lines as come out of a decompressor that is given byte by byte.
    draw = random.Random(5)
    many = [f"{number} " + "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=300)) for number in range(1500)]
    whole = bytearray(compressed("".join(json.dumps({"text": text}) + "\n" for text in many).encode(), ending))
    place = len(whole) // 2
    whole[place : place + 90_000] = draw.randbytes(90_000)
    unpacker = zlib.decompressobj(31) if ending == ".gz" else zstd.ZstdDecompressor()
    out = b""
    with pytest.raises((zlib.error, zstd.ZstdError)):
        for byte in whole:
            out += unpacker.decompress(bytes([byte]))
    found, row = until_broken(written(tmp_path / f"damaged.jsonl{ending}", bytes(whole)))
    assert row == len(found) == out.count(b"\n") > 300
    assert found[:300] == many[:300]


def test_a_frame_that_looks_2_gb_back_is_read(tmp_path):
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    packer = zstd.ZstdCompressor(options=options)
    data = packer.compress(LINES) + packer.flush()
    assert texts_of(written(tmp_path / "long.jsonl.zst", data)) == TEXTS


# ---- names ---------------------------------------------------------------------------------------------------------


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    for number in (0, 2):
        written(tmp_path / f"p{number}.jsonl", LINES)
    (tmp_path / "p1.jsonl").symlink_to("/nowhere/blob")
    for place in (tmp_path, tmp_path / "*.jsonl", tmp_path / "p1.jsonl"):
        refused(place, "p1.jsonl", "/nowhere/blob", "missing")


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path, monkeypatch, capsys):
    for name in ("b/2.JSONL", "a.txt", "c.jsonl.gz", "b/1.jsonl", "notes.md", ".hidden.jsonl", "b/.git/x.jsonl"):
        written(tmp_path / name, compressed(LINES, name))
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    corpus = opening.open_corpus(str(tmp_path))
    assert [shard.name for shard in corpus.files] == ["a.txt", "b/1.jsonl", "b/2.JSONL", "c.jsonl.gz"]
    assert corpus.files_in_words() == "4 files: 2 .jsonl, 1 .jsonl.gz, 1 .txt (one line is one document)"
    said = capsys.readouterr().err
    assert "1 .md" in said and "2 hidden" in said
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [shard.name for shard in opening.open_corpus("~/b/*.jsonl").files] == ["1.jsonl"]
    with pytest.raises(UserError, match=r"no file in this folder can be read; it holds 1 \.md"):
        local_files.find(str(written(tmp_path / "only" / "x.md", b"x").parent))


def test_bytes_in_a_name_that_are_no_utf8_are_shown_and_the_file_is_found_again(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")
    with open(name, "wb") as file:
        file.write(LINES)
    corpus = opening.open_corpus(str(tmp_path))
    described = json.dumps(corpus.describe(), ensure_ascii=False).encode("utf-8")
    again = unchanged.check_unchanged(unchanged.recorded(json.loads(described)))
    assert again.files[0].name == "caf\\xe9.jsonl" and os.fsencode(path_of(again.files[0].url)) == name
    assert [record.text for record in again.records(Cursor())] == TEXTS


def test_txt_documents(tmp_path):
    path = written(tmp_path / "a.txt", b"one\r\ntwo\r\n\r\n  \r\nthree\r\n")
    assert texts_of(path) == ["one", "two", "three"]
    assert texts_of(path, txt_documents="paragraph") == ["one\ntwo", "three"]
    assert texts_of(path, txt_documents="file") == ["one\ntwo\n\n  \nthree\n"]
    corpus = opening.open_corpus(str(path), txt_documents="paragraph")
    assert [record.text for record in corpus.records(Cursor(shard="a.txt", row=1))] == ["three"]
    assert unchanged.recorded(corpus.describe()).txt_documents == "paragraph"
    assert "one paragraph is one document" in corpus.files_in_words()


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("checkpoints/checkpoint_step_2000.bin", True), ("./z", True), ("~/z", True), ("a/b/c", True), ("/z", True),
        ("x.json", True), ("me/run", False), ("gpt2", False), ("owner/phi-1.5", False), ("owner/model.v2", False),
    ],
)  # fmt: skip
def test_what_looks_like_a_path_never_goes_to_the_hub(name, local):
    from slimpajama_hf.hub import fetch

    assert looks_local(name) is local
    assert fetch.is_repo(name) is (not local and "/" in name)
    if local:
        from slimpajama_hf.samples.tokenizer import load_tokenizer

        refused(name, "no such file")
        with pytest.raises(UserError, match="there is no tokenizer at"):
            load_tokenizer(name)


# ---- held out ------------------------------------------------------------------------------------------------------


def test_the_held_out_share_and_all_the_rest_are_the_corpus(tmp_path):
    path = write_records(tmp_path / "a.jsonl", make_records(400, seed=3))
    whole = opening.open_corpus(str(path))
    corpus = dataclasses.replace(whole, held_out_fraction=0.05)
    every = list(whole.records(Cursor()))
    trained = list(corpus.records(Cursor()))
    kept = list(corpus.held_out().records(Cursor()))
    assert [record.row for record in trained] == list(range(400))
    out = [record.row for record in trained if isinstance(record, Unusable)]
    assert {record.reason for record in trained if isinstance(record, Unusable)} == {HELD_OUT}
    assert kept == [every[row] for row in out] and 5 < len(kept) < 40
    assert all(is_held_out(document.sha1, 0.05) for document in kept)
    again = unchanged.recorded(json.loads(json.dumps(corpus.describe())))
    assert list(again.records(Cursor())) == trained and opening.validation_of(again) == again.held_out()


# ---- made from a seed ----------------------------------------------------------------------------------------------


def accounted(seed: int, folder: Path, encoder: Any) -> str:
    """Reads one odd input to its end or its error; asserts that every record is read, passed over or named."""
    odd = make(seed, folder)
    try:
        corpus = opening.open_corpus(odd.path)
    except UserError as error:
        # Nothing was read: the file is named, and with it all of its records.
        assert "\n" not in str(error) and odd.name in str(error), (odd, error)
        str(error).encode("utf-8")
        return "refused"
    stream = SampleStream(corpus, encoder, "truncate", 64, read_ahead=0)
    samples, broken = [], None
    try:
        samples.extend(stream)
    except BrokenShard as error:
        broken = error
    passed_over = sum(sum(sample.skipped.values()) for sample in samples) + sum(stream.skipped_at_end.values())
    assert len(samples) + passed_over == (odd.written if broken is None else broken.row), (odd, broken)
    for sample in samples:
        # What the ledger keeps of it is UTF-8, and no text was made up.
        json.dumps([sample.document.domain, sample.document.shard], ensure_ascii=False).encode("utf-8")
        sample.document.text.encode("utf-8")
    known = set(odd.texts)
    # Latin-1 is no text here, and a parquet file has no checksum that would tell of a changed letter.
    if odd.kind.partition(" .")[0] not in ("encoding", "parquet cut") and broken is None:
        assert {sample.document.text for sample in samples} <= known | {"one", "a string"}, odd.kind
    return "broken" if broken else "read"


def test_twenty_odd_inputs_are_accounted_for(tmp_path, encoder):
    outcomes = Counter(accounted(seed, tmp_path, encoder) for seed in range(24))
    assert outcomes["read"] >= 8 and outcomes["refused"] >= 2, outcomes


@pytest.mark.slow
def test_240_odd_inputs_are_accounted_for(tmp_path, encoder, fault_table):
    outcomes = Counter(accounted(seed, tmp_path, encoder) for seed in range(1000, 1240))
    assert outcomes["read"] >= 80 and outcomes["refused"] >= 20 and outcomes["broken"] >= 10, outcomes
    fault_table("odd files", 240, bit_equal=None)


@pytest.mark.parametrize(("read", "advised"), [(0, True), (5, True), (6, False), (200, False)])
def test_another_column_is_advised_where_most_records_have_no_text(read, advised):
    words = documents.in_words({"no 'text'": 6}, {"content": 90, "id": -1}, "text", read)
    assert words.startswith("6 records without a `text`; fields seen: `content`, `id`")
    assert ("; try --text_column content" in words) == advised
