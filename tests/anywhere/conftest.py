"""Texts and a tokenizer as a stranger has them, and the unbroken runs of the examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.anywhere import scripts
from tests.conftest import make_records, write_records

#: Steps of the runs of the examples, of which every fifth is saved.
STEPS = 16


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A glob of three files of JSON lines, 40 documents each, all of two tokens and more."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        write_records(folder / f"{number}.jsonl", make_records(40, seed=number + 1))
    return f"{folder}/*.jsonl"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    return scripts.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), sorted(Path(texts).parent.glob("*.jsonl")))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, texts: str, tokenizer: Path) -> Callable[[str], Path]:
    """The run of an example that nobody killed, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            run = tmp_path_factory.mktemp("unbroken") / name
            done = scripts.start(name, texts, tokenizer, run, STEPS)
            assert done.returncode == 0, done.stderr[-3000:]
            made[name] = run
        return made[name]

    return of
