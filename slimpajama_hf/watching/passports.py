"""What a run keeps beside its ledger so that its report can explain single steps: `passports.jsonl`, `prompts.jsonl`.

A passport is the document of a step with the surprisal of each token before and after the update, and the model's five
likeliest guesses at each place. Both files are append-only JSON lines; a resume keeps what lies before its step
(`run_folder.cut_back_lines(path, lambda entry: entry["step"] < point.step)`).
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

#: How far passports may be ahead of their share, seconds: the beginning changes fastest.
PASSPORTS_AHEAD_SECONDS = 0.25

#: Guesses kept at each place, the likeliest first.
GUESSES = 5

#: Passports spread evenly over a run, beside those at its beginning.
SPREAD = 200

#: Documents kept (their tokens alone) because their loss was unusual for its time, on each side.
UNUSUAL = 12


def is_early(step: int) -> bool:
    """Whether `step` is one of 0, 1, 2, 3, 5, 8, 13, ... (Fibonacci): dense where a run changes fastest."""
    low, high = 0, 1
    while low < step:
        low, high = high, low + high
    return low == step


def _rounded(values: torch.Tensor) -> list[float | None]:
    """Five digits after the point; what is not finite becomes None."""
    return [round(value, 5) if math.isfinite(value) else None for value in values.tolist()]


def _log_probabilities(model: Any, input_ids: Sequence[int]) -> torch.Tensor:
    """(T - 1, V) float32, in evaluation mode; the model is in its former mode after. No random number is drawn."""
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
    """(T - 1,) nats of the tokens that came, from (T - 1, V)."""
    came = torch.tensor(input_ids[1:], device=log_probabilities.device)
    return -log_probabilities.gather(1, came[:, None])[:, 0]


class SamplePassports(Keeper):
    """At a well-spread sample of steps: guesses and surprisals of the step's document, before and after its update.

    `interval`: steps between passports, obeyed whatever it costs; None: about `SPREAD` over the run, within its budget.
    Steps 0, 1, 2, 3, 5, 8, 13, ... come on top. A line of `passports.jsonl`: `step`, `input_ids` (T), `pieces` (T
    texts), `before` and `after` (T - 1, nats), `top_ids` and `top_probs` (T - 1, 5), `guesses` (id -> text).

    As a listener of the recorder (`recorder.listeners.append(passports.on_row)`) it also keeps the tokens of documents
    whose loss was unusual for its time: `step`, `input_ids`, `pieces` and `unusual`, the robust z-score. Those that
    still are unusual at a checkpoint or at the end are written then: early in a run almost every document is.
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
        self._recent: deque[tuple[int, list[int]]] = deque(maxlen=64)  # the ledger may lag some steps behind
        self._usual = _Unusual()
        self._hardest: list[tuple[float, int]] = []  # heaps of (size of the score, step): the least unusual first
        self._easiest: list[tuple[float, int]] = []
        self._unwritten: dict[int, tuple[float, list[int]]] = {}  # step -> score, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is usual is known again after a resume."""
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
        """Whether `step` gets a passport if it can be afforded."""
        return is_early(step) or step % (self._interval or max(max_steps // SPREAD, 1)) == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the document with the weights that the step was computed with."""
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
        """A new row of the ledger: remember its document if its loss is among the most unusual so far."""
        if row["loss"] is None:
            return
        score = self._usual.score(row["loss"])
        ids = next((ids for step, ids in self._recent if step == row["step"]), None)
        if score is not None and ids is not None:
            self._unwritten[row["step"]] = score, ids
            self._enter(score, row["step"])

    def _enter(self, score: float, step: int) -> None:
        """Put a step among the most unusual; the one that gives way to it is forgotten."""
        heap, entry = (self._hardest, (score, step)) if score > 0 else (self._easiest, (-score, step))
        if len(heap) < UNUSUAL:
            heapq.heappush(heap, entry)
        else:
            self._unwritten.pop(heapq.heappushpop(heap, entry)[1], None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What stands in a checkpoint's folder by then is there after a resume from it."""
        if self._able() and self._unwritten:
            self._guarded(state.global_step, "unusual documents", self._write_unusual)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._able():
            self._trainer.recorder.flush()  # the last rows of the ledger are among what is looked at
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
    """The robust z-score of every loss among the 200 before it, not of spikes alone."""

    THRESHOLD = -math.inf
