"""Starts at the same moment: one has the folder, the others are told so."""

import subprocess
import sys

START_AND_END = """
import contextlib, sys
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import run_folder
for _ in range(200):
    try:
        with contextlib.ExitStack() as at_end:
            run_folder.prepare(sys.argv[1], at_end, resume=False, overwrite=False)
    except UserError as error:
        print(error)
"""


def test_of_starts_at_once_those_without_the_folder_are_told_that_a_run_is_on(tmp_path):
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", START_AND_END, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = "".join(start.communicate(timeout=120)[0] for start in starts).splitlines()
    assert [start.returncode for start in starts] == [0, 0, 0]
    assert [line for line in said if "a run is on in this folder" not in line] == []
