"""A network and files that fail: nothing lost, nothing repeated, something on screen, and an end in time."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from slimpajama_hf.corpus import opening, patience, shards, unchanged
from slimpajama_hf.corpus.corpus import Corpus
from slimpajama_hf.corpus.documents import Cursor, Document, Gap, Unusable
from slimpajama_hf.corpus.patience import OutOfPatience, Patience, StopRequested
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples.stream import SampleStream
from tests.conftest import ROOT, environment, make_records, write_records
from tests.hub.loopback_hub import Fault, LoopbackHub

COMMIT = "a" * 40
REPO = "someone/text"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback Hub with two .jsonl.zst shards and a .parquet, 40 records each, read 4 kB at a time."""
    from huggingface_hub import constants

    from slimpajama_hf.corpus import hub_files

    monkeypatch.setattr(hub_files, "RANGE_BYTES", 4096)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_SECONDS", 0.2)
    with LoopbackHub() as server:
        for number, name in enumerate(("0.jsonl.zst", "1.jsonl.zst", "2.parquet")):
            write_records(tmp_path / "hub" / "data" / f"train-{name}", make_records(40, seed=number))
        server.datasets[REPO] = tmp_path / "hub"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        from huggingface_hub import hf_api

        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        yield server


def corpus() -> Corpus:
    return Corpus(REPO, f"{REPO}@{COMMIT[:12]}", "text", REPO, COMMIT, ("data/train-",))


def places(records) -> list[tuple]:
    return [(record.sha1, record.shard, record.row) for record in records if isinstance(record, Document)]


def read(**how) -> list[tuple]:
    return places(corpus().records(Cursor(), patience=Patience(20), **how))


@pytest.fixture
def undisturbed(hub):
    found = read()
    assert len(found) == 120
    hub.log.clear()
    return found


FAULTS = {
    "a 429 with Retry-After": Fault("resolve", 429, times=2, headers={"Retry-After": "1"}),
    "a 429 with the Hub's own header": Fault("resolve", 429, times=2, headers={"RateLimit": '"api";r=0;t=1'}),
    "500": Fault("resolve", 500, times=3),
    "502": Fault("resolve", 502, times=2),
    "503 for 2 s": Fault("resolve", 503, seconds=2),
    "504 at opening": Fault("train-1", 504, times=2, method="HEAD"),
    "429 at opening": Fault("train-2", 429, times=2, method="HEAD"),
    "503 of the list": Fault("tree", 503, times=3),
    "a reset in the middle of a body": Fault("resolve", how="reset", times=7),
    "a body that ends early": Fault("resolve", how="short", times=7),
    "a parquet file's body that ends early": Fault("train-2", how="short", times=5),
    "a list that ends early": Fault("tree", how="short", times=2),
}


def lost_and_repeated(found: list[tuple], undisturbed: list[tuple]) -> dict[str, int]:
    """How many documents of the undisturbed stream did not come, and how many came that should not have."""
    there, expected = Counter(found), Counter(undisturbed)
    return {"lost": sum((expected - there).values()), "repeated": sum((there - expected).values())}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_and_nothing_repeated(hub, undisturbed, name, fault_table):
    fault = dataclasses.replace(FAULTS[name])
    hub.faults.append(fault)
    start = time.monotonic()
    found = read()
    fault_table(f"stream alone: {name}", fault.met, **lost_and_repeated(found, undisturbed), bit_equal=None)
    assert found == undisturbed
    assert fault.met >= 1
    if "Retry-After" in name or "own header" in name:
        assert time.monotonic() - start >= 2, "what the server asks for is kept"


def test_a_stall_is_cut_short_and_asked_again(hub, undisturbed, monkeypatch):
    from slimpajama_hf.corpus import hub_files

    monkeypatch.setattr(hub_files, "REQUEST_TIMEOUT", 0.5)
    hub.faults.append(Fault("train-1", how="stall", times=2, seconds=30))
    assert read() == undisturbed


