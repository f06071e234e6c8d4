"""Draws the views in a separate process, so that a step never waits for a chart.

Run as `python -m slimpajama_hf.watching.view_process RUN [stand-back]`. It reads one JSON object per line,
`{"steps": N, "title": ..., "subtitle": ..., "max_steps": ..., "final": ..., "with_chart": ..., "with_report": ...}`,
and answers each with `{"steps": N, "with_chart": ..., "cpu_seconds": s}`, and `"error": "..."` if drawing failed. It
ends when its input ends, so it never outlives its run.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

from slimpajama_hf import child, priority
from slimpajama_hf.child import Child
from slimpajama_hf.record.run_folder import RunFolder

#: The report is written on request, at the end, and with every so many charts. With these charts and at the end the
#: search index is extended too.
CHARTS_PER_REPORT = 10

#: In longer runs the index (as large as the text) is only made by the first `inspect --find`.
INDEXED_STEPS = 100_000
#: How long the end of a run waits for the index, in seconds; `inspect --find` adds what is missing.
INDEX_PATIENCE_SECONDS = 2.0

#: How many requests may be unanswered before training waits, with an interval that the user typed.
MOST_WAITING = 4


class ViewProcess:
    """The training side: requests views and counts their cost. Never raises into the training loop."""

    def __init__(self, folder: RunFolder, title: str, subtitle: str, max_steps: int) -> None:
        self.folder = folder
        self._request = {"title": title, "subtitle": subtitle, "max_steps": max_steps}
        self._child: Child | None = None
        self.waiting = 0
        """Requests that are not answered yet."""
        self.cpu_seconds = 0.0
        """Processor time of all views so far."""
        self.last_chart_seconds = 0.0
        """Processor time of the last chart; 0 before the second, because the first also starts the process."""
        self.drawn = 0
        self.errors: list[str] = []

    def request(self, steps: int, final: bool = False, with_chart: bool = True, with_report: bool = False) -> None:
        """Request the views as of `steps` steps. Waits only if `MOST_WAITING` requests are unanswered."""
        self.collect()
        while self.waiting >= MOST_WAITING and self._running():
            self._take(timeout=1.0)
        try:
            if self._child is None or not self._child.is_alive:
                words = [] if final else ["stand-back"]
                self._child = Child("slimpajama_hf.watching.view_process", str(self.folder.path), *words)
            self._child.send(
                self._request
                | {"steps": steps, "final": final, "with_chart": with_chart, "with_report": with_report or final}
            )
            self.waiting += 1
        except OSError as error:
            self.errors.append(f"step {steps}: {error}")

    def collect(self) -> None:
        """Take the answers that have arrived."""
        while self._take(timeout=None):
            pass
        if self.waiting and not self._running():
            self.errors.append(f"the view process ended with {self.waiting} charts undrawn")
            self.waiting = 0

    def finish(self, steps: int, timeout: float = 300.0) -> bool:
        """Draw the final views, at the second try if the first fails, and end the process. Returns whether that
        succeeded."""
        return self._finish(steps, timeout) or self._finish(steps, timeout)

    def _finish(self, steps: int, timeout: float) -> bool:
        before = len(self.errors)
        self.request(steps, final=True)
        deadline = time.monotonic() + timeout
        while self.waiting and self._running() and time.monotonic() < deadline:
            # Repeatedly, because a process that has just started lowers its own priority first.
            self._come_forward()
            self._take(timeout=0.2)
        self.collect()
        if self.waiting:
            self.errors.append(f"step {steps}: the view process did not answer in {timeout:.0f} s")
        drawn = len(self.errors) == before
        if self._child is not None:
            self._child.end(patience_seconds=10)
            self._child, self.waiting = None, 0
        return drawn

    def _come_forward(self) -> None:
        if self._child is not None:
            priority.come_forward(self._child.pid)

    def _running(self) -> bool:
        return self._child is not None and self._child.is_alive

    def _take(self, timeout: float | None) -> bool:
        if self._child is None:
            return False
        try:
            answer = self._child.answers.get(block=timeout is not None, timeout=timeout)
        except queue.Empty:
            return False
        self.waiting -= 1
        self.cpu_seconds += answer["cpu_seconds"]
        if answer["with_chart"] and self.drawn:
            self.last_chart_seconds = answer["cpu_seconds"]
        if "error" in answer:
            self.errors.append(f"step {answer['steps']}: {answer['error']}")
        else:
            self.drawn += 1
        return True


class _SearchIndex:
    """Adds the documents of a run to its search index, in a thread: the corpus may be slow or unavailable."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None

    def go_on(self, steps: int) -> None:
        """Begin to add new documents, unless that is still in progress."""
        if steps <= INDEXED_STEPS and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._extend, daemon=True, name="index")
            self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join(INDEX_PATIENCE_SECONDS)

    def _extend(self) -> None:
        from slimpajama_hf.lookback import search_growing

        # Failures (a full disk, a Hub that does not answer) are only reported to those who search.
        with contextlib.suppress(Exception):
            search_growing.extend(self._folder)


def serve(run: str, stand_back: bool) -> None:
    """The drawing side: answer requests from stdin until it ends. With `stand_back`, it lowers its priority after the
    first picture, because training is in progress."""
    child.begin()
    from slimpajama_hf import report
    from slimpajama_hf.views.views import Views

    views = Views(RunFolder(Path(run)))
    index = _SearchIndex(views.folder)
    counted, charts = 0.0, 0
    for number, line in enumerate(sys.stdin):
        if stand_back and number == 1:
            # Not before the first picture, which a busy machine would delay.
            priority.stand_back()
        request = json.loads(line)
        final, with_report = request["final"], request.pop("with_report")
        answer: dict[str, Any] = {"steps": request["steps"], "with_chart": request["with_chart"]}
        charts += request["with_chart"]
        in_turn = request["with_chart"] and charts % CHARTS_PER_REPORT == 0
        try:
            views.redraw(**request)
            if final or in_turn:
                index.go_on(request["steps"])
            if with_report or in_turn:
                report.write(views.folder.path)
            if final:
                index.wait()
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        # The first answer includes the cost of starting and importing.
        total = time.process_time()
        answer["cpu_seconds"], counted = total - counted, total
        child.answer(answer)


if __name__ == "__main__":
    serve(sys.argv[1], "stand-back" in sys.argv[2:])
