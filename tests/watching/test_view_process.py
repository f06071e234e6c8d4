"""The process that draws: it stands back while training is on, and takes its turn when training waits for it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.watching.view_process import ViewProcess
from tests.conftest import ROOT, environment

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no such priorities on this system")


def policy(views: ViewProcess) -> int:
    assert views._child is not None
    return os.sched_getscheduler(views._child.pid)


def wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_stands_back_while_training_is_on_and_comes_forward_at_the_end(finished):
    views = ViewProcess(RunFolder(finished), "a run", "", 40)
    views.request(20, with_chart=False)
    views.request(20)
    wait_for(lambda: policy(views) == os.SCHED_IDLE)
    seen = set()
    take = views._take

    def watched(timeout):
        seen.add(policy(views))
        return take(timeout)

    views._take = watched  # type: ignore[method-assign]
    assert views.finish(40)
    if os.geteuid() == 0:
        # Others may need a limit for it (RLIMIT_NICE).
        assert os.SCHED_OTHER in seen


def test_one_that_is_started_for_the_end_never_stands_back(finished):
    views = ViewProcess(RunFolder(finished), "a run", "", 40)
    seen = set()
    take = views._take

    def watched(timeout):
        if views._child is not None:
            seen.add(policy(views))
        return take(timeout)

    views._take = watched  # type: ignore[method-assign]
    views._come_forward = lambda: None  # type: ignore[method-assign]
    assert views.finish(40)
    assert seen == {os.SCHED_OTHER}


def test_final_views_come_at_the_second_try(finished):
    """The process that draws may be killed, as when memory is short."""
    views = ViewProcess(RunFolder(finished), "a run", "", 40)
    take, killed = views._take, []

    def killed_once(timeout):
        if views._child is not None and not killed:
            killed.append(views._child.pid)
            os.kill(views._child.pid, signal.SIGKILL)
        return take(timeout)

    views._take = killed_once  # type: ignore[method-assign]
    assert views.finish(40) and killed
    assert views.errors == ["the view process ended with 1 charts undrawn"]


def test_it_ends_with_the_process_that_started_it(finished, tmp_path):
    """Killed, a run leaves nobody behind who writes into its folder."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from slimpajama_hf.record.run_folder import RunFolder\n"
        "from slimpajama_hf.watching.view_process import ViewProcess\n"
        "views = ViewProcess(RunFolder(Path(sys.argv[1])), 'a run', '', 40)\n"
        "views.request(20); print(views._child.pid, flush=True); time.sleep(60)"
    )
    run = shutil.copytree(finished, tmp_path / "run")
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, env=environment(), cwd=ROOT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    # So early that it has not said yet whose child it is, and again in the middle of its work.
    time.sleep(random.choice([0.0, 0.3, 1.0]))
    parent.kill()
    parent.wait()
    wait_for(lambda: not os.path.exists(f"/proc/{child}") or "State:\tZ" in Path(f"/proc/{child}/status").read_text())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    time.sleep(1.0)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