def test_a_list_goes_on_at_the_page_that_failed(hub, undisturbed):
    hub.page = 1
    records = corpus().records(Cursor(), patience=Patience(20))
    first = next(records)
    hub.faults.append(Fault("tree", 500, times=1))
    assert places([first, *records]) == undisturbed
    pages = [line.rpartition("/data")[2] for line in hub.log if "/tree/" in line]
    assert pages == [" -> 200", "?cursor=1 -> 500", "?cursor=1 -> 200", "?cursor=2 -> 200"]


def test_a_server_that_goes_away_and_comes_back(hub, undisturbed):
    """Connections refused for two seconds, on the same port."""
    records = corpus().records(Cursor(), patience=Patience(20))
    found = [next(records) for _ in range(3)]
    host, port = hub.server_address[:2]
    hub.shutdown()
    hub.server_close()

    def back() -> None:
        time.sleep(2)
        again = LoopbackHub.__new__(LoopbackHub)
        again.__dict__.update(hub.__dict__)
        import http.server

        from tests.hub.loopback_hub import _Handler

        http.server.ThreadingHTTPServer.__init__(again, (host, port), _Handler)
        threading.Thread(target=again.serve_forever, daemon=True).start()
        hub.again = again

    threading.Thread(target=back, daemon=True).start()
    assert places([*found, *records]) == undisturbed
    hub.again.shutdown()
    hub.again.server_close()


@pytest.mark.parametrize("part", ["resolve", "tree"])
def test_patience_ends_with_words(hub, part):
    hub.faults.append(Fault(part, 503, seconds=60))
    start = time.monotonic()
    with pytest.raises(OutOfPatience, match=r"someone/text: .*HTTP 503 \(the server is busy\).*resumed") as caught:
        list(corpus().records(Cursor(), patience=Patience(1)))
    assert "--stream_patience" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("ahead", [0, 8])
def test_a_stop_ends_the_wait_at_once(hub, encoder, ahead):
    told = math.inf
    stop = lambda: time.monotonic() > told  # noqa: E731
    samples = iter(SampleStream(corpus(), encoder, "truncate", 32, read_ahead=ahead, stop=stop))
    assert len([next(samples) for _ in range(3)]) == 3
    hub.faults.append(Fault("resolve", how="stall" if ahead else "", status=None if ahead else 503, seconds=60))
    told = time.monotonic() + 1
    with pytest.raises(StopRequested):
        list(samples)
    assert time.monotonic() - told < 1
    assert patience.StopRequested is StopRequested


@pytest.mark.parametrize("name", ["train-1", "train-2"])
def test_an_end_of_patience_comes_through_every_layer_at_its_place(hub, encoder, undisturbed, name):
    hub.faults.append(Fault(name, 503, seconds=60))
    stream = SampleStream(corpus(), encoder, "truncate", 32, patience_seconds=0.5)
    made = []
    with pytest.raises(OutOfPatience):
        for sample in stream:
            made.append(sample)
    before = 40 if name == "train-1" else 80
    assert places(sample.document for sample in made) == undisturbed[:before]
    hub.faults.clear()
    stream.start = made[-1].after
    assert places(sample.document for sample in stream) == undisturbed[before:]


def test_while_it_waits_something_is_on_screen_every_two_seconds(hub, encoder, capsys, monkeypatch):
    monkeypatch.setattr(patience, "LONGEST_PAUSE_SECONDS", 30)
    samples = iter(SampleStream(corpus(), encoder, "truncate", 32, patience_seconds=5))
    next(samples)
    hub.faults.append(Fault("train-1", 503, seconds=60))
    capsys.readouterr()
    with pytest.raises(OutOfPatience):
        list(samples)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("…")]
    assert len(lines) >= 2 and "HTTP 503" in lines[-1] and "failing since" in lines[-1]


# ---- broken shards ----


def break_shard(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) - 20])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "html":
        path.write_bytes(b"<html>sorry</html>" * 10)
    elif how == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[middle + 40 :])


