"""Work on a CUDA device captured once and replayed as one graph: one launch where there were hundreds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Made = TypeVar("Made")

#: Runs before a capture: what libraries set up at their first calls must not be captured.
WARM_UPS = 3


class Refused(Exception):
    """The driver, or an operator, does not let this work be captured; says why."""


class Recording(Generic[Made]):
    """`work` captured on the current CUDA device; `result` is what it returned, overwritten by each `replay`.

    Raises Refused where it cannot be captured, torch.OutOfMemoryError where memory is short. Either way the stream that
    was current is so again, and the work can be done uncaptured.
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
            # `torch.cuda.graph` leaves its own stream current when the end of a capture is refused.
            torch.cuda.set_stream(current)
            short = _shortage(error)
            if short is not None:
                raise short from None
            torch.cuda.synchronize()
            raise Refused(" ".join(str(error).split())[:200]) from error

    def replay(self) -> None:
        self._graph.replay()


def _shortage(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory that an error came of: the end of the capture is refused in its place."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return error
        error = error.__cause__ or error.__context__
    return None


def recorder_of(device: torch.device) -> Callable[[Callable[[], Any]], Any] | None:
    """What captures work on `device`; None where nothing does."""
    return Recording if device.type == "cuda" else None
