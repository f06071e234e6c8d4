"""The part of pushing that runs in training: put checkpoints into the outbox, and say once when pushing fails."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import priority, screen
from slimpajama_hf.child import Child
from slimpajama_hf.hub.outbox import Outbox
from slimpajama_hf.hub.upload_process import fields
from slimpajama_hf.record import checkpoints
from slimpajama_hf.training import signals

if TYPE_CHECKING:
    from slimpajama_hf.hub.account import Destination
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.training.clock import TrainingClock


#: Seconds that the end of a run waits for a push that makes progress: of a finished run, and of one that was stopped.
LONGEST_WAIT_SECONDS, WAIT_WHEN_STOPPED_SECONDS = 600.0, 5.0
#: A push gets the time to prepare it, the time to send it at this rate, and `--hub_patience` on top. If it is slower or
#: stands still, it is left to the command `push`.
READY_SECONDS, SLOWEST_BYTES_PER_SECOND = 20.0, 1e6


class Uploads(TrainerCallback):
    """Push every checkpoint of a run to the Hub, in the background. Without a destination it does nothing.

    It never raises into the training loop and never waits in it: a save costs a dozen hard links and a line in a pipe.
    """

    def __init__(
        self,
        folder: RunFolder,
        destination: Destination | None,
        step: int,
        patience_seconds: float,
        clock: TrainingClock,
    ) -> None:
        """`step`: where the run goes on; later checkpoints in the outbox are dropped. `clock`: the clock of training,
        paused while a checkpoint is put into the outbox."""
        self._folder, self._destination = folder, destination
        self._patience, self._clock = patience_seconds, clock
        self._child: Child | None = None
        self._failing: dict[str, Any] | None = None
        self._bytes_under_way = 0
        self._outbox: Outbox | None = None
        if destination is not None:
            self._outbox = Outbox(folder.path, destination.most)
            self._begins_at = step

    def announce(self) -> None:
        """Say a line of the plan."""
        if self._destination is not None:
            screen.say(f"{'hub':>10}  {self._destination.words()}")

    # ---- while it trains ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._destination is not None and state.is_world_process_zero:
            assert self._outbox is not None
            with contextlib.suppress(OSError):
                self._outbox.keep_up_to(self._begins_at)
            self._start()

    def saved(self, step: int) -> None:
        """Called when the checkpoint of a step has been saved."""
        if self._destination is not None and self._destination.strategy != "end":
            with self._clock.paused():
                self._lay(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._child is not None and not self._child.answers.empty():
            self._listen()

    def _lay(self, step: int) -> None:
        """Put the checkpoint of a step into the outbox, if it was saved."""
        assert self._outbox is not None
        checkpoint = checkpoints.path_of(self._folder.path, step)
        if not checkpoint.is_dir():
            return
        try:
            self._outbox.add(checkpoint)
        except OSError as error:
            screen.say(f"not pushed: {checkpoint.name} ({error.strerror or error}); training goes on")
        self._send({"wake": True})

    def _start(self) -> None:
        assert self._destination is not None
        try:
            self._child = Child("slimpajama_hf.hub.upload_process", str(self._folder.path))
        except OSError as error:
            self._failing = {"step": None, "why": str(error), "refused": True}
            screen.say(f"nothing is pushed to the Hub ({error}); training goes on")
            return
        # The token goes through the pipe, because others could read it in the command line or the environment.
        self._send(fields(self._destination))

    def _send(self, message: dict[str, Any]) -> None:
        if self._child is not None:
            with contextlib.suppress(OSError, ValueError):
                self._child.send(message)

    def _listen(self) -> None:
        """Read what the process has sent. Say when pushing begins to fail, and when it works again."""
        while self._child is not None and not self._child.answers.empty():
            event = self._child.answers.get()
            if event["event"] == "failed":
                if self._failing is None:
                    again = "the next checkpoint tries again" if event["refused"] else "it is tried again and again"
                    screen.say(f"not pushed to the Hub: {event['why']}; training goes on, {again}")
                self._failing = event
            elif event["event"] == "pushed":
                if self._failing is not None:
                    screen.say(f"the Hub takes it again: step {event['step']:,} is pushed")
                self._failing = None
                self._bytes_under_way = 0
            elif event["event"] == "begun":
                self._bytes_under_way = event["bytes"]
                for trouble in event["trouble"]:
                    screen.say(f"pushed without {trouble}")
            elif event["event"] == "dropped":
                screen.say(f"not pushed: {event['why']}")

    # ---- at the end ----

    def finish(self, done: bool) -> list[str]:
        """Push the last checkpoint, wait for it for a limited time, end the process. Returns lines for the summary.

        The screen shows the waiting, and Ctrl-C ends it. `done`: the run is finished; if it was stopped,
        the wait is short (`WAIT_WHEN_STOPPED_SECONDS`)."""
        if self._destination is None or self._outbox is None:
            return []
        saved = checkpoints.steps(self._folder.path)
        record = self._folder.read_record()
        pushed = self._outbox.pushed()
        there = pushed.get("step") if pushed.get("run_id") == record["run_id"] else None
        if saved and saved[-1] != there:
            if self._child is None:
                self._start()
            # Put it in again: its chart and report are the final ones now.
            self._lay(saved[-1])
        if self._outbox.waiting():
            self._wait(LONGEST_WAIT_SECONDS if done else WAIT_WHEN_STOPPED_SECONDS)
        if self._child is not None:
            self._child.end(patience_seconds=5)
            self._child = None
        return self._summary(record["run_id"])

    def _wait(self, seconds: float) -> None:
        assert self._destination is not None and self._outbox is not None
        self._listen()
        self._send({"finish": True})
        began = heard = time.monotonic()
        failing_since: float | None = None
        interrupted = threading.Event()
        command = f"python -m slimpajama_hf push {self._folder.path}"
        words = f"pushing to {self._destination.repo}; Ctrl-C leaves it to `{command}`"
        with _ctrl_c(interrupted), screen.Waiting(words):
            while self._outbox.waiting() and time.monotonic() - began < seconds and not interrupted.is_set():
                if self._child is None or not self._child.is_alive:
                    return
                # Repeated, because a process that has just started lowers its own priority first.
                priority.come_forward(self._child.pid)
                try:
                    event = self._child.answers.get(timeout=0.1)
                except queue.Empty:
                    pass
                else:
                    heard = time.monotonic()
                    if event["event"] == "failed":
                        failing_since = failing_since or time.monotonic()
                        self._failing = event
                        if event["refused"] or event["pause"] > self._patience:
                            return
                    elif event["event"] in ("begun", "pushed"):
                        failing_since = None
                        self._bytes_under_way = event["bytes"] if event["event"] == "begun" else 0
                if time.monotonic() - heard > self._longest_silence:
                    self._failing = self._failing or {"why": "it takes too long"}
                    return
                if failing_since is not None and time.monotonic() - failing_since > self._patience:
                    return

    @property
    def _longest_silence(self) -> float:
        """Seconds without an event after which the push under way, or the one being prepared, is given up."""
        return READY_SECONDS + self._patience + self._bytes_under_way / SLOWEST_BYTES_PER_SECOND

    def _summary(self, run_id: str) -> list[str]:
        assert self._destination is not None and self._outbox is not None
        pushed, lines = self._outbox.pushed(), []
        if pushed.get("run_id") == run_id:
            lines.append(f"{'hub':>15}  {pushed['url']}, step {pushed['step']:,} (commit {pushed['commit'][:12]})")
        waiting = self._outbox.waiting()
        if waiting:
            why = f": {self._failing['why']}" if self._failing is not None else ""
            steps = ", ".join(f"{step:,}" for step in waiting)
            lines.append(f"{'not pushed':>15}  step {steps} to {self._destination.repo}{why}")
            lines.append(f"{'finish it':>15}  python -m slimpajama_hf push {self._folder.path}")
        return lines


@contextlib.contextmanager
def _ctrl_c(interrupted: threading.Event) -> Any:
    """While entered, Ctrl-C and SIGTERM only set `interrupted`: the run itself is already finished."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM) if signals.can_be_caught() else ():
        before[number] = signal.signal(number, lambda *_: interrupted.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
