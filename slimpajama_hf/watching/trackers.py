"""Sends every row of the ledger to experiment trackers (`--report_to tensorboard|trackio|wandb|...`), in a thread.

transformers' own integrations talk to the trackers, so names and habits are theirs: `train/loss`, `eval/loss`,
`train/global_step`. They run in a thread because some are slow (TensorBoard's flushes its file at every call). A
tracker that fails is reported once and not used again; training goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import os
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from slimpajama_hf import screen
from slimpajama_hf.errors import one_line
from slimpajama_hf.record import evaluations, ledger
from slimpajama_hf.training import evaluation

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder


#: Numbers of a ledger row for trackers, and their names there (after `train/`).
METRICS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "throughput": "tokens_per_second",
    "tokens": "tokens",
    "tokens_cut": "tokens_cut",
}
#: How many rows may wait for a slow tracker before further rows are left out.
MOST_WAITING = 10_000
#: How long the end of a run waits for trackers, in seconds.
PATIENCE_SECONDS = 60.0


def logs_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a ledger row for a tracker, without those that are not finite (null)."""
    logs = {name: row[key] for key, name in METRICS.items() if row[key] is not None}
    logs |= {name: value for name, value in ledger.added(row).items() if value is not None}
    if row["code_bits"] is not None and row["text_bytes"]:
        logs["bits_per_byte"] = row["code_bits"] / row["text_bytes"]
    return logs


class Trackers(TrainerCallback):
    """Sends ledger rows (`on_row`, a listener of the recorder) and held-out scores to the trackers of one run.

    A resumed run goes on in the same run of the tracker. TensorBoard is told to remove what came after the checkpoint;
    other trackers get these steps again, with the same numbers.
    """

    def __init__(
        self,
        names: list[str],
        folder: RunFolder,
        run_id: str,
        first_step: int,
        flush: Callable[[], None],
        project: str,
    ) -> None:
        """`first_step`: where the session begins. `flush` makes the recorder send its last rows. `project`: for
        trackers that have projects."""
        self._names, self._folder, self._run_id, self._first_step = names, folder, run_id, first_step
        self._project = project
        self._tools: dict[str, Any] = {}
        self._jobs: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._context: tuple[Any, Any, Any, dict[str, Any]] | None = None
        self._flush = flush
        self.left_out = 0
        """Rows that were left out because a tracker was slow."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._names or not state.is_world_process_zero:
            return
        args = copy.copy(args)
        # transformers' default is "huggingface", whatever is trained.
        args.project = self._project
        args.run_name = args.run_name or f"{self._folder.path.name}-{self._run_id[:8]}"
        # wandb takes the identity of a run only from here.
        os.environ.setdefault("WANDB_RUN_ID", self._run_id)
        os.environ.setdefault("WANDB_RESUME", "allow")
        for name in self._names:
            with self._guarded(name):
                tool = self._tools[name] = self._made(name)
                tool.on_train_begin(args, state, control, **kwargs)
        self._context = (args, copy.copy(state), control, kwargs)
        # trackio keeps its run in a context variable, which a new thread would not have.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._send,), daemon=True, name="trackers")
        self._thread.start()
        for step, metrics in self._forgotten_scores():
            self._put(step, metrics)

    def _forgotten_scores(self) -> list[tuple[int, dict[str, float]]]:
        """The held-out scores of the checkpoint at the start of the session: TensorBoard removes them with its step."""
        if not self._first_step:
            return []
        return [
            (entry["step"], evaluation.metrics_of(entry["scores"]))
            for entry in evaluations.read(self._folder.evaluations)
            if entry["step"] == self._first_step
        ]

    def _made(self, name: str) -> Any:
        integration = INTEGRATION_TO_CALLBACK[name]
        if name != "tensorboard":
            return integration()
        from torch.utils.tensorboard import SummaryWriter

        where = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(self._folder.path / "tensorboard")
        return integration(SummaryWriter(where, purge_step=self._first_step or None))

    def on_row(self, row: dict[str, Any]) -> None:
        """Send a new row of the ledger."""
        if self._thread is not None:
            self._put(row["step"], logs_of(row))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._thread is not None and metrics:
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self._put(state.global_step, numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush()
        self.close()

    def close(self) -> None:
        """Wait until everything is sent, at most for a minute, and end the trackers' runs."""
        thread, self._thread = self._thread, None
        if thread is None or self._context is None:
            return
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=PATIENCE_SECONDS)
        thread.join(PATIENCE_SECONDS)
        with contextlib.suppress(queue.Empty):
            while True:
                self.left_out += self._jobs.get_nowait() is not None
        if thread.is_alive() or self.left_out:
            screen.say(f"{', '.join(self._names)}: {self.left_out:,} steps were not taken in time; the ledger has them")
        if not thread.is_alive():
            args, state, control, kwargs = self._context
            for name, tool in list(self._tools.items()):
                with self._guarded(name):
                    tool.on_train_end(args, state, control, **kwargs)

    def _put(self, step: int, logs: dict[str, float]) -> None:
        try:
            self._jobs.put_nowait((step, logs))
        except queue.Full:
            self.left_out += 1

    def _send(self) -> None:
        assert self._context is not None
        args, state, control, kwargs = self._context
        while (job := self._jobs.get()) is not None:
            state.global_step, logs = job
            for name, tool in list(self._tools.items()):
                with self._guarded(name):
                    tool.on_log(args, state, control, logs=dict(logs), **kwargs)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Any:
        try:
            yield
        except Exception as error:
            self._tools.pop(name, None)
            why = f"{type(error).__name__}: {one_line(error)}"
            screen.say(f"--report_to {name}: it is left alone from here on ({why})")
