"""Sums of rows that several processes see."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, environment

#: Parts that begin and end within pieces, and one that is longer than all of a process' share.
SIZES = (5, 300_001, 1, 70_000, 7)

PROCESS = """
import os, sys, torch, torch.distributed as dist
if os.environ["RANK"] == sys.argv[2]:
    del os.memfd_create
from slimpajama_hf.training.shared_rows import open_rows
dist.init_process_group("gloo")
rows = open_rows(eval(sys.argv[3]))
if rows is None:
    found = None
else:
    found = []
    for time in range(3):
        torch.manual_seed(10 * time + dist.get_rank())
        rows.own.copy_(torch.randn(len(rows.own)))
        squares = rows.sum()
        found.append((rows.own.clone(), squares.clone()))
torch.save(found, sys.argv[1] + os.environ["RANK"])
dist.barrier()
dist.destroy_process_group()
"""


def run_processes(tmp_path, count: int, without: str = "") -> list:
    (tmp_path / "process.py").write_text(PROCESS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, str(tmp_path / "process.py"), str(tmp_path / "found"), without, repr(SIZES)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{tmp_path}/found{rank}") for rank in range(count)]


@pytest.mark.parametrize("processes", [2, 3])
def test_all_get_the_sum_in_the_order_of_ranks_and_its_norms(tmp_path, processes):
    everybodys = run_processes(tmp_path, processes)
    for time in range(3):
        rows = []
        for rank in range(processes):
            torch.manual_seed(10 * time + rank)
            rows.append(torch.randn(sum(SIZES)))
        expected = rows[0].clone()
        for row in rows[1:]:
            expected += row
        norms = torch.stack([part.double().square().sum() for part in expected.split(list(SIZES))])
        for found, squares in (each[time] for each in everybodys):
            assert torch.equal(found, expected)
            torch.testing.assert_close(squares.double(), norms, rtol=1e-5, atol=0)
        assert all(torch.equal(a[time][1], b[time][1]) for a, b in itertools.pairwise(everybodys))


def test_where_one_cannot_share_its_memory_none_does(tmp_path):
    assert run_processes(tmp_path, 3, without="1") == [None, None, None]
