"""Several processes of one run: what the first does for all, and what they tell each other between steps.

Every process reads the same stream (`samples.SampleStream`), so all know which documents are whose. The number of
tokens of a step is summed along with the gradients. The rest, losses and requests to stop, is told about twice a
second, not at every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from slimpajama_hf import devices, screen
from slimpajama_hf.corpus.documents import TOO_SHORT
from slimpajama_hf.errors import SaidByTheFirst, UserError
from slimpajama_hf.samples.handed_on import Machine
from slimpajama_hf.training.step_numbers import SampleNumbers, pack, split

if TYPE_CHECKING:
    import numpy as np

    from slimpajama_hf.samples.sample import Sample
    from slimpajama_hf.training.signals import StopSignals
    from slimpajama_hf.training.step_numbers import Step, StepNumbers


T = TypeVar("T")

#: How often processes exchange news, in seconds, and after how many steps at most.
NEWS_SECONDS, NEWS_STEPS = 0.5, 64


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this run; may be only one. `group`: a gloo group, so that no message waits for a GPU."""

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first_does(self, act: Callable[[], T]) -> T:
        """`act()`, called in the first process alone; all get its result (pickled), or its UserError or OSError.

        For a secret result, use `first_keeps`.
        """
        if self.world_size == 1:
            return act()
        told: list[Any] = [None]
        failure: Exception | None = None
        if self.is_first:
            try:
                told = [("done", act())]
            except (UserError, OSError, RuntimeError) as error:
                failure, told = error, [("failed", str(error))]
        with others_lost():
            dist.broadcast_object_list(told, src=0, group=self.group)
        outcome, value = told[0]
        if outcome == "done":
            return value
        raise failure if failure is not None else SaidByTheFirst(value)

    def first_keeps(self, act: Callable[[], T]) -> T | None:
        """`act()`, called in the first process alone. It gets the result, the others None; errors are raised in all."""
        kept: list[T] = []
        self.first_does(lambda: kept.append(act()))
        return kept[0] if kept else None

    def agree(self, failure: Exception | None) -> None:
        """Wait until all are here. Raises `failure`, else an OSError with the failure of another process."""
        if self.world_size > 1:
            told = self._told_by_all(str(failure) if failure else None)
            if failure is None:
                failed = [(rank, words) for rank, words in enumerate(told) if words]
                if failed:
                    failure = OSError(5, f"process {failed[0][0]}: {failed[0][1]}")
        if failure is not None:
            raise failure

    def machine(self) -> Machine | None:
        """The processes on this machine, with the socket of the first of them open; None if there is only one.

        Processes are on one machine if they see the same temporary folder under the same running kernel. The socket
        lies in that folder.
        """
        if self.world_size == 1:
            return None
        temporary, boot = os.stat(tempfile.gettempdir()), Path("/proc/sys/kernel/random/boot_id")
        # Host names are not always unique.
        kernel = boot.read_text() if boot.exists() else ""
        here = (socket.gethostname(), kernel, temporary.st_dev, temporary.st_ino)
        ranks = tuple(rank for rank, there in enumerate(self._told_by_all(here)) if there == here)
        machine = Machine(ranks) if len(ranks) > 1 and self.rank == ranks[0] else None
        places = self._told_by_all(machine and machine.place)
        return Machine(ranks, places[ranks[0]]) if machine is None and len(ranks) > 1 else machine

    def _told_by_all(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks."""
        told: list[Any] = [None] * self.world_size
        with others_lost():
            dist.all_gather_object(told, value, group=self.group)
        return told

    def most(self, numbers: list[float]) -> list[float]:
        """The greatest value that any process has, of each number."""
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.world_size > 1:
            with others_lost():
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values.tolist()

    def to_first(self, values: torch.Tensor) -> list[torch.Tensor]:
        """`values` of every process, of one shape on all, in the order of ranks; empty on all but the first."""
        if self.world_size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.world_size)] if self.is_first else None
        with others_lost():
            dist.gather(values, gathered, dst=0, group=self.group)
        return gathered or []

    def leave(self) -> None:
        """End together with all processes. Without this, gloo's threads sometimes end the program by SIGABRT."""
        if self.world_size > 1:
            with others_lost():
                dist.barrier(group=self.group)
            dist.destroy_process_group()


class OthersLost(UserError):
    """Another process of the run is gone, or no longer answers."""


@contextlib.contextmanager
def others_lost() -> Iterator[None]:
    """Context that turns errors of torch.distributed inside into OthersLost."""
    try:
        yield
    except RuntimeError as error:
        raise OthersLost(lost(error)) from error


def lost(error: Exception) -> str:
    """The message to show when communication with the other processes failed with `error`."""
    return (
        "another process of the run ended or no longer answers "
        f"({' '.join(str(error).split())[:120]}); start all of them again with --resume_from_checkpoint true"
    )


def is_about_others(error: BaseException) -> bool:
    """Whether torch.distributed raised `error` for a process that is gone (gloo: RuntimeError, NCCL: a DistError)."""
    told = str(error).lower()
    return isinstance(error, dist.DistError | OthersLost) or (
        isinstance(error, RuntimeError) and any(word in told for word in ("gloo", "nccl", "connection", "peer"))
    )


def join(training: Any) -> Processes:
    """Meet the other processes of the launcher; without any, this one is alone. Mutes the screen of all but the first.

    The process group must be open; accelerate opens it when `training` is made.
    """
    if not devices.is_distributed():
        return Processes()
    # GPT-2 uses all of its weights, and training changes no buffers: DDP need not look for unused ones or send buffers.
    for name in ("ddp_find_unused_parameters", "ddp_broadcast_buffers"):
        if getattr(training, name) is None:
            setattr(training, name, False)
    # torch renamed the second; transformers still uses the old name.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=training.ddp_timeout))
    team = Processes(dist.get_rank(), dist.get_world_size(), group)
    screen.SCREEN.muted = not team.is_first
    return team


def news(team: Processes, training: Any, signals: StopSignals) -> News | None:
    """The exchange of news for a run whose steps have several samples; None if a step is one document."""
    accumulated = training.gradient_accumulation_steps
    if team.world_size * accumulated == 1:
        return None
    signals.shared = True
    return News(team, accumulated, signals)


class News:
    """What the processes tell each other between steps: losses, to the first; and requests to stop or to save."""

    def __init__(self, team: Processes, accumulated: int, signals: StopSignals) -> None:
        self.team, self.accumulated, self._signals = team, accumulated, signals
        self._steps: list[tuple[Step, list[Sample], torch.Tensor]] = []
        self._interval = 1
        self.failing = False
        """Set by a process that cannot go on; the others learn of it with the next news."""
        self.failed = False
        """Whether any process cannot go on: all stop after this step."""

    def add(self, step: Step, own: list[tuple[Sample, torch.Tensor]], numbers: StepNumbers) -> list[Step]:
        """Add a finished step: this process' samples with the numbers of each (`SampleNumbers.pack`), and the step's.
        Returns the steps that are complete now, if it was time for news."""
        packed = pack(numbers, [values for sample, values in own if not sample.only_fills])
        self._steps.append((step, [sample for sample, _ in own], packed))
        return self.tell() if len(self._steps) >= self._interval else []

    def tell(self) -> list[Step]:
        """Exchange news now; all processes must call it at the same step. Returns new complete steps, in the first."""
        steps = [_Told(step, samples, *split(packed.cpu().numpy())) for step, samples, packed in self._steps]
        self._steps, signals = [], self._signals
        seconds = sum(told.step.seconds for told in steps) / max(len(steps), 1)
        width = sum(len(told.values) for told in steps)
        stop, save, failed, slowest, width_of_all = self.team.most(
            [float(signals.received or 0), float(signals.save_requested), float(self.failing), seconds, float(width)]
        )
        # Equal in all processes from here on, so that all do the same between the same steps.
        signals.agreed = signal.Signals(int(stop)) if stop else None
        signals.received = signals.received or signals.agreed
        signals.save_agreed, signals.save_requested = bool(save), False
        self.failed = bool(failed)
        if slowest and self.team.world_size > 1:
            self._interval = min(NEWS_STEPS, max(1, int(NEWS_SECONDS / slowest)))
        return self._shared(steps, int(width_of_all))

    def _shared(self, steps: list[_Told], width: int) -> list[Step]:
        """The steps with the numbers of all their samples, in the first process. `width`: the greatest length of any
        process' numbers."""
        if not steps:
            return []
        own = torch.cat([torch.from_numpy(told.values) for told in steps])
        own = torch.nn.functional.pad(own, (0, width - len(own)))
        # Facts that only the process that tokenized a sample knows; 0 tokens if the sample only fills a place.
        cuts = [
            [0, 0, 0, 0] if each.only_fills else [each.tokens, each.text_bytes, each.tokens_cut, each.tokens_cut_exact]
            for told in steps
            for each in told.samples
        ]
        everybodys_cuts = self.team.to_first(torch.tensor(cuts, dtype=torch.int64).view(len(steps), -1, 4))
        everybodys = self.team.to_first(own)
        if not self.team.is_first:
            return []
        begins = [0] * self.team.world_size
        shared = []
        for number, told in enumerate(steps):
            together, found, late = [], [], 0
            for place, sample in enumerate(told.step.sample.together):
                turn, rank = divmod(place, self.team.world_size)
                tokens, text_bytes, tokens_cut, exact = everybodys_cuts[rank][number, turn].tolist()
                if not tokens:
                    late += 1
                    continue
                end = begins[rank] + 1 + tokens
                found.append(SampleNumbers.unpack(everybodys[rank][begins[rank] : end].numpy()))
                begins[rank] = end
                cut: dict[str, Any] = {"tokens_cut": tokens_cut, "tokens_cut_exact": bool(exact)}
                together.append(dataclasses.replace(sample, tokens=tokens, text_bytes=text_bytes, **cut))
            skipped = Counter(told.step.sample.skipped)
            if late:
                skipped[TOO_SHORT] += late
            sample = dataclasses.replace(told.step.sample, together=together, skipped=dict(skipped))
            shared.append(dataclasses.replace(told.step, sample=sample, numbers=told.numbers, samples=found))
        return shared


@dataclasses.dataclass
class _Told:
    """A step as one process knows it."""

    step: Step
    samples: list[Sample]
    """This process' samples."""
    numbers: StepNumbers
    values: np.ndarray
    """The numbers of its samples that do not only fill a place, one after the other, float32."""


class Weights:
    """Factors for the mean loss of each sample, with which the mean over samples equals the mean over tokens. The
    number of tokens in all processes is summed on `device` while the step begins."""

    def __init__(self, team: Processes, accumulated: int, device: torch.device) -> None:
        self._several, self._size = team.world_size > 1, team.world_size * accumulated
        self._predicted = torch.zeros((), device=device)
        self._work: Any = None

    def begin(self, samples: list[Sample]) -> None:
        """Begin a step. `samples`: those of this process."""
        self._predicted.fill_(sum(sample.predicted for sample in samples if not sample.only_fills))
        if self._several:
            with others_lost():
                self._work = dist.all_reduce(self._predicted, async_op=True)

    def of(self, sample: Sample) -> torch.Tensor:
        """The weight of a sample of the step, (), on the device; 1 on average. Raises OthersLost."""
        if self._work is not None:
            with others_lost():
                self._work.wait()
            self._work = None
        if sample.only_fills:
            return torch.zeros_like(self._predicted)
        return sample.predicted * self._size / self._predicted
