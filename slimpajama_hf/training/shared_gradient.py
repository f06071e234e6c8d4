"""Sums gradients over processes: each computes the written-out step on its own sample, and all get the sum.

The gradients of a step lie in one row (`GPT2Step.gradients`). Processes on the CPUs of one machine sum their rows in
memory that all of them see (`shared_rows.py`). Others sum them in pieces over `torch.distributed`. A piece is sent as
soon as the backward has filled it, the last blocks first, while the next is computed. If the step is a CUDA graph, the
gradients are summed after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from slimpajama_hf.training.processes import others_lost

if TYPE_CHECKING:
    from slimpajama_hf.model.gpt2_step import GPT2Step, Result
    from slimpajama_hf.training.shared_rows import SharedRows

#: Pieces with fewer elements are not sent alone, because each message has a cost of its own.
SMALLEST_PIECE = 1 << 20

REDUCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SharedGradient:
    """Makes the gradients of `step` the mean over all predicted tokens of the step, in all processes.

    `weight`: the tensor that `step` multiplies its gradients by. `rows`: the rows of all processes, if `step` keeps its
    gradients in them. `dtype`: that of messages, `float32` or `bfloat16`; sums in bfloat16 are rounded to it too. The
    result is equal to the bit in every process.
    """

    MEMORY, MESSAGES = "memory that the processes share", "messages"
    """What can sum the gradients, in words."""

    def __init__(self, step: GPT2Step, weight: torch.Tensor, dtype: str, rows: SharedRows | None) -> None:
        self._step, self._weight, self._rows = step, weight, rows
        self.summed_by = self.MESSAGES if rows is None else self.MEMORY
        gradients = step.gradients
        self._sent = gradients if dtype == "float32" else torch.empty_like(gradients, dtype=REDUCE_DTYPES[dtype])
        self._under_way: list[tuple[Any, int, int]] = []
        self._whole: tuple[int, int] | None = None
        if gradients.device.type == "cpu" and rows is None:
            step.filled = self._filled

    def __call__(self, input_ids: torch.Tensor, weight: torch.Tensor) -> Result:
        """The step on one sample, (T,). `weight`: the weight of the sample, () (`Weights.of`), 1 on average over
        processes. Raises OthersLost if another process is gone, and torch.OutOfMemoryError."""
        torch.div(weight, dist.get_world_size(), out=self._weight)
        if self._rows is not None:
            result = self._step(input_ids)
            self._step.were_changed(self._rows.sum())
            return result
        self._under_way, self._whole = [], None
        result = self._step(input_ids)
        # Send the rest: the embeddings, which are filled last, the final norm, and pieces that were too small.
        done = sorted((first, last) for _, first, last in self._under_way)
        begin = 0
        for first, last in [*done, (self._step.gradients.numel(),) * 2]:
            if begin < first:
                self._send(begin, first)
            begin = last
        with others_lost():
            for work, first, last in self._under_way:
                work.wait()
                if self._sent is not self._step.gradients:
                    self._step.gradients[first:last].copy_(self._sent[first:last])
        self._step.were_changed()
        return result

    def _filled(self, first: int, last: int) -> None:
        """Take note of a part that is final; the part after it came in the call before."""
        end = self._whole[1] if self._whole is not None and self._whole[0] == last else last
        self._whole = (first, end)
        if end - first >= SMALLEST_PIECE:
            self._whole = None
            self._send(first, end)

    def _send(self, first: int, last: int) -> None:
        piece = self._sent[first:last]
        if self._sent is not self._step.gradients:
            piece.copy_(self._step.gradients[first:last])
        with others_lost():
            self._under_way.append((dist.all_reduce(piece, async_op=True), first, last))


def begin_equal(model: torch.nn.Module) -> None:
    """Give all processes the weights of the first, as DDP does."""
    with others_lost(), torch.no_grad():
        for parameter in model.parameters():
            dist.broadcast(parameter, src=0)
