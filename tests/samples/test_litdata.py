"""Why parquet is not read by litdata: what docs/scaling.md promises, of its reader and of ours, over the same files.

litdata (0.2.76) reads fast and goes on with other numbers of processes. But which documents a step learns depends on how
many processes there are, and where their number does not divide what was learned, some documents come twice.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.clients.environments import python_of
from tests.conftest import ROOT
from tests.samples.test_shared_samples import flat, read

FILES, ROWS = 4, 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("parquet")
    for file in range(FILES):
        texts = [f"document {file * ROWS + row}" for row in range(ROWS)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), place / f"part-{file}.parquet")
    return place


def numbers(samples) -> list[int]:
    return [int(Path(s.document.shard).stem.removeprefix("part-")) * ROWS + s.document.row for s in samples]


def test_ours_learns_the_same_documents_at_each_step_and_none_twice(folder, encoder):
    alone = flat(read(folder, encoder, "truncate"))
    two = read(folder, encoder, "truncate", 2, groups=50)
    rest = flat(read(folder, encoder, "truncate", 3, start=two[-1][0].after))
    assert numbers(alone) == list(range(FILES * ROWS))
    assert numbers(flat(two)) + numbers(rest) == numbers(alone)


@pytest.mark.slow
def test_litdata_does_not(folder):
    python = python_of(ROOT / ".venv" / "clients", "litdata")
    script = ROOT / "tests" / "clients" / "in_litdata.py"
    done = subprocess.run([python, script, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found["alone"]) == list(range(FILES * ROWS))
    # The first 50 steps of two processes are not the first 100 documents of one.
    begun = list(chain(*found["begun"]))
    assert len(begun) == 100 and set(begun) != set(found["alone"][:100])
    # 100 documents are learned by two; three go on at document 99, the last one that 3 divides.
    times = Counter(chain(begun, *found["rest"]))
    assert times.keys() == set(range(FILES * ROWS))
    assert sorted(times.values())[-2:] == [1, 2]
