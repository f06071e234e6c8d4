"""Writes `passports.jsonl`, with which the report explains single steps.

A passport is the document of a step with the surprisal of each token before and after the update, and the model's five
likeliest guesses for each token. The file is append-only JSON lines; a resume keeps the lines of earlier steps
(`run_folder.cut_to`).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from slimpajama_hf import files
from slimpajama_hf.record import ledger
from slimpajama_hf.record.spikes import LossSpikes
from slimpajama_hf.samples.pieces import Guesses, pieces
from slimpajama_hf.watching import budget
from slimpajama_hf.watching.keeper import Keeper

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


PASSPORTS = "passports.jsonl"

#: How many seconds of their share passports may use early: a run changes fastest at its beginning.
PASSPORTS_AHEAD_SECONDS = 0.25

#: Guesses for each token, the likeliest first.
GUESSES = 5

#: Passports spread evenly over a run, besides those at its beginning.
SPREAD = 200

#: Documents with an unusual loss for their time that are kept (only their tokens), highest and lowest each.
UNUSUAL = 12


def is_early(step: int) -> bool:
    """Whether `step` is one of 0, 1, 2, 3, 5, 8, 13, ... (Fibonacci): dense where a run changes fastest."""
    low, high = 0, 1
    while low < step:
        low, high = high, low + high
    return low == step


def _rounded(values: torch.Tensor) -> list[float | None]:
    """Rounded to five digits after the point; None for what is not finite."""
    return [round(value, 5) if math.isfinite(value) else None for value in values.tolist()]


def _log_probabilities(model: Any, input_ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (T - 1, V), float32, in evaluation mode; restores the mode. Draws no random number."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([input_ids], device=next(model.parameters()).device)  # (1, T)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # (T - 1, V)
            return torch.log_softmax(logits.float(), dim=-1)
    finally:
        model.train(training)


def _surprisals(log_probabilities: torch.Tensor, input_ids: Sequence[int]) -> torch.Tensor:
    """Surprisals of the true tokens, (T - 1,) nats, from (T - 1, V)."""
    came = torch.tensor(input_ids[1:], device=log_probabilities.device)
    return -log_probabilities.gather(1, came[:, None])[:, 0]


class SamplePassports(Keeper):
    """Keeps guesses and surprisals of some steps' documents, before and after their updates.

    `interval`: steps between passports, whatever they cost; None: about `SPREAD` over the run, within the budget. Steps
    0, 1, 2, 3, 5, 8, 13, ... are added. A line of `passports.jsonl`: `step`, `input_ids` (T), `pieces` (T texts),
    `before` and `after` (T - 1, nats), `top_ids` and `top_probs` (T - 1, 5), `guesses` (id -> text).

    As a listener of the recorder (`recorder.listeners.append(passports.on_row)`) it also keeps the tokens of documents
    with an unusual loss for their time: `step`, `input_ids`, `pieces` and `unusual`, the robust z-score. They are
    written at a checkpoint or at the end if they are still unusual: early in a run almost every document is.
    """

    def __init__(
        self,
        trainer: SlimPajamaTrainer,
        folder: RunFolder,
        encoder: Encoder,
        seeing_seconds: Callable[[], float],
        interval: int | None = None,
    ) -> None:
        super().__init__(trainer, folder.path / PASSPORTS, budget.PASSPORTS, PASSPORTS_AHEAD_SECONDS, seeing_seconds)
        self._ledger = folder.ledger
        self._encoder, self._interval = encoder, interval
        self._open: dict[str, Any] | None = None
        self._guesses: Guesses | None = None
        self._recent: deque[tuple[int, list[int]]] = deque(maxlen=64)  # the ledger may be some steps behind
        self._usual = _Unusual()
        self._hardest: list[tuple[float, int]] = []  # heaps of (absolute score, step): the least unusual first
        self._easiest: list[tuple[float, int]] = []
        self._unwritten: dict[int, tuple[float, list[int]]] = {}  # step -> score, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read again, after a resume, what is usual and which documents are unusual."""
        try:
            self._usual = _Unusual(
                row["loss"] for row in ledger.last_rows(self._ledger, LossSpikes.WINDOW) if row["loss"] is not None
            )
            for _, entry in files.json_lines(self.file.path):
                if "unusual" in entry:
                    self._enter(entry["unusual"], entry["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._say(f"{self.file.path} cannot be read ({error}); unusual documents are collected anew")

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether `step` gets a passport if the budget allows."""
        return is_early(step) or step % (self._interval or max(max_steps // SPREAD, 1)) == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the document with the weights before its update."""
        self._open = None
        if not self._able() or self._trainer.sample is None:
            return
        step = state.global_step
        self._recent.append((step, self._trainer.sample.input_ids))
        if self.is_due(step, state.max_steps) and (self._interval is not None or self._affordable()):
            self._guarded(step, "passport", lambda: self._look_before(step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the same document with the weights after its update."""
        entry, self._open = self._open, None
        if entry is not None:
            self._guarded(entry["step"], "passport", lambda: self._look_after(entry))

    def _look_before(self, step: int) -> None:
        assert self._trainer.sample is not None
        ids = self._trainer.sample.input_ids
        scores = _log_probabilities(self._model, ids)
        best = scores.topk(min(GUESSES, scores.shape[1]), dim=-1)  # (T - 1, 5)
        if self._guesses is None:
            self._guesses = Guesses(self._encoder)
        top_ids = best.indices.tolist()
        self._open = {
            "step": step,
            "input_ids": ids,
            "pieces": pieces(self._encoder, ids),
            "before": _rounded(_surprisals(scores, ids)),
            "top_ids": top_ids,
            "top_probs": [
                [round(p, 4) if math.isfinite(p) else None for p in row] for row in best.values.exp().tolist()
            ],
            "guesses": {str(token): self._guesses.text(token) for token in sorted({t for row in top_ids for t in row})},
        }

    def _look_after(self, entry: dict[str, Any]) -> None:
        ids = entry["input_ids"]
        entry["after"] = _rounded(_surprisals(_log_probabilities(self._model, ids), ids))
        self._append(entry, "passport")

    # ---- unusual documents ----

    def on_row(self, row: dict[str, Any]) -> None:
        """Take a new row of the ledger: keep its document if its loss is among the most unusual so far."""
        if row["loss"] is None:
            return
        score = self._usual.score(row["loss"])
        ids = next((ids for step, ids in self._recent if step == row["step"]), None)
        if score is not None and ids is not None:
            self._unwritten[row["step"]] = score, ids
            self._enter(score, row["step"])

    def _enter(self, score: float, step: int) -> None:
        """Add a step to the most unusual; forget the one that it replaces."""
        heap, entry = (self._hardest, (score, step)) if score > 0 else (self._easiest, (-score, step))
        if len(heap) < UNUSUAL:
            heapq.heappush(heap, entry)
        else:
            self._unwritten.pop(heapq.heappushpop(heap, entry)[1], None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them now, so that a resume from this checkpoint has them."""
        if self._able() and self._unwritten:
            self._guarded(state.global_step, "unusual documents", self._write_unusual)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._able():
            self._trainer.recorder.flush()  # so that on_row has seen the last rows
            self.on_save(args, state, control)

    def _write_unusual(self) -> None:
        while self._unwritten:
            step = min(self._unwritten)
            score, ids = self._unwritten.pop(step)
            self._append(
                {"step": step, "input_ids": ids, "pieces": pieces(self._encoder, ids), "unusual": score},
                "unusual document",
            )


class _Unusual(LossSpikes):
    """Gives the robust z-score of every loss among the 200 before it, not only of spikes."""

    THRESHOLD = -math.inf
