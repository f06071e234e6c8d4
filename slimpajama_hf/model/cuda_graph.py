"""Captures work on a CUDA device as one graph, which is replayed with one launch in place of hundreds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F

from slimpajama_hf.errors import one_line
from slimpajama_hf.model import transfers

Made = TypeVar("Made")

#: Runs before a capture: what libraries set up in their first calls must not be captured.
WARM_UPS = 3


class Refused(Exception):
    """The driver or an operator does not let this work be captured; the message says why."""


class Recording(Generic[Made]):
    """`work`, captured on the current CUDA device. `result` is what it returned; each `replay` overwrites it.

    Raises Refused if the work cannot be captured, torch.OutOfMemoryError if memory is short. In both cases the current
    stream is restored, and the work can run uncaptured.
    """

    def __init__(self, work: Callable[[], Made]) -> None:
        current = torch.cuda.current_stream()
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.result = work()
        except RuntimeError as error:
            # If the end of a capture fails, `torch.cuda.graph` leaves its own stream as the current one.
            torch.cuda.set_stream(current)
            short = _shortage(error)
            if short is not None:
                raise short from None
            torch.cuda.synchronize()
            raise Refused(one_line(error)) from error

    def replay(self) -> None:
        self._graph.replay()


def _shortage(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The out-of-memory error behind `error`, or None: the end of the capture fails with another error."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return error
        error = error.__cause__ or error.__context__
    return None


def recorder_of(device: torch.device) -> Callable[[Callable[[], Any]], Any] | None:
    """The class that captures work on `device`; None if its kind of device has none."""
    return Recording if device.type == "cuda" else None


class Replayed:
    """A step captured at one `length`. Shorter samples are padded, and padding has no share in the loss.

    No token sees what follows it, so padding does not change the tokens before it. `run`: the step on ids and shares,
    (length,) each; it returns a dataclass of tensors. `shares(tokens, length)`: as `GPT2Step._shares`.
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor, torch.Tensor], Any],
        shares: Callable[[int, int], torch.Tensor],
        length: int,
        device: torch.device,
        record: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._length = length
        self._ids = torch.zeros(length, dtype=torch.long, device=device)
        self._shares = shares(length, length)
        self._recording = record(lambda: run(self._ids, self._shares))

    def __call__(self, input_ids: torch.Tensor) -> Any:
        """The step on `input_ids` (T,) with T <= length."""
        tokens = input_ids.numel()
        transfers.into(self._ids, F.pad(input_ids, (0, self._length - tokens)))
        self._shares.zero_()
        self._shares[: tokens - 1].fill_(1.0 / (tokens - 1))
        self._recording.replay()
        # Copied, because the next replay overwrites them.
        made = self._recording.result
        return dataclasses.replace(
            made, **{field.name: getattr(made, field.name).clone() for field in dataclasses.fields(made)}
        )
