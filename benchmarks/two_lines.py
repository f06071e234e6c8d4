"""What `RunRecord` adds to a step of the stock Trainer over the same stream: processor time and wall time, round by
round.

    python benchmarks/two_lines.py [--steps 150] [--rounds 5] [--batch 1] [--layers 4] [--width 256]

Both arms read the same `ExactStream`; each round has one run of each, in turn, in one process. Checkpoints and the
report are left out: they come as often as one asks for them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from slimpajama_hf import ExactStream, RunRecord, screen


class Clock(TrainerCallback):
    """(wall, processor) seconds at the beginning of each step."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def a_step(self, first: int = 20) -> tuple[float, float]:
        """Median wall seconds and mean processor seconds of a step, the first ones left out."""
        wall = [after[0] - before[0] for before, after in zip(self.at[first:-1], self.at[first + 1 :], strict=True)]
        processor = (self.at[-1][1] - self.at[first][1]) / (len(self.at) - 1 - first)
        return statistics.median(wall), processor


def run(options: argparse.Namespace, recorded: bool) -> tuple[float, float]:
    """Seconds of a step, wall and processor."""
    set_seed(1)
    stream = ExactStream("embedded", "builtin", max_length=256, shuffle_buffer=100)
    config = GPT2Config(
        vocab_size=len(stream.tokenizer), n_layer=options.layers, n_embd=options.width, n_head=4, n_positions=256
    )
    clock = Clock()
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
    return clock.a_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("steps", 150), ("rounds", 5), ("batch", 1), ("layers", 4), ("width", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    screen.quiet_libraries()
    run(options, False)
    ratios = []
    for number in range(options.rounds):
        # Who comes first changes from round to round.
        order = (False, True) if number % 2 else (True, False)
        found = {recorded: run(options, recorded) for recorded in order}
        (wall, processor), (own_wall, own_processor) = found[False], found[True]
        ratios.append((own_wall / wall, own_processor / processor))
        print(
            f"round {number}: {1000 * wall:.2f} ms a step, {1000 * own_wall:.2f} with it ({ratios[-1][0] - 1:+.1%}); "
            f"processor {1000 * processor:.2f} and {1000 * own_processor:.2f} ms ({ratios[-1][1] - 1:+.1%})"
        )
    wall, processor = (statistics.median(each) for each in zip(*ratios, strict=True))
    print(f"median of {options.rounds} rounds: wall {wall - 1:+.1%}, processor {processor - 1:+.1%}")


if __name__ == "__main__":
    main()
