"""The process that draws: it stands back while training is on, and takes its turn when training waits for it."""

from __future__ import annotations

import os
import time

import pytest

from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.watching.view_process import ViewProcess

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no such priorities on this system")


def policy(views: ViewProcess) -> int:
    assert views._process is not None
    return os.sched_getscheduler(views._process.pid)


def wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_stands_back_while_training_is_on_and_comes_forward_at_the_end(finished):
    views = ViewProcess(RunFolder(finished), "a run", "", 40)
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
        if views._process is not None:
            seen.add(policy(views))
        return take(timeout)

    views._take = watched  # type: ignore[method-assign]
    views._come_forward = lambda: None  # type: ignore[method-assign]
    assert views.finish(40)
    assert seen == {os.SCHED_OTHER}
