"""Everything about a step: its ledger row, its text, and how much each of its tokens surprised the model.

The ledger and the corpus are enough: the text is read again from its place and checked by its hash (`reread.py`).
Surprisals at that time are in `surprisals.f32`. With a checkpoint, that checkpoint scores the same tokens too.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import terminal
from slimpajama_hf.errors import UserError, one_line
from slimpajama_hf.lookback import reread
from slimpajama_hf.record import checkpoints, ledger, surprisals
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.samples.pieces import Guesses
from slimpajama_hf.screen import Waiting

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Document
    from slimpajama_hf.lookback.reread import Place, TokenAgain
    from slimpajama_hf.samples.encoder import Encoder


#: Guesses of a checkpoint that are shown for each token, the likeliest first.
GUESSES = 5
#: If the mean of kept surprisals differs by more from the ledger's loss, they belong to another ledger; nats.
_SAME_LOSS = 1e-4


@dataclasses.dataclass(frozen=True)
class Guess:
    """A token that a checkpoint found likely at a place."""

    id: int
    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class CheckpointView:
    """How a checkpoint scores the tokens of a step."""

    step: int
    """Step of the checkpoint."""
    nats: np.ndarray
    """Surprisal of each token but the first, (T - 1,), float32."""
    guesses: list[list[Guess]]
    """(T - 1) x GUESSES"""
    accuracy: float
    """Fraction of the tokens that were its first guess."""


@dataclasses.dataclass
class Inspection:
    """Everything that is known about one step."""

    run: str
    row: dict[str, Any]
    """The row of the ledger."""
    record: dict[str, Any]
    """The content of `run.json`."""
    places: list[Place]
    documents: list[Document] = dataclasses.field(default_factory=list)
    tokens: list[TokenAgain] = dataclasses.field(default_factory=list)
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    """Names of the control tokens in `tokens`, by id."""
    then: np.ndarray | None = None
    """Surprisal of each token but the first when it was trained, (T - 1,), nats; None if not kept."""
    then_source: str | None = None
    now: CheckpointView | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def text_of(self, token: TokenAgain) -> str:
        """The characters of a token, or the name of a control token."""
        return self.documents[token.document].text[token.start : token.end] or self.names.get(token.id, "")

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        then, now = self._column(self.then), self._column(self.now.nats if self.now else None)
        tokens = []
        for index, token in enumerate(self.tokens):
            entry: dict[str, Any] = {"id": token.id, "text": self.text_of(token), "document": token.document}
            entry["then"] = then[index]
            if self.now is not None:
                entry["now"] = now[index]
                known = then[index] is not None and now[index] is not None
                entry["difference"] = now[index] - then[index] if known else None  # type: ignore[operator]
                entry["guesses"] = [dataclasses.asdict(guess) for guess in self.now.guesses[index - 1]] if index else []
            tokens.append(entry)
        return {
            "run": self.run,
            "step": self.row["step"],
            "row": self.row,
            "documents": [
                {
                    "shard": place.shard, "row": place.row, "text_sha1": place.sha1, "domain": document.domain,
                    "first_token": place.first_token, "tokens": place.tokens, "bytes": document.size,
                    "trained_characters": list(reread.covered(self.tokens, number)), "text": document.text,
                }
                for number, (place, document) in enumerate(zip(self.places, self.documents, strict=True))
            ],
            "tokens": tokens,
            "then": {"source": self.then_source, "loss": mean_of(self.then)},
            "now": None if self.now is None else {
                "checkpoint": self.now.step, "loss": mean_of(self.now.nats), "accuracy": self.now.accuracy
            },
            "notes": self.notes,
        }  # fmt: skip

    def _column(self, nats: np.ndarray | None) -> list[float | None]:
        """A value for each token; None for the first and for unknown ones."""
        if nats is None:
            return [None] * len(self.tokens)
        return [None, *(value if math.isfinite(value) else None for value in nats.tolist())]


def mean_of(nats: np.ndarray | None) -> float | None:
    value = math.nan if nats is None or not len(nats) else float(nats.astype(np.float64).mean())
    return value if math.isfinite(value) else None


# ---- finding out ----


def find_row(folder: RunFolder, step: int) -> tuple[dict[str, Any], int]:
    """(row of a step, tokens predicted before it). Raises UserError if the ledger does not have it."""
    predicted = number = 0
    try:
        for row in ledger.rows(folder.ledger):
            if number == step:
                return row, predicted
            predicted, number = predicted + ledger.predicted(row), number + 1
    except ledger.Damaged as error:
        raise UserError(f"{error}; see python -m slimpajama_hf verify {folder.path}") from None
    there = f"has steps 0 to {number - 1:,}" if number else "has no step yet"
    raise UserError(f"--step {step}: {folder.path} {there}; name one of them")


def checkpoint_folder(folder: RunFolder, step: int) -> Path:
    """The folder of a checkpoint by its step. Raises UserError that names the checkpoints that are there."""
    there = checkpoints.steps(folder.path)
    if step not in there:
        names = ", ".join(map(str, there)) or "none at all"
        raise UserError(f"--checkpoint {step}: {folder.path} has checkpoints {names}; name one of them")
    return checkpoints.path_of(folder.path, step)


def view_of(checkpoint: Path, step: int, ids: list[int], encoder: Encoder) -> CheckpointView:
    """How a checkpoint scores `ids` (T), computed in float32. Raises UserError if it cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(checkpoint), trust_remote_code=False).float().eval()
    except Exception as error:
        # torch, safetensors and transformers raise errors of their own for a damaged file.
        reason = one_line(error)
        raise UserError(
            f"{checkpoint}: cannot be loaded ({reason}); see python -m slimpajama_hf verify {checkpoint.parent}"
        ) from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        input_ids = torch.tensor([ids], device=model.device)  # (1, T)
        scores = torch.log_softmax(model(input_ids=input_ids, use_cache=False).logits[0, :-1].float(), dim=-1)
        nats = -scores.gather(1, input_ids[0, 1:, None])[:, 0]  # (T-1,)
        best = scores.topk(min(GUESSES, scores.shape[1]), dim=-1)  # (T-1, GUESSES)
        accuracy = (best.indices[:, 0] == input_ids[0, 1:]).float().mean().item()
    text = Guesses(encoder).text
    guesses = [
        [Guess(index, text(index), probability) for index, probability in zip(row, likely, strict=True)]
        for row, likely in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]
    return CheckpointView(step, nats.cpu().numpy(), guesses, accuracy)


