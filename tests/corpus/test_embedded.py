"""The embedded corpus, built for real from the standard library of the Python that runs the tests."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from backports import zstd

from slimpajama_hf.corpus import embedded
from slimpajama_hf.errors import UserError

MODULE = '''\
"""What the module is for, said at some length so that it is kept."""
import os

if os.name == "nt":
    def below_if():
        return 1
else:
    async def below_else():
        """Docstring below else."""
        return 2

class Outer(Base):
    """What the class is for."""

    attribute = 3

    @property
    def method(self, a,
               b=4):
        # A comment of the body.
        """Not a docstring? It is: comments are no statements."""
        def inner(): pass
        return inner

    class Inner:
        def deep(self): "One line."; return 5

    def only_docstring(self):
        """All there is."""

    def one_line(self): return 6
'''


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(cache: Path) -> tuple[Path, list[tuple[float, str]], float]:
    """The corpus's folder, what was said and when, and the seconds it took."""
    said: list[tuple[float, str]] = []
    begun = time.monotonic()
    folder = embedded.build(cache, lambda line: said.append((time.monotonic() - begun, line)))
    return folder, said, time.monotonic() - begun


def records(path: Path) -> list[dict]:
    with zstd.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def test_ten_thousand_distinct_documents_in_record_shape(built) -> None:
    train = records(built[0] / embedded.TRAIN)
    validation = records(built[0] / embedded.VALIDATION)
    assert len(train) >= 10_000
    for record in train + validation:
        assert set(record) == {"text", "meta"} and set(record["meta"]) == {"redpajama_set_name"}
        text = record["text"]
        assert len(text) >= 60 and text == unicodedata.normalize("NFC", text) and "\r" not in text
    texts = [record["text"] for record in train + validation]
    assert len(set(texts)) == len(texts), "a text stands twice, or on both sides"
    assert 0.01 < len(validation) / len(texts) < 0.03
    domains = Counter(record["meta"]["redpajama_set_name"] for record in train)
    assert set(domains) == set(embedded.DOMAINS)
    assert min(domains.values()) >= 200
    # Shuffled: no domain waits for the end.
    assert {record["meta"]["redpajama_set_name"] for record in train[:300]} == set(embedded.DOMAINS)


def test_text_is_real_and_not_repeated_wholesale(built) -> None:
    by_domain: dict[str, list[str]] = {name: [] for name in embedded.DOMAINS}
    for record in records(built[0] / embedded.TRAIN) + records(built[0] / embedded.VALIDATION):
        by_domain[record["meta"]["redpajama_set_name"]].append(record["text"])
    assert any(text.startswith("def dumps(obj, *, skipkeys=False") for text in by_domain["PythonFunction"])
    assert any(text.startswith("class JSONEncoder(object):") for text in by_domain["PythonClass"])
    assert any(text.startswith("Serialize ``obj`` to a JSON formatted") for text in by_domain["PythonDocstring"])
    assert any("truth value" in text.lower() for text in by_domain["PythonTopic"])
    dumps = next(text for text in by_domain["PythonFunction"] if text.startswith("def dumps(obj, *, skipkeys=False"))
    assert "Serialize ``obj``" not in dumps
    # A docstring inside a class outline would be its methods' text once more.
    outline = next(text for text in by_domain["PythonClass"] if text.startswith("class JSONEncoder(object):"))
    assert "..." in outline and "o is a JSON" not in outline


def test_something_is_said_every_second(built) -> None:
    _, said, seconds = built
    times = [0.0, *(at for at, _ in said), seconds]
    assert max(b - a for a, b in itertools.pairwise(times)) < 1.0 + seconds / 10
    assert any("of" in line and "modules" in line for _, line in said)
    assert seconds < 30  # 3 to 5 s on one free core.


def test_second_build_reuses_the_first(cache: Path, built) -> None:
    said: list[str] = []
    begun = time.monotonic()
    assert embedded.build(cache, said.append) == built[0]
    assert time.monotonic() - begun < 1 and not said
    assert [path.name for path in cache.iterdir()] == [built[0].name]
    version = "py" + ".".join(str(part) for part in sys.version_info[:3])
    assert version in built[0].name and built[0].name.startswith("embedded-v1-")


def _build_into(cache: str) -> None:
    embedded.build(Path(cache))


