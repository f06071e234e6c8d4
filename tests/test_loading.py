"""What is loaded stays, so the garbage collector leaves it out: in the program, not in a process of others."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

LOAD = """
import gc, json
from slimpajama_hf import loading, program
def main(argv):
    with loading.libraries("torch"):
        on_inside = gc.isenabled()
        import torch
    print(json.dumps([on_inside, gc.isenabled(), gc.get_freeze_count()]))
    return 0
"""


@pytest.mark.parametrize(("begun", "least", "most"), [("program.run(main)", 100_000, 10**9), ("main([])", 0, 0)])
def test_the_program_alone_leaves_out_what_it_loaded(begun, least, most):
    done = subprocess.run(
        [sys.executable, "-c", LOAD + begun], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    on_inside, on_behind, frozen = json.loads(done.stdout)
    assert not on_inside and on_behind and least <= frozen <= most