@pytest.mark.first(20)
@pytest.mark.parametrize("mode", ["truncate", "window", "pack"])
@pytest.mark.parametrize("buffer", [0, 25])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("b.jsonl.zst", "truncated"), ("b.jsonl.zst", "html"), ("b.jsonl.zst", "empty"), ("b.jsonl.zst", "missing"),
        ("b.jsonl.gz", "truncated"), ("b.jsonl.gz", "flipped"), ("b.jsonl.gz", "empty"),
        ("b.parquet", "truncated"), ("b.parquet", "html"), ("b.parquet", "flipped"),
    ],
)  # fmt: skip
def test_a_broken_file_stops_or_is_set_aside_once(tmp_path, encoder, capsys, name, how, mode, buffer):
    write_records(tmp_path / "a.jsonl", make_records(12, seed=1))
    write_records(tmp_path / name, make_records(200, seed=2))
    write_records(tmp_path / "c.jsonl", make_records(12, seed=3))
    corpus = opening.open_corpus(f"{tmp_path}/*")
    break_shard(tmp_path / name, how)
    options = {"shuffle_buffer": buffer, "read_ahead": 0}
    with pytest.raises(shards.BrokenShard, match=rf"{name}: .*row.*--skip_broken_shards"):
        list(SampleStream(corpus, encoder, mode, 512, **options))
    capsys.readouterr()
    stream = SampleStream(corpus, encoder, mode, 512, skip_broken_shards=True, **options)
    made = list(stream)
    gaps = [gap for sample in made for gap in sample.gaps]
    assert [gap["shard"] for gap in gaps] == [name]
    assert gaps[0]["reason"] and isinstance(gaps[0]["row"], int) and capsys.readouterr().err.count("set aside") == 1
    rows = [sample.document.row for sample in made if sample.document.shard == name]
    assert all(row < gaps[0]["row"] for row in rows)
    if mode == "truncate":
        found = [(sample.document.shard, sample.document.row) for sample in made]
        # gzip notices damage late: lines that it garbled before are passed over.
        passed_over = sum(sum(sample.skipped.values()) for sample in made)
        assert len(set(found)) == len(found) == 24 + gaps[0]["row"] - passed_over
    for place in sorted({0, 5, 11, 12, 13, len(made) // 2, len(made) - 3, len(made) - 2} & set(range(len(made)))):
        stream.start = Cursor(**json.loads(json.dumps(dataclasses.asdict(made[place].after))))
        rest = list(stream)
        assert [(sample.input_ids, sample.after, sample.gaps) for sample in rest] == [
            (sample.input_ids, sample.after, sample.gaps) for sample in made[place + 1 :]
        ]


def test_what_is_set_aside_stays_so_when_the_file_is_mended(tmp_path, encoder):
    for number in range(3):
        write_records(tmp_path / f"{number}.jsonl.zst", make_records(10, seed=number))
    whole = (tmp_path / "1.jsonl.zst").read_bytes()
    corpus = opening.open_corpus(f"{tmp_path}/*")
    (tmp_path / "1.jsonl.zst").unlink()
    for buffer in (0, 4):
        stream = SampleStream(corpus, encoder, "truncate", 64, skip_broken_shards=True, shuffle_buffer=buffer)
        made = list(stream)
        (tmp_path / "1.jsonl.zst").write_bytes(whole)
        stream.start = made[12].after
        assert [sample.document for sample in stream] == [sample.document for sample in made[13:]]
        (tmp_path / "1.jsonl.zst").unlink()


def test_a_shard_that_is_gone_from_the_hub(hub, undisturbed):
    hub.refuse["train-1"] = 404
    with pytest.raises(shards.BrokenShard, match=r"train-1.*HTTP 404 \(not there\)"):
        read()
    found = list(corpus().records(Cursor(), skip_broken_shards=True, patience=Patience(1)))
    assert places(found) == undisturbed[:40] + undisturbed[80:]
    (gap,) = [record for record in found if isinstance(record, Gap)]
    assert (gap.shard, gap.row, gap.after.shard) == ("data/train-1.jsonl.zst", 0, "data/train-2.parquet")


@pytest.mark.parametrize("status", [401, 403])
def test_no_access_is_not_a_broken_shard(hub, status):
    hub.refuse["resolve"] = status
    with pytest.raises(UserError, match=f"HTTP {status}.*hf auth login") as caught:
        read(skip_broken_shards=True)
    assert not isinstance(caught.value, shards.BrokenShard)


def test_ten_broken_shards_in_a_row_are_an_error(tmp_path):
    for number in range(12):
        write_records(tmp_path / f"{number:02d}.jsonl.zst", make_records(3, seed=number))
    corpus = opening.open_corpus(f"{tmp_path}/*")
    for number in range(1, 12):
        (tmp_path / f"{number:02d}.jsonl.zst").unlink()
    with pytest.raises(UserError, match="10 shards in a row"):
        list(corpus.records(Cursor(), skip_broken_shards=True))


# ---- a corpus changed underneath ----


def _change(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b'{"text": "more"}\n')
    elif how == "content":
        path.write_bytes(path.read_bytes().replace(b"the ", b"eht ", 1))


@pytest.mark.parametrize(
    ("how", "words"), [("missing", "not there"), ("longer", "bytes and had"), ("content", "content")]
)
def test_a_file_that_changed_is_named(tmp_path, how, words):
    for number in range(3):
        write_records(tmp_path / f"{number}.jsonl", make_records(10, seed=number))
    described = json.loads(json.dumps(opening.open_corpus(f"{tmp_path}/*").describe()))
    same = unchanged.check_unchanged(unchanged.recorded(described))
    assert same.describe() == described
    _change(tmp_path / "1.jsonl", how)
    with pytest.raises(UserError, match=rf"1\.jsonl.*{words}.*--output_dir"):
        unchanged.check_unchanged(unchanged.recorded(described))


def test_a_run_of_an_older_version_has_nothing_to_check(tmp_path):
    write_records(tmp_path / "a.jsonl", make_records(3))
    described = opening.open_corpus(f"{tmp_path}/*").describe()
    described["files"] = [entry[:2] for entry in described["files"]]
    _change(tmp_path / "a.jsonl", "longer")
    assert len(list(unchanged.check_unchanged(unchanged.recorded(described)).records(Cursor()))) == 4


@pytest.mark.slow
def test_an_embedded_corpus_whose_cache_is_gone_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMPAJAMA_HF_CACHE", str(tmp_path / "one"))
    described = json.loads(json.dumps(opening.open_corpus("embedded").describe()))
    (tmp_path / "one").rename(tmp_path / "gone")
    monkeypatch.setenv("SLIMPAJAMA_HF_CACHE", str(tmp_path / "two"))
    again = unchanged.check_unchanged(unchanged.recorded(described))
    assert again.files[0].url.startswith(str(tmp_path / "two"))
    described["files"][0][3] = "0" * 64
    with pytest.raises(UserError, match="another Python"):
        unchanged.check_unchanged(unchanged.recorded(described))


# ---- records ----


def test_a_million_spaces_a_bomb_of_lines_and_one_number_among_texts(tmp_path, encoder):
    from backports import zstd

    path = tmp_path / "a.jsonl.zst"
    with zstd.open(path, "wb") as file:
        file.write(b'{"text": "%s"}\n' % (b" " * 1_000_000))
        file.write(b'{"text": 7}\n{"text": "plain words stay plain"}\n')
        for _ in range(20):
            file.write(b'{"text": "the same short line of words"}\n' * 10_000)
    assert path.stat().st_size < 100_000
    records = opening.open_corpus(str(path)).records(Cursor())
    first = [next(records) for _ in range(3)]
    assert [getattr(record, "text", None) or record.reason for record in first] == [
        "blank", "text is a int", "plain words stay plain",
    ]  # fmt: skip
    start = time.monotonic()
    assert sum(1 for _ in records) == 200_000
    assert time.monotonic() - start < 60


def test_a_string_alone_on_a_line_is_no_record(tmp_path):
    write_records(tmp_path / "a.jsonl", ['"only a string"', '{"text": "good"}'])
    first = next(opening.open_corpus(f"{tmp_path}/*").records(Cursor()))
    assert isinstance(first, Unusable) and first.reason == "not a record"


# ---- reading ahead ----


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"]


def wait_for_none() -> None:
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not threads()


@pytest.mark.parametrize("mode", ["truncate", "window", "pack"])
def test_reading_ahead_changes_nothing(tmp_path, encoder, mode):
    write_records(tmp_path / "a.jsonl", [*make_records(60), *[{"text": None}] * 1000])
    corpus = opening.open_corpus(f"{tmp_path}/*")
    results = []
    for ahead in (0, 1, 8):
        made = []
        with pytest.raises(UserError, match="1,000 records in a row"):
            for sample in SampleStream(corpus, encoder, mode, 64, read_ahead=ahead):
                made.append(sample)
        results.append(made)
    assert results[0] == results[1] == results[2] and len(results[0]) >= 60
    wait_for_none()


def test_the_thread_ends_when_its_samples_are_not_wanted_any_more(shards_folder, encoder):
    samples = iter(SampleStream(opening.open_corpus(f"{shards_folder}/*"), encoder, "truncate", 64))
    next(samples)
    assert len(threads()) == 1
    samples.close()
    wait_for_none()
    samples = iter(SampleStream(opening.open_corpus(f"{shards_folder}/*"), encoder, "truncate", 64))
    next(samples)
    del samples
    gc.collect()
    wait_for_none()


@pytest.fixture
def shards_folder(shards):
    return shards


def test_at_most_depth_samples_are_made_ahead(tmp_path, encoder, monkeypatch):
    write_records(tmp_path / "a.jsonl", make_records(100))
    made = []
    from slimpajama_hf.corpus import documents

    real = documents.to_document
    monkeypatch.setattr(documents, "to_document", lambda *rest: made.append(1) or real(*rest))
    samples = iter(SampleStream(opening.open_corpus(f"{tmp_path}/*"), encoder, "truncate", 64, read_ahead=3))
    made.clear()
    next(samples)
    time.sleep(0.5)
    # One taken, three on the shelf, one in the hands of the thread.
    assert len(made) <= 5
    samples.close()


def test_a_process_ends_although_its_server_never_answers(hub, tmp_path):
    code = f"""
        from slimpajama_hf.corpus.corpus import Corpus
        from slimpajama_hf.samples.stream import SampleStream
        from slimpajama_hf.samples.encoder import Encoder; from slimpajama_hf.samples.tokenizer import load_tokenizer
        corpus = Corpus({REPO!r}, "m", "text", {REPO!r}, {COMMIT!r}, ("data/train-",))
        samples = iter(SampleStream(corpus, Encoder(load_tokenizer("builtin")), "truncate", 64))
        print(next(samples).document.row, flush=True)
        for _ in range(39): next(samples)
        import time; time.sleep(1); print("end", time.time(), flush=True)
    """
    hub.faults.append(Fault("train-1", how="stall", seconds=60))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)),
    )  # fmt: skip
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert ended - float(done.stdout.split()[-1]) < 5
    assert os.environ["HF_ENDPOINT"] != hub.url


# ---- minutes ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("resolve", 503, seconds=60),
        Fault("resolve", 429, seconds=60, headers={"Retry-After": "5"}),
        Fault("train-1", how="stall", times=6, seconds=60),
    ],
    ids=["503 for a minute", "429 for a minute", "stalls of a minute"],
)
def test_a_bad_minute(hub, undisturbed, encoder, monkeypatch, capsys, fault, fault_table, request):
    monkeypatch.setattr(patience, "LONGEST_PAUSE_SECONDS", 30.0)
    hub.faults.append(fault)
    start = time.monotonic()
    made = list(SampleStream(corpus(), encoder, "truncate", 64))
    seconds = time.monotonic() - start
    found = places(sample.document for sample in made)
    name = f"stream alone: {request.node.callspec.id}, {seconds:.0f} s"
    fault_table(name, fault.met, **lost_and_repeated(found, undisturbed), bit_equal=None)
    assert found == undisturbed
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("…")]
    with capsys.disabled():
        sys.stderr.write(f"\n{fault}: {seconds:.1f} s, {fault.met} requests failed, {len(shown)} lines on screen\n")
    assert 55 < seconds < 120 and len(shown) >= seconds / 2 - 5
