"""Several processes of one run: what the first does for all, and what they tell each other between steps.

Which documents are whose needs no talk: each process reads the same stream (`samples.SampleStream`). What is told, the
losses of each and whether somebody was asked to stop, is told about twice a second instead of at every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from slimpajama_hf import devices, screen
from slimpajama_hf.errors import SaidByTheFirst, UserError
from slimpajama_hf.training.step_numbers import SampleNumbers, split

if TYPE_CHECKING:
    from slimpajama_hf.training.signals import StopSignals
    from slimpajama_hf.training.step_numbers import Step


T = TypeVar("T")

#: Processes tell each other the news this often, and after at most so many steps.
NEWS_SECONDS, NEWS_STEPS = 0.5, 64


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this run; one alone talks to nobody. `group`: gloo's, so that a GPU is not waited for."""

    rank: int = 0
    world_size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first_does(self, act: Callable[[], T]) -> T:
        """`act()`, done by the first process alone; all have its result (pickled) or its UserError or OSError.

        What is secret stays with the first: `first_keeps`.
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
        """`act()`, done by the first process alone, which has its result; the others have None, or its error too."""
        kept: list[T] = []
        self.first_does(lambda: kept.append(act()))
        return kept[0] if kept else None

    def agree(self, failure: Exception | None) -> None:
        """Wait until all are here. Raises the failure of this process, else an OSError with that of another."""
        if self.world_size > 1:
            told: list[Any] = [None] * self.world_size
            with others_lost():
                dist.all_gather_object(told, str(failure) if failure else None, group=self.group)
            if failure is None:
                failed = [(rank, words) for rank, words in enumerate(told) if words]
                if failed:
                    failure = OSError(5, f"process {failed[0][0]}: {failed[0][1]}")
        if failure is not None:
            raise failure

    def most(self, numbers: list[float]) -> list[float]:
        """Of each number the greatest that any process has."""
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
        """The end that all processes reach. Without it gloo's threads end the program by SIGABRT now and then."""
        if self.world_size > 1:
            with others_lost():
                dist.barrier(group=self.group)
            dist.destroy_process_group()


class OthersLost(UserError):
    """Another process of the run is gone, or no longer answers."""


@contextlib.contextmanager
def others_lost() -> Iterator[None]:
    """What torch.distributed raises inside becomes OthersLost."""
    try:
        yield
    except RuntimeError as error:
        raise OthersLost(lost(error)) from error


def lost(error: Exception) -> str:
    """What to say when talking to the other processes failed with `error`."""
    return (
        "another process of the run ended or no longer answers "
        f"({' '.join(str(error).split())[:120]}); start all of them again with --resume_from_checkpoint true"
    )


def is_about_others(error: BaseException) -> bool:
    """Whether `error` is torch.distributed's of a process that is gone (gloo raises RuntimeError, NCCL a DistError)."""
    told = str(error).lower()
    return isinstance(error, dist.DistError | OthersLost) or (
        isinstance(error, RuntimeError) and any(word in told for word in ("gloo", "nccl", "connection", "peer"))
    )


def join(training: Any) -> Processes:
    """Meet the other processes that the launcher started; alone without any. All but the first keep quiet from here on.

    accelerate has opened the process group when `training` was made.
    """
    if not devices.is_distributed():
        return Processes()
    # GPT-2 uses all of its weights and has no buffers that training changes: nothing to look for, nothing to send.
    for name in ("ddp_find_unused_parameters", "ddp_broadcast_buffers"):
        if getattr(training, name) is None:
            setattr(training, name, False)
    # torch has a new name for the second; transformers knows the old one.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=training.ddp_timeout))
    team = Processes(dist.get_rank(), dist.get_world_size(), group)
    screen.SCREEN.muted = not team.is_first
    return team


def news(team: Processes, training: Any, signals: StopSignals) -> News | None:
    """What tells a run whose steps have several samples about itself; None where a step is one document."""
    accumulated = training.gradient_accumulation_steps
    if team.world_size * accumulated == 1:
        return None
    signals.shared = True
    return News(team, accumulated, signals)


class News:
    """What the processes tell each other between steps: losses to the first, and who was asked to stop or to save."""

    def __init__(self, team: Processes, accumulated: int, signals: StopSignals) -> None:
        self.team, self._accumulated, self._signals = team, accumulated, signals
        self._steps: list[tuple[Step, torch.Tensor]] = []
        self._interval = 1
        self.failing = False
        """Set by a process that cannot go on, and told with the next news."""
        self.failed = False
        """Whether one of them cannot: all stop after this step."""

    def add(self, step: Step, values: torch.Tensor) -> list[Step]:
        """One more finished step with what this process knows of its numbers (`step_numbers.pack`), filled places left
        out; the steps that are known in full now, where it was time for news."""
        self._steps.append((step, values))
        return self.tell() if len(self._steps) >= self._interval else []

    def tell(self) -> list[Step]:
        """Tell and be told now, all processes at the same step; the first has the steps since the last time."""
        steps, self._steps = self._steps, []
        signals = self._signals
        seconds = sum(step.seconds for step, _ in steps) / max(len(steps), 1)
        stop, save, failed, slowest = self.team.most(
            [float(signals.received or 0), float(signals.save_requested), float(self.failing), seconds]
        )
        # Everybody's from here on, so that all do the same between the same steps.
        signals.agreed = signal.Signals(int(stop)) if stop else None
        signals.received = signals.received or signals.agreed
        signals.save_agreed, signals.save_requested = bool(save), False
        self.failed = bool(failed)
        if slowest and self.team.world_size > 1:
            self._interval = min(NEWS_STEPS, max(1, int(NEWS_SECONDS / slowest)))
        return self._shared(steps)

    def _places(self, step: Step, rank: int) -> list[int]:
        """Which samples of the step are those of `rank`."""
        size = self.team.world_size * self._accumulated
        return [p for p in range(rank, size, self.team.world_size) if p < len(step.sample.together)]

    def _shared(self, steps: list[tuple[Step, torch.Tensor]]) -> list[Step]:
        if not steps:
            return []
        ranks = range(self.team.world_size)
        widths = [
            max(sum(2 + step.sample.together[place].predicted for place in self._places(step, rank)) for rank in ranks)
            for step, _ in steps
        ]
        own, numbers, begin = torch.zeros(sum(widths)), [], 0
        for (_, values), width in zip(steps, widths, strict=True):
            of_step, of_samples = split(values.cpu().numpy())
            numbers.append(of_step)
            own[begin : begin + len(of_samples)] = torch.from_numpy(of_samples)
            begin += width
        everybodys = [values.numpy() for values in self.team.to_first(own)]
        if not self.team.is_first:
            return []
        told, begin = [], 0
        for (step, _), of_step, width in zip(steps, numbers, widths, strict=True):
            found: dict[int, SampleNumbers] = {}
            for rank in ranks:
                at = begin
                for place in self._places(step, rank):
                    end = at + 2 + step.sample.together[place].predicted
                    found[place] = SampleNumbers.unpack(everybodys[rank][at:end])
                    at = end
            told.append(dataclasses.replace(step, numbers=of_step, samples=[found[place] for place in sorted(found)]))
            begin += width
        return told
