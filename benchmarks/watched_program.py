"""`run_clm_slimpajama.py` with a look inside, for `benchmarks/gpu_check.py`: what it did is the last line of stderr.

    WATCH='{"noise": 15}' python benchmarks/watched_program.py FLAGS OF run_clm_slimpajama.py

WATCH is JSON: `noise` and `teaching`, steps from one measurement to the next; `waits`, [first, last] step between which
waits for the device are counted by the line that waited; `memory`, bytes of the GPU that the program may have;
`break_capture`, true: the step waits for the device while it is captured, which no driver allows.
"""

from __future__ import annotations

import atexit
import collections
import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: What precedes the JSON.
MARK = "OBSERVED "
#: The step at which it is looked how the steps are made.
LOOK_AT = 5


class Watch:
    """What was asked for, and what was seen."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked = asked
        self.seen: dict[str, Any] = {}
        self.waits: collections.Counter[str] = collections.Counter()

    def begin(self) -> None:
        """Before the program: intervals, and what is put between. CUDA stays asleep: the program chooses the GPU."""
        import torch

        from slimpajama_hf.model import cuda_graph
        from slimpajama_hf.record import noise, teaching

        noise.STEPS_BETWEEN = self.asked.get("noise", noise.STEPS_BETWEEN)
        teaching.STEPS_BETWEEN = self.asked.get("teaching", teaching.STEPS_BETWEEN)
        if self.asked.get("break_capture"):

            class Broken(cuda_graph.Recording):
                def __init__(self, work: Any) -> None:
                    def waits() -> Any:
                        made = work()
                        if torch.cuda.is_current_stream_capturing():
                            made.loss.item()
                        return made

                    super().__init__(waits)

            cuda_graph.recorder_of = lambda device: Broken if device.type == "cuda" else None
        self._look_into_the_trainer()

    def _look_into_the_trainer(self) -> None:
        from slimpajama_hf import precision
        from slimpajama_hf.training.trainer import SlimPajamaTrainer

        record, compute_loss = SlimPajamaTrainer._record_step, SlimPajamaTrainer.compute_loss
        make = SlimPajamaTrainer.__init__
        first, last = self.asked.get("waits", (0, 0))
        watch = self

        def made(trainer: Any, **arguments: Any) -> None:
            watch.limit_memory()
            make(trainer, **arguments)

        def recorded(trainer: Any) -> bool:
            step = trainer.state.global_step
            if step == first and last:
                watch.count_waits(True)
            if step == last and last:
                watch.count_waits(False)
            if step == LOOK_AT:
                watch.look(trainer)
            return record(trainer)

        def computed(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if "dtype seen by a hook" in watch.seen:
                return compute_loss(trainer, model, *args, **kwargs)
            found = []
            watch.seen["dtype seen by a hook"] = precision.seen_by_a_hook(
                model, lambda: found.append(compute_loss(trainer, model, *args, **kwargs))
            )
            return found[0]

        SlimPajamaTrainer.__init__ = made
        SlimPajamaTrainer._record_step = recorded
        SlimPajamaTrainer.compute_loss = computed

    def limit_memory(self) -> None:
        """The card seems as small as was asked for."""
        import torch

        if self.asked.get("memory") and torch.cuda.is_available():
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.asked["memory"] / whole))

    def count_waits(self, on: bool) -> None:
        """By CUDA's own warnings; what is only shown is counted too, by its own lines."""
        import torch

        if not torch.cuda.is_available():
            return
        if on:
            warnings.showwarning = self._noted
            warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def _noted(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            names = ("slimpajama_hf", "transformers", "accelerate")
            frames = [frame for frame in traceback.extract_stack() if any(name in frame.filename for name in names)]
            self.waits[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"] += 1

    def look(self, trainer: Any) -> None:
        """How steps are made."""
        import torch

        step = trainer._written_out
        self.seen |= {
            "written out": step is not None,
            "captured": step is not None and step._replayed is not None,
            "computes in": trainer.computes_in,
            "mixed precision": str(trainer.accelerator.mixed_precision),
            "device": str(trainer.args.device),
            "own stream": not torch.cuda.is_available() or torch.cuda.current_stream() == torch.cuda.default_stream(),
        }

    def end(self) -> None:
        import torch

        self.seen["waits"] = dict(self.waits.most_common(12))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            free, whole = torch.cuda.mem_get_info()
            self.seen |= {
                "most allocated": torch.cuda.max_memory_allocated(),
                "most reserved": torch.cuda.max_memory_reserved(),
                "in use on the card": whole - free,
            }
        sys.stderr.write(f"\n{MARK}{json.dumps(self.seen)}\n")


def main() -> None:
    watch = Watch(json.loads(os.environ.get("WATCH", "{}")))
    watch.begin()
    sys.argv[0] = str(ROOT / "run_clm_slimpajama.py")
    atexit.register(watch.end)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
