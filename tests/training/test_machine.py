"""Which processes are of one machine is found out, and asks no launcher."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

ASK = """
import sys
import torch.distributed as dist
from slimpajama_hf.training.processes import Processes
rank, port, size = map(int, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
machine = Processes(rank, size, None).machine()
dist.barrier()
print(None if machine is None else tuple(machine.ranks), machine is not None and machine._listener is not None)
dist.destroy_process_group()
"""


def asked(folders):
    """What each process is told, one for each folder of temporary files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, str(rank), str(port), str(len(folders))],
            env=environment(TMPDIR=str(folder)), cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    return [each.communicate(timeout=120)[0].strip() for each in started]


@pytest.mark.long
def test_those_of_one_folder_are_together_whatever_their_ranks(tmp_path):
    one, other, alone = (tmp_path / name for name in ("one", "other", "alone"))
    for folder in (one, other, alone):
        folder.mkdir()
    assert asked([one, other, one, other, alone]) == [
        "(0, 2) True", "(1, 3) True", "(0, 2) False", "(1, 3) False", "None False",
    ]  # fmt: skip
