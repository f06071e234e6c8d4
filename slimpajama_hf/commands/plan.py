"""`plan`: find out what a run will cost, by making its first steps and throwing them away.

No formula knows this machine, but the program does. The same command with the same flags is started in a folder of its
own, watched for some steps and stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slimpajama_hf import bars, screen
from slimpajama_hf.errors import UserError
from slimpajama_hf.settings.arguments import help_text

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.settings.settings import Settings


HELP = "memory, time and disk of a run, found by making its first steps"
USAGE = "python -m slimpajama_hf plan [--config FILE.yaml]... [--flag value]..."
DESCRIPTION = "Make the first steps of the run that these flags would start, in a folder that is then deleted."


#: First steps, which warm up caches, the optimizer's state and a GPU's graph. They are not counted.
WARM_UP_STEPS = 8
#: A trial ends when one of the two is reached, but not before `FEWEST_STEPS`.
MOST_STEPS, MOST_SECONDS = 300, 40.0
FEWEST_STEPS = 12


@dataclasses.dataclass
class Trial:
    """What the first steps of a run have shown."""

    steps: int
    """Number of steps that count."""
    seconds_per_step: float
    """Mean training time of a step, charts and samples left out."""
    tokens_per_step: float
    start_seconds: float
    """Time from the command to the first finished step."""
    peak_bytes: int
    """The most memory that the process held."""
    device_bytes: int
    """The most memory that PyTorch held on a GPU; 0 without one."""
    parameters: int
    checkpoint_bytes: int


def run(argv: list[str]) -> Trial:
    """Start training with the flags `argv` and stop after some steps. Raises UserError with its error if it fails."""
    from slimpajama_hf.lookback.replay import SCRIPT
    from slimpajama_hf.record.columns import read_columns
    from slimpajama_hf.record.run_folder import RunFolder

    with tempfile.TemporaryDirectory(prefix="slimpajama-plan-") as temporary:
        folder = RunFolder(Path(temporary) / "run")
        command = [
            sys.executable, str(SCRIPT), *argv, "--output_dir", str(folder.path), "--no-checkpoint",
            "--push_to_hub", "false", "--watch", "false", "--resume_from_checkpoint", "false",
            "--viz_interval", "0", "--display_samples", "0",
        ]  # fmt: skip
        with open(Path(temporary) / "screen.txt", "w+", encoding="utf-8") as said:
            began = time.monotonic()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
            try:
                first_step = _watch(process, folder)
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                process.wait(timeout=120)
            finally:
                if process.poll() is None:
                    process.kill()
            if process.returncode not in (0, 128 + signal.SIGTERM):
                said.seek(0)
                raise UserError(_its_error(said.read()))
        columns = read_columns(folder.ledger)
        record = folder.read_record()
        skip = WARM_UP_STEPS if len(columns) > WARM_UP_STEPS + 3 else 0
        seconds = (columns.tokens / columns.throughput)[skip:]
        memory = record["memory"]
        return Trial(
            steps=len(seconds),
            seconds_per_step=_mean_without_hiccups(seconds.tolist()),
            tokens_per_step=float(columns.tokens[skip:].mean()),
            start_seconds=first_step - began,
            peak_bytes=memory["peak_bytes"],
            device_bytes=memory["device_bytes"],
            parameters=record["model"]["parameters"],
            checkpoint_bytes=record["model"]["checkpoint_bytes"],
        )


def _mean_without_hiccups(seconds: list[float]) -> float:
    """Mean, without the pauses that other work on the machine causes: no value counts for more than 3 medians."""
    middle = statistics.median(seconds)
    return statistics.fmean(min(value, 3 * middle) for value in seconds)


def _watch(process: subprocess.Popen, folder: RunFolder) -> float:
    """Wait until there are enough steps or the process ends. Returns when the first step was finished."""
    first_step = math.nan
    rows = 0
    with contextlib.ExitStack() as shown:
        shown.enter_context(screen.Waiting("starting the run, to make its first steps for real and throw them away"))
        counting = bars.Counting("Trial", MOST_STEPS)
        while process.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            rows = folder.ledger.read_bytes().count(b"\n") if folder.ledger.exists() else 0
            if not rows:
                continue
            if math.isnan(first_step):
                first_step = now
                shown.close()
                shown.enter_context(counting)
            by_time = min(rows / FEWEST_STEPS, (now - first_step) / MOST_SECONDS)
            counting(rows, share=max(rows / MOST_STEPS, min(by_time, 1.0)))
            if rows >= MOST_STEPS or (rows >= FEWEST_STEPS and now - first_step > MOST_SECONDS):
                break
    return first_step if rows else time.monotonic()


def _its_error(text: str) -> str:
    lines = [line.partition("error: ")[2] for line in text.splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else f"the trial failed: {' '.join(text.split())[-300:]}"


def report(settings: Settings, trial: Trial) -> list[str]:
    """Lines with memory, time and disk of the whole run."""
    from slimpajama_hf.screen import format_bytes

    training = settings.training
    steps = training.max_steps
    seconds = trial.start_seconds + steps * trial.seconds_per_step
    saves = 0 if settings.run.no_checkpoint else math.ceil(steps / training.save_steps)
    kept = min(saves, training.save_total_limit or saves)
    memory = f"{format_bytes(trial.peak_bytes)} of the machine"
    if trial.device_bytes:
        memory += f", {format_bytes(trial.device_bytes)} of the GPU"
    return [
        f"    model  {settings.model.model}, {trial.parameters / 1e6:.1f}M parameters",
        f"   memory  {memory}",
        f"     step  {1000 * trial.seconds_per_step:,.1f} ms, {trial.tokens_per_step:.0f} tokens, "
        f"{trial.tokens_per_step / trial.seconds_per_step:,.1f} tokens/s (mean of {trial.steps} steps made for real)",
        f"    first  step after {screen.format_time(trial.start_seconds)}",
        f"     time  {screen.format_time(seconds)} for {steps:,} steps; charts and samples at most 5 % on top",
        f"     disk  {format_bytes(kept * trial.checkpoint_bytes)} for {kept} checkpoints of "
        f"{format_bytes(trial.checkpoint_bytes)}",
    ]


def main(argv: list[str]) -> int:
    """Run `plan FLAGS`, with the flags of the training command. Writes the plan to stdout."""
    from slimpajama_hf.session import command_line

    settings = command_line.parse(argv)
    trial = run(argv)
    sys.stdout.write("\n".join(report(settings, trial)) + "\n")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan` are those of training, which have a parser of their own (`settings/flags.py`)."""
    parser.format_help = lambda: help_text(USAGE, DESCRIPTION) + "\n"  # type: ignore[method-assign]
