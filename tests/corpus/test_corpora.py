"""Where text comes from: formats, cursors, unusable records, mirrors."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slimpajama_hf.corpus import formats, opening, unchanged
from slimpajama_hf.corpus import shards as shards_module
from slimpajama_hf.corpus.documents import Cursor, Document, Unusable, domain_of
from slimpajama_hf.errors import UserError
from tests.conftest import make_records, run_script, write_records
from tests.hub.loopback_hub import LoopbackHub

if TYPE_CHECKING:
    from slimpajama_hf.corpus import corpus


def documents(corpus: corpus.Corpus, start: Cursor | None = None) -> list[Document]:
    return [record for record in corpus.records(start or Cursor()) if isinstance(record, Document)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_records_in_order_with_their_place(tmp_path, name):
    records = make_records(20)
    write_records(tmp_path / name, records)
    found = documents(opening.open_corpus(str(tmp_path / name)))
    assert [document.text for document in found] == [record["text"] for record in records]
    assert [document.domain for document in found] == [record["meta"]["redpajama_set_name"] for record in records]
    assert [(document.mirror, document.shard, document.row) for document in found] == [
        ("local", name, row) for row in range(20)
    ]
    import hashlib

    assert found[3].sha1 == hashlib.sha1(records[3]["text"].encode()).hexdigest()


def test_a_text_file_is_one_document_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("first line\r\n\nsecond größe\n   \nthird".encode())
    found = documents(opening.open_corpus(str(tmp_path / "a.txt")))
    assert [(document.row, document.text) for document in found] == [
        (0, "first line"),
        (2, "second größe"),
        (4, "third"),
    ]


def test_a_glob_is_read_in_order_of_names(shards):
    found = documents(opening.open_corpus(f"{shards}/*.jsonl.zst"))
    assert [document.shard for document in found[::30]] == [f"example_train_{number}.jsonl.zst" for number in range(3)]
    assert len(found) == 90


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "a.jsonl"])
def test_reading_goes_on_at_any_cursor_without_earlier_shards(tmp_path, monkeypatch, name):
    for number in range(3):
        write_records(tmp_path / f"{number}{name}", make_records(20, seed=number))
    corpus = opening.open_corpus(f"{tmp_path}/*")
    whole = documents(corpus)
    opened = []
    real = shards_module.open_raw
    monkeypatch.setattr(
        shards_module, "open_raw", lambda url, patience: opened.append(os.path.basename(url)) or real(url)
    )
    for place in (0, 1, 19, 20, 33, 59):
        opened.clear()
        after = whole[place]
        rest = documents(corpus, Cursor(shard=after.shard, row=after.row + 1))
        assert rest == whole[place + 1 :]
        assert opened == [f"{number}{name}" for number in range(place // 20, 3)]


@pytest.mark.parametrize(
    "meta",
    [
        {"redpajama_set_name": "RedPajamaArXiv"},
        json.dumps({"redpajama_set_name": "RedPajamaArXiv"}),
        str({"redpajama_set_name": "RedPajamaArXiv"}),
    ],
)
def test_meta_in_all_three_shapes(meta):
    assert domain_of({"text": "x", "meta": meta}) == "RedPajamaArXiv"


@pytest.mark.parametrize("meta", [None, 3, "nonsense", "__import__('os')", [], {"redpajama_set_name": 4}, "(" * 5000])
def test_no_domain_is_unknown(meta):
    assert domain_of({"text": "x", "meta": meta}) == "unknown"


def test_unusable_records_are_named_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE_BYTES", 2**20)
    lines = [
        '{"text": "first good one"}',
        '{"text": null}',
        '{"text": 12}',
        '{"text": ["a"]}',
        '{"text": {"a": "b"}}',
        '{"text": ""}',
        '{"text": "' + " " * 100_000 + '"}',
        '{"text": "lone \\ud800 surrogate"}',
        '{"other": "x"}',
        '["text"]',
        '{"text": "cut in the mid',
        '{"text": "' + "long " * 300_000 + '"}',
        "",
        '{"text": "one", "text": "the last of two keys counts"}',
        '{"text": "last good one"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff\xfe not utf-8"}\n{"text": "after all"}\n')
    records = list(opening.open_corpus(str(path)).records(Cursor()))
    reasons = [record.reason if isinstance(record, Unusable) else record.text for record in records]
    assert reasons == [
        "first good one", "text is null", "text is a int", "text is a list", "text is a dict", "empty", "blank",
        "lone surrogate", "no 'text'", "not a record", "not JSON", "longer than 1 MB", "empty line",
        "the last of two keys counts", "last good one", "not UTF-8", "after all",
    ]  # fmt: skip
    assert [record.row for record in records] == list(range(17))


def test_a_50_mb_line_is_passed_over_in_bounded_memory(tmp_path):
    import tracemalloc

    from backports import zstd

    path = tmp_path / "bomb.jsonl.zst"
    with zstd.open(path, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(50):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "after"}\n')
    assert path.stat().st_size < 20_000
    corpus = opening.open_corpus(str(path))
    tracemalloc.start()
    try:
        records = list(corpus.records(Cursor()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [getattr(record, "text", None) or record.reason for record in records] == [
        "before",
        "longer than 32 MB",
        "after",
    ]
    assert peak < 2 * formats.LONGEST_LINE_BYTES


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_a_truncated_file_is_an_error_and_not_a_silent_end(tmp_path, name):
    path = write_records(tmp_path / name, make_records(300))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        documents(opening.open_corpus(str(path)))


def _make(folder: Path, what: str) -> str:
    path = folder / what
    if what == "folder":
        path.mkdir()
    elif what.startswith("html."):
        path.write_text("<html>not found</html>")
    elif what == "notext.parquet":
        write_records(path, [{"content": "a", "url": "b"}])
    elif what == "empty.jsonl":
        path.write_text("")
    elif what == "picture.png":
        path.write_bytes(b"\x89PNG")
    return str(path)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing.jsonl", "no such file"),
        ("folder", "no file in this folder"),
        ("html.jsonl.zst", "HTML page"),
        ("html.jsonl.gz", "HTML page"),
        ("html.parquet", "HTML page"),
        ("notext.parquet", "content, url"),
        ("empty.jsonl", "no record"),
        ("picture.png", "cannot read .png"),
        ("*.jsonl", "no such file"),
        ("no where at all!", "no such file"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, what, words):
    with pytest.raises(UserError, match=words) as caught:
        opening.open_corpus(_make(tmp_path, what))
    assert "\n" not in str(caught.value)


def test_a_corpus_can_be_opened_again_from_its_description(shards):
    corpus = opening.open_corpus(f"{shards}/*.jsonl.zst")
    again = unchanged.recorded(json.loads(json.dumps(corpus.describe())))
    assert documents(again) == documents(corpus)


@pytest.fixture
def hub(tmp_path):
    """A loopback Hub that has the third mirror in its real layout and neither of the other two."""
    with LoopbackHub() as server:
        folder = tmp_path / "hub" / "slimpajama_6b"
        for number in range(2):
            write_records(folder / "data" / f"train-{number:05d}-of-00002.parquet", make_records(15, seed=number))
        write_records(folder / "data" / "validation-00000-of-00001.parquet", make_records(5, seed=9))
        server.datasets["DKYoon/SlimPajama-6B"] = folder
        yield server


def run_with(server: LoopbackHub, *flags: str, tmp_path: Path):
    return run_script(*flags, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hf_home"))


@pytest.mark.long
def test_the_first_mirror_that_opens_is_used_named_and_recorded(hub, tmp_path):
    run = tmp_path / "run"
    # The corpus of a command that names none.
    flags = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=32,n_head=2"]
    done = run_with(
        hub,
        *flags,
        "--tokenizer",
        "builtin",
        "--max_steps",
        "18",
        "--no-checkpoint",
        "--output_dir",
        str(run),
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert {row["mirror"] for row in rows} == {"DKYoon/SlimPajama-6B@b5f90f419b74"}
    places = [("data/train-00000-of-00002.parquet", row) for row in range(15)]
    places += [("data/train-00001-of-00002.parquet", row) for row in range(3)]
    assert [(row["shard"], row["row"]) for row in rows] == places
    assert "DKYoon/SlimPajama-6B@b5f90f419b74" in done.stderr
    assert json.loads((run / "run.json").read_text())["corpus"]["revision"].startswith("b5f90f419b74")


@pytest.mark.long
def test_a_mirror_of_59166_files_opens_with_one_page_of_names(tmp_path):
    with LoopbackHub() as server:
        folder = tmp_path / "hub"
        for number in range(1, 1200):
            path = folder / "train" / "chunk1" / f"example_train_{number}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        write_records(folder / "train" / "chunk1" / "example_train_0.jsonl.zst", make_records(4))
        server.datasets["cerebras/SlimPajama-627B"] = folder
        done = run_with(
            server, "--dataset", "slimpajama", "--model", "tiny", "--tokenizer", "builtin", "--max_steps", "3",
            "--config_overrides", "n_layer=1,n_embd=32,n_head=2", "--no-checkpoint", "--output_dir", str(tmp_path / "run"),
            tmp_path=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        trees = [line for line in server.log if "/tree/" in line]
        # Once while opening, once when training reads: never a second page, never another folder.
        assert 1 <= len(trees) <= 2, trees
        assert all("cursor" not in line for line in trees)


@pytest.mark.long
def test_any_hub_dataset_is_pinned_to_its_commit(tmp_path):
    with LoopbackHub() as server:
        folder = tmp_path / "hub"
        write_records(folder / "data" / "train-00000-of-00001.parquet", make_records(6))
        server.datasets["someone/some-text"] = folder
        run = tmp_path / "run"
        done = run_with(
            server, "--dataset", "someone/some-text", "--model", "tiny", "--tokenizer", "builtin", "--max_steps", "5",
            "--config_overrides", "n_layer=1,n_embd=32,n_head=2", "--no-checkpoint", "--output_dir", str(run), tmp_path=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        commit = server.commit_of("main")
        rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
        assert {row["mirror"] for row in rows} == {f"someone/some-text@{commit[:12]}"}
        assert rows[4]["shard"] == "data/train-00000-of-00001.parquet"


@pytest.mark.parametrize("dataset", ["slimpajama", "someone/nothing"])
def test_without_a_hub_the_offline_command_is_shown_within_30_seconds(tmp_path, dataset):
    start = time.monotonic()
    done = run_script("--dataset", dataset, "--output_dir", str(tmp_path / "run"), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "--dataset embedded" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 30 + 20, "25 s for the mirrors, the rest for importing on a busy machine"


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up_and_something_moves_meanwhile(tmp_path):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        done = run_script(
            "--dataset", "slimpajama", "--output_dir", str(tmp_path / "run"),
            HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
        )  # fmt: skip
    assert done.returncode == 1
    assert "no answer" in done.stderr and "--dataset embedded" in done.stderr
    moves = [line for line in done.stderr.splitlines() if line.startswith("…")]
    assert len(moves) >= 10
    assert any("gmongaras" in line for line in moves)


def test_islice_of_a_corpus_reads_no_further(shards):
    corpus = opening.open_corpus(f"{shards}/*.jsonl.zst")
    assert len(list(itertools.islice(corpus.records(Cursor()), 3))) == 3
