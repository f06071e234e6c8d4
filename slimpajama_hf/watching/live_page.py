"""`--watch`: serves the report on 127.0.0.1 during the run, from a separate process."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import files, screen
from slimpajama_hf.child import Child

if TYPE_CHECKING:
    from contextlib import ExitStack

    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.training.trainer import SlimPajamaTrainer

#: How long to wait for the server's address, in seconds; nothing else waits.
PATIENCE_SECONDS = 60.0


def open_if_asked(asked: bool, folder: RunFolder, at_end: ExitStack) -> None:
    """Start the server of the page; its address is printed as soon as it is known. `at_end` stops the server.

    Failures are reported, and the run goes on without a page.
    """
    if not asked:
        return
    try:
        server = Child("slimpajama_hf.report.watch", str(folder.path))
    except OSError as error:
        screen.say(f"--watch: no page can be served ({error.strerror}); the run goes on without it")
        return
    at_end.callback(server.end, patience_seconds=5.0)
    threading.Thread(target=_say_address, args=(server,), daemon=True, name="live page").start()


def _say_address(server: Child) -> None:
    answer: dict[str, Any] = {}
    with contextlib.suppress(queue.Empty):
        answer = server.answers.get(timeout=PATIENCE_SECONDS)
    if "address" in answer:
        screen.say(f"{'page':>10}  {answer['address']} (this machine alone, while the run is on)")
    else:
        why = answer.get("error", "its server does not answer")
        screen.say(f"--watch: no page can be served ({why}); the run goes on without it")


class MeasureArithmetic(TrainerCallback):
    """With `--watch`, before the first step: writes the FLOPs of a step and this machine's measured FLOP/s to
    `run.json`, from which the page computes the MFU."""

    def __init__(self, trainer: SlimPajamaTrainer, folder: RunFolder, precision: str) -> None:
        self._trainer, self._folder, self._precision = trainer, folder, precision

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from slimpajama_hf.model import flops

        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        with self._trainer.clock.paused():
            try:
                per_token, per_token_squared = flops.of_step(model)
                rate = flops.measured_rate(args.device, self._precision)
            except (AttributeError, RuntimeError) as error:
                # Another kind of model, or a full device: the page says that it was not measured.
                screen.say(f"--watch: the rate of this machine was not measured ({' '.join(str(error).split())})")
                return
            record = self._folder.read_record()
            record["arithmetic"] = {
                "flops": rate, "per_token": per_token, "per_token_squared": per_token_squared,
                "precision": self._precision, "session": len(record["sessions"]),
            }  # fmt: skip
            with contextlib.suppress(OSError):
                files.write_json(self._folder.record, record, indent=1)
