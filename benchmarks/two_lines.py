"""What `RunRecord` costs of a step of the stock Trainer.

    python benchmarks/two_lines.py [--steps 150] [--rounds 5] [--batch 1] [--layers 4] [--width 256]

Two ways. Its own time: what its callbacks, its look at the logits and its notes take, by the clock of the thread that
trains, as a share of that thread's time in all; so it hardly depends on what else the machine does. And, where --rounds
says so, runs with it and without it in turn, by the wall: for a machine that does nothing else. Both arms read the same
`ExactStream`; checkpoints and the report are left out, for they come as often as one asks for them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from slimpajama_hf import ExactStream, RunRecord, screen
from slimpajama_hf.anywhere.notes import Notes
from slimpajama_hf.anywhere.seen_numbers import SeenNumbers

#: Steps at the beginning that do not count.
FIRST = 20

#: What is done for the record in a step.
OWN = (
    *((RunRecord, name) for name in ("on_step_begin", "on_substep_end", "on_optimizer_step", "on_step_end")),
    (SeenNumbers, "_see"),
    (Notes, "add"),
)


class Clock(TrainerCallback):
    """Seconds at the beginning of each step: of the wall, of the thread, and of the thread in what is `OWN`."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float, float]] = []
        self.own = 0.0
        self._depth = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at.append((time.perf_counter(), time.thread_time(), self.own))

    def timed(self, call: Any) -> Any:
        """The same call, its time counted once where one is inside another."""

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            self._depth += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.own += time.thread_time() - start

        return counted

    def of_a_step(self) -> tuple[float, float, float]:
        """Median wall seconds of a step; mean seconds of the thread, and of it in what is ours."""
        wall = [after[0] - before[0] for before, after in zip(self.at[FIRST:-1], self.at[FIRST + 1 :], strict=True)]
        steps = len(self.at) - 1 - FIRST
        thread, own = ((end - begin) / steps for begin, end in zip(self.at[FIRST][1:], self.at[-1][1:], strict=True))
        return statistics.median(wall), thread, own


def run(options: argparse.Namespace, recorded: bool, timed: bool = False) -> tuple[float, float, float]:
    """Seconds of a step (`Clock.of_a_step`)."""
    set_seed(1)
    stream = ExactStream("embedded", "builtin", max_length=256, shuffle_buffer=100)
    config = GPT2Config(
        vocab_size=len(stream.tokenizer), n_layer=options.layers, n_embd=options.width, n_head=4, n_positions=256
    )
    clock = Clock()
    untouched = [(owner, name, getattr(owner, name)) for owner, name in OWN]
    for owner, name, call in untouched if timed else ():
        setattr(owner, name, clock.timed(call))
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place, max_steps=options.steps, per_device_train_batch_size=options.batch, save_strategy="no",
            disable_tqdm=True, logging_steps=100_000, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        record = [RunRecord(Path(place), stream, report=False)] if recorded else []
        trainer = Trainer(
            GPT2LMHeadModel(config), arguments, train_dataset=stream, data_collator=stream.collate,
            callbacks=[*record, clock],
        )  # fmt: skip
        trainer.train()
    for owner, name, call in untouched:
        setattr(owner, name, call)
    return clock.of_a_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("steps", 150), ("rounds", 5), ("batch", 1), ("layers", 4), ("width", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    screen.quiet_libraries()
    _, thread, own = run(options, True, timed=True)
    print(
        f"its own time: {1000 * own:.3f} ms of {1000 * thread:.2f} ms a step of the thread that trains "
        f"({own / (thread - own):+.2%} of a step without it)"
    )
    ratios = []
    for number in range(options.rounds):
        # Who comes first changes from round to round.
        order = (False, True) if number % 2 else (True, False)
        wall = {recorded: run(options, recorded)[0] for recorded in order}
        ratios.append(wall[True] / wall[False])
        print(f"round {number}: {1000 * wall[False]:.2f} ms a step, {1000 * wall[True]:.2f} with it")
    if ratios:
        print(f"median of {options.rounds} rounds, wall: {statistics.median(ratios) - 1:+.1%}")


if __name__ == "__main__":
    main()