def one_sample(row: dict[str, Any], predicted: int, number: int | None) -> tuple[dict[str, Any], int]:
    """The row of sample `number` of a step (None: the first), and the tokens predicted before it. Raises UserError."""
    count = ledger.samples_of(row)
    if number is not None and not 0 <= number < count:
        there = f"has samples 0 to {count - 1}" if count > 1 else "has one sample"
        raise UserError(
            f"--sample {number}: step {row['step']} {there}; " + ("name one of them" if count > 1 else "leave it out")
        )
    for place, each in enumerate(ledger.each_sample(row)):
        if place == (number or 0):
            return each, predicted
        predicted += ledger.predicted(each)
    raise AssertionError(number)


def passport(path: str | Path, step: int, sample: int | None = None) -> tuple[Inspection, int]:
    """What the ledger says about a step, and the tokens predicted before it. Raises UserError."""
    folder = RunFolder(Path(path).expanduser())
    record = folder.read_record()
    whole, predicted = find_row(folder, step)
    row, predicted = one_sample(whole, predicted, sample)
    found = Inspection(str(path), row, record, [])
    if (count := ledger.samples_of(whole)) > 1:
        found.notes.append(
            f"sample {sample or 0} of the {count} of this step (--sample K shows another); gradient and time are those "
            f"of the step, whose loss is {terminal.number(whole['loss'])}"
        )
    return found, predicted


def inspect(path: str | Path, step: int, checkpoint: int | None = None, sample: int | None = None) -> Inspection:
    """Everything about a step; with `checkpoint` (a step), that checkpoint's scores too.

    Raises UserError if the run has no such step or checkpoint, or if the corpus no longer has the text.
    """
    found, predicted = passport(path, step, sample)
    complete(found, predicted, checkpoint)
    return found


def complete(found: Inspection, predicted: int, checkpoint: int | None) -> None:
    """Add text, tokens and surprisals to what the ledger says about a step."""
    from slimpajama_hf import screen

    folder, row = RunFolder(Path(found.run).expanduser()), found.row
    now_folder = None if checkpoint is None else checkpoint_folder(folder, checkpoint)
    mode, length = found.record["model"]["sample_mode"], found.record["model"]["max_seq_length"]
    found.places = reread.places(row, mode, length)
    with Waiting("opening the corpus") as waiting:
        screen.quiet_libraries()
        corpus = reread.corpus_of(found.record)
        waiting(f"fetching {found.places[0].name}")
        found.documents = reread.read_places(corpus, found.places)
        waiting("cutting it into tokens")
        encoder = reread.encoder_of(folder, found.record)
        found.tokens = reread.tokens_again(encoder, found.places, found.documents, mode)
        ids = [token.id for token in found.tokens]
        found.names = {
            index: encoder.piece(index) for index in sorted(set(ids) & set(encoder.tokenizer.all_special_ids))
        }
        _add_then(found, folder, predicted, ids, encoder, waiting)
        if now_folder is not None and checkpoint is not None:
            waiting(f"loading checkpoint-{checkpoint}")
            found.now = view_of(now_folder, checkpoint, ids, encoder)
            if found.record["model"]["precision"] != "float32":
                found.notes.append(_other_precision(found))


def _other_precision(found: Inspection) -> str:
    """A note if the run was trained in another precision than float32, in which the checkpoint scores."""
    precision, loss, now = found.record["model"]["precision"], found.row["loss"], found.now
    said = f"the run was trained in {precision}, a checkpoint is asked in float32: the same weights differ a little"
    if now is not None and now.step == found.row["step"] and loss is not None:
        said += f", here by {abs(float(now.nats.astype(np.float64).mean()) - loss):.4f} nats per token"
    return said


def _add_then(
    found: Inspection, folder: RunFolder, predicted: int, ids: list[int], encoder: Encoder, waiting: Waiting
) -> None:
    """Add the surprisals of the step: those that were kept, or else those of the checkpoint saved just before it."""
    step, loss = found.row["step"], found.row["loss"]
    nats = surprisals.read(folder.surprisals, predicted, len(ids) - 1)
    mean = float(nats.astype(np.float64).mean())
    if loss is not None and math.isclose(mean, loss, rel_tol=1e-5, abs_tol=_SAME_LOSS):
        found.then, found.then_source = nats, folder.surprisals.name
        return
    if not math.isnan(mean):
        found.notes.append(f"{folder.surprisals.name} is not of this ledger: its mean is {mean:.4f}, the loss {loss}")
    if step in checkpoints.steps(folder.path):
        # Row s was computed with the weights of checkpoint-s.
        waiting(f"loading checkpoint-{step}")
        found.then = view_of(checkpoints.path_of(folder.path, step), step, ids, encoder).nats
        found.then_source = f"checkpoint-{step}"
    elif loss is not None:
        found.notes.append(
            "the surprisal of each token was not kept when this step was trained, and there is no "
            f"checkpoint-{step}; --checkpoint M shows that of another time"
        )