def test_two_processes_at_once_end_well_with_the_same_bytes(tmp_path: Path, built) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_into, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [built[0].name]
    for name in (embedded.TRAIN, embedded.VALIDATION):
        assert (tmp_path / built[0].name / name).read_bytes() == (built[0] / name).read_bytes()


def test_a_damaged_folder_is_built_again_and_dead_builds_are_removed(
    tmp_path: Path, built, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = embedded._standard_library()
    sources = embedded._sources(library)
    damaged = tmp_path / built[0].name
    damaged.mkdir()
    (damaged / embedded.TRAIN).write_bytes(b"")
    stale = tmp_path / "_embedded-dead"
    stale.mkdir()
    (stale / "half").write_bytes(b"x")
    os.utime(stale, (1, 1))
    # The first modules are enough here: what counts is the folder.
    monkeypatch.setattr(embedded, "_sources", lambda _: sources[:120])
    monkeypatch.setattr(embedded, "_folder_name", lambda *_: built[0].name)
    assert embedded.build(tmp_path) == damaged
    assert records(damaged / embedded.VALIDATION)
    assert [path.name for path in tmp_path.iterdir()] == [built[0].name]


def test_tests_and_installed_packages_are_left_out() -> None:
    names = [name for name, _ in embedded._sources(embedded._standard_library())]
    assert "json/__init__.py" in names and "pydoc_data/topics.py" in names
    for folder in ("test", "tests", "idle_test", "site-packages"):
        assert not any(folder in name.split("/")[:-1] for name in names)


def test_optional_packages_of_distributions_are_not_needed_for_ten_thousand() -> None:
    library = embedded._standard_library()
    optional = {"tkinter", "idlelib", "lib2to3", "distutils", "ensurepip", "turtledemo"}
    sources = [source for source in embedded._sources(library) if source[0].split("/")[0] not in optional]
    distinct = embedded._distinct(embedded._documents(library, sources, lambda line: None))
    assert sum(not validation for _, validation in distinct) >= 10_000


def test_how_a_module_is_cut() -> None:
    documents = list(embedded._module(MODULE.encode()))
    texts = {domain: [d.text for d in documents if d.domain == domain] for domain in embedded.DOMAINS}
    assert texts["PythonDocstring"] == [
        "What the module is for, said at some length so that it is kept.",
        "Docstring below else.",
        "Not a docstring? It is: comments are no statements.",
        "One line.",
        "All there is.",
    ]
    functions = texts["PythonFunction"]
    assert functions[0] == "def below_if():\n    return 1\n"
    assert functions[1] == "async def below_else():\n    return 2\n"
    assert functions[2].startswith("@property\ndef method(self, a,\n") and functions[2].endswith("    return inner\n")
    assert "Not a docstring" not in functions[2]
    assert functions[3] == 'def deep(self): "One line."; return 5\n'
    assert functions[4] == ""  # Only a docstring, dropped by its length.
    outer, inner = texts["PythonClass"]
    assert outer == (
        'class Outer(Base):\n    """What the class is for."""\n    attribute = 3\n    @property\n'
        "    def method(self, a,\n               b=4):\n        ...\n    class Inner: ...\n"
        "    def only_docstring(self):\n        ...\n    def one_line(self): return 6\n"
    ), outer
    assert inner.startswith("class Inner:")


@pytest.mark.parametrize(
    "source", [b"def broken(:\n", b"# coding: no-such-codec\nx = 1\n", b"\xff\xfe", b"x = '\x00'\n"]
)
def test_sources_that_cannot_be_read_give_nothing(source: bytes) -> None:
    assert list(embedded._module(source)) == []


def test_lone_surrogates_and_line_ends_are_cleaned() -> None:
    assert embedded._clean("\n\n  e\u0301\ud800x  \r\ny \f\n\n") == "  éx\ny"


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lonely.py").write_text("x = 1\n")
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"holds 1 \.py files.*--dataset PATH"):
        embedded.build(tmp_path / "cache")
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(UserError, match=r"python311\.zip, which is not a folder"):
        embedded.build(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="SLIMPAJAMA_HF_CACHE"):
        embedded.build(tmp_path / "file" / "cache")


@pytest.mark.slow
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIMPAJAMA_HF_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.default_cache() == tmp_path / "own"
    monkeypatch.setenv("SLIMPAJAMA_HF_CACHE", "")
    assert embedded.default_cache() == tmp_path / "xdg" / "slimpajama_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.default_cache() == tmp_path / ".cache" / "slimpajama_hf"
