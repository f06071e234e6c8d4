"""`inspect RUN --step N`: the passport of a step, its text, and how much each of its tokens surprised the model.

Works from the ledger and the corpus: the text is fetched again by its place and checked by its hash (`reread.py`). What
surprised the model then is in `surprisals.f32`; with `--checkpoint M` the same tokens are put before that checkpoint.
`inspect RUN --find "a sentence"` is `search_index.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import checkpoints, ledger, palette, reread, search_index, surprisals, terminal
from slimpajama_hf.corpora import Document
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.reread import Place, TokenAgain
from slimpajama_hf.run_folder import RunFolder
from slimpajama_hf.screen import Waiting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from slimpajama_hf.tokenizer import Encoder

#: Guesses of a checkpoint shown for each token, the likeliest first.
GUESSES = 5
#: Tokens in the table where the text is coloured too.
TOKENS_SHOWN = 12
#: Characters of a token in it.
TOKEN_SHOWN = 18
#: Characters shown of what was not trained, on either side.
CUT_SHOWN = 300
#: Difference of the mean of kept surprisals from the ledger's loss beyond which they are not its, nats.
_SAME_LOSS = 1e-4


@dataclasses.dataclass(frozen=True)
class Guess:
    """One of the tokens that a checkpoint found likely at a place."""

    id: int
    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class CheckpointView:
    """How a checkpoint sees the tokens of a step."""

    step: int
    """Of the checkpoint."""
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
    """`run.json`."""
    places: list[Place]
    documents: list[Document] = dataclasses.field(default_factory=list)
    tokens: list[TokenAgain] = dataclasses.field(default_factory=list)
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    """Names of the control tokens among `tokens`, by id."""
    then: np.ndarray | None = None
    """Surprisal of each token but the first when it was trained, (T - 1,), nats; None where it was not kept."""
    then_source: str | None = None
    now: CheckpointView | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def text_of(self, token: TokenAgain) -> str:
        """The characters that a token stands for; the name of a control token."""
        return self.documents[token.document].text[token.start : token.end] or self.names.get(token.id, "")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
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
            "then": {"source": self.then_source, "loss": _mean(self.then)},
            "now": None if self.now is None else {
                "checkpoint": self.now.step, "loss": _mean(self.now.nats), "accuracy": self.now.accuracy
            },
            "notes": self.notes,
        }  # fmt: skip

    def _column(self, nats: np.ndarray | None) -> list[float | None]:
        """A value for each token, None for the first and for what is not known."""
        if nats is None:
            return [None] * len(self.tokens)
        return [None, *(value if math.isfinite(value) else None for value in nats.tolist())]


def _mean(nats: np.ndarray | None) -> float | None:
    value = math.nan if nats is None or not len(nats) else float(nats.astype(np.float64).mean())
    return value if math.isfinite(value) else None


# ---- finding out ----


def find_row(folder: RunFolder, step: int) -> tuple[dict[str, Any], int]:
    """(row of a step, tokens predicted before it). Raises UserError when the ledger has not got it."""
    predicted = number = 0
    if folder.ledger.is_file():
        with open(folder.ledger, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    if row["step"] != number:
                        raise ValueError(f"its line holds step {row['step']}")
                    if number == step:
                        return row, predicted
                    predicted += ledger.predicted(row)
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{folder.ledger}: step {number} cannot be read ({error}); "
                        f"see python -m slimpajama_hf verify {folder.path}"
                    ) from None
                number += 1
    there = f"has steps 0 to {number - 1:,}" if number else "has no step yet"
    raise UserError(f"--step {step}: {folder.path} {there}; name one of them")


def checkpoint_folder(folder: RunFolder, step: int) -> Path:
    """The folder of a checkpoint by its step. Raises UserError naming those that are there."""
    there = checkpoints.steps(folder.path)
    if step not in there:
        names = ", ".join(map(str, there)) or "none at all"
        raise UserError(f"--checkpoint {step}: {folder.path} has checkpoints {names}; name one of them")
    return checkpoints.path_of(folder.path, step)


def view_of(checkpoint: Path, step: int, ids: list[int], encoder: Encoder) -> CheckpointView:
    """How a checkpoint sees `ids` (T), computed in float32. Raises UserError when it cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(checkpoint)).float().eval()
    except Exception as error:
        # torch, safetensors and transformers have errors of their own for a damaged file.
        reason = " ".join(str(error).split())[:200]
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
    texts: dict[int, str] = {}
    before = encoder.encode("a")[0][-1:]
    opening = len(encoder.decode(before))

    def text(token: int) -> str:
        # Decoded behind a letter: SentencePiece drops the space of a token that begins a text.
        if token not in texts:
            own = encoder.decode([*before, token])[opening:]
            texts[token] = own if own and "\ufffd" not in own else encoder.piece(token)
        return texts[token]

    guesses = [
        [Guess(index, text(index), probability) for index, probability in zip(row, likely, strict=True)]
        for row, likely in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]
    return CheckpointView(step, nats.cpu().numpy(), guesses, accuracy)


def one_sample(row: dict[str, Any], predicted: int, number: int | None) -> tuple[dict[str, Any], int]:
    """The row of sample `number` of a step (None: its first) and the tokens predicted before that. Raises UserError."""
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
    """What the ledger alone says about a step, and the tokens predicted before it. Raises UserError."""
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
    """Everything about a step; with `checkpoint` (a step) that checkpoint's view of it too.

    Raises UserError when the run has no such step or checkpoint, and when the corpus has not got its text any more.
    """
    found, predicted = passport(path, step, sample)
    complete(found, predicted, checkpoint)
    return found


def complete(found: Inspection, predicted: int, checkpoint: int | None) -> None:
    """Add text, tokens and surprisals to what the ledger says of a step."""
    from slimpajama_hf import session

    folder, row = RunFolder(Path(found.run).expanduser()), found.row
    now_folder = None if checkpoint is None else checkpoint_folder(folder, checkpoint)
    mode, length = found.record["model"]["sample_mode"], found.record["model"]["max_seq_length"]
    found.places = reread.places(row, mode, length)
    with Waiting("opening the corpus") as waiting:
        session.quiet_libraries()
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
    """What to say where a checkpoint sees in float32 what was trained in bfloat16."""
    precision, loss, now = found.record["model"]["precision"], found.row["loss"], found.now
    said = f"the run was trained in {precision}, a checkpoint is asked in float32: the same weights differ a little"
    if now is not None and now.step == found.row["step"] and loss is not None:
        said += f", here by {abs(float(now.nats.astype(np.float64).mean()) - loss):.4f} nats per token"
    return said


def _add_then(
    found: Inspection, folder: RunFolder, predicted: int, ids: list[int], encoder: Encoder, waiting: Waiting
) -> None:
    """The surprisals of the step: kept ones, else those of the checkpoint that was saved just before it."""
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


# ---- showing ----


def _passport_lines(found: Inspection) -> list[tuple[str, str]]:
    row, record = found.row, found.record
    mode = record["model"]["sample_mode"]
    about = "" if row["tokens_cut_exact"] else "about "
    tokens = f"{row['tokens']:,} trained, {row['text_bytes']:,} bytes"
    if mode == "truncate":
        tokens += f"; {about}{row['tokens_cut']:,} cut"
    elif mode == "window":
        tokens += f"; window {row['part']} of its document, counted from 0"
    bits = row["code_bits"]
    per_byte = bits / row["text_bytes"] if bits is not None and row["text_bytes"] else None
    name = record["corpus"]["name"]
    lines = [
        ("corpus", name if name == row["mirror"] else f"{name} ({row['mirror']})"),
        ("document", f"{row['shard']} row {row['row']:,}"),
        ("SHA-1", row["text_sha1"]),
        ("domain", palette.domain_name(row["domain"])),
        ("tokens", tokens),
        ("loss", f"{terminal.number(row['loss'])} nats per token, {terminal.number(per_byte, '.3f')} bits per byte"),
        ("accuracy", f"{terminal.number(row['accuracy'], '.1%')} of next tokens right"),
        ("gradient", f"{terminal.number(row['grad_norm'])} (L2 norm before clipping)"),
        ("learning rate", f"{row['learning_rate']:.3e}"),
        ("time", f"{1000 * row['step_seconds']:,.1f} ms, {row['throughput']:,.0f} tokens/s"),
    ]
    if found.places[1:]:
        joined = ", ".join(f"{place.name} ({place.tokens})" for place in found.places)
        lines[1] = ("documents", f"{len(found.places)} joined by EOS (tokens): {joined}")
    if row.get("spike") is not None:
        lines.append(("spike", f"{row['spike']:g} robust standard deviations above the 200 steps before it"))
    if row.get("loss_after") is not None:
        # The row after this one has that document's loss after this update.
        following = f"; that of the next document was {row['next_loss']:.4f} before it" if row.get("next_loss") else ""
        lines.append(("taught", f"loss {row['loss_after']:.4f} after its own update{following}"))
    if row.get("update_skipped"):
        lines.append(("not learned", f"the update was skipped: {row['update_skipped']}"))
    if row.get("skipped"):
        passed = ", ".join(f"{count:,} {reason}" for reason, count in row["skipped"].items())
        lines.append(("passed over", f"{passed} (records before this one)"))
    for gap in row.get("gaps") or []:
        lines.append(("gap", f"{gap['shard']} set aside from row {gap['row']:,} on: {gap['reason']}"))
    return lines


def show_passport(drawn: Console, found: Inspection) -> None:
    """The passport of a step on a terminal."""
    from rich.text import Text

    drawn.print(Text(f"step {found.row['step']:,} of {found.run}", "bold"))
    table = terminal.grid({}, {"overflow": "fold"})
    for name, value in _passport_lines(found):
        shown = Text(terminal.visible(value, line_ends=False))
        if name == "domain":
            # The name has the terminal's own colour: the domain's may be as dark as its ground.
            shown = Text.assemble(("■ ", palette.domain_colour(found.row["domain"])), shown)
        table.add_row(Text(name, "dim"), shown)
    drawn.print(table)


def show_text(drawn: Console, found: Inspection, tokens_shown: int | None) -> None:
    """The text of a step on a terminal, its tokens coloured by their surprisal, and the table of the most telling.

    `tokens_shown`: rows of the table; None: few where there are colours, all where there are none.
    """
    from rich.text import Text

    colours = terminal.has_colours(drawn)
    views: list[tuple[str, np.ndarray | None]] = [("", None)]
    if colours and found.then is not None:
        views = [(f"as it was learned ({found.then_source}), loss {terminal.number(_mean(found.then))}", found.then)]
    if colours and found.now is not None:
        views = [view for view in views if view[1] is not None]
        views.append(
            (f"under checkpoint-{found.now.step}, loss {terminal.number(_mean(found.now.nats))}", found.now.nats)
        )
    for title, nats in views:
        drawn.print()
        heading = Text("text", "bold")
        if title:
            heading.append(f" {title}", "not bold")
        drawn.print(heading)
        if nats is views[0][1] and nats is not None:
            drawn.print(terminal.legend())
        drawn.print(_text(found, nats), overflow="fold", end="")
    if found.then is not None or found.now is not None:
        _show_tokens(drawn, found, tokens_shown if tokens_shown is not None else TOKENS_SHOWN if colours else 10**9)
    for note in found.notes:
        drawn.print(Text(f"note: {note}", "italic"))


def _text(found: Inspection, nats: np.ndarray | None) -> Text:
    """The text of a step; what was not trained, dim, on both sides of each document."""
    from rich.text import Text

    shown = Text(end="")
    for number, document in enumerate(found.documents):
        start, end = reread.covered(found.tokens, number)
        if found.documents[1:]:
            shown.append(f"[{found.places[number].name}]\n", "dim")
        if start:
            left_out = f"… {start - CUT_SHOWN:,} characters … " if start > CUT_SHOWN else ""
            shown.append(left_out + terminal.visible(document.text[max(0, start - CUT_SHOWN) : start]), "dim")
            shown.append("▏")
        for index, token in enumerate(found.tokens):
            if token.document == number:
                known = nats is not None and index > 0
                style = terminal.surprisal_style(float(nats[index - 1])) if known else ""  # type: ignore[index]
                shown.append(terminal.visible(found.text_of(token)), style)
        if end < len(document.text):
            rest = len(document.text) - end
            shown.append("▏")
            shown.append(terminal.visible(document.text[end : end + CUT_SHOWN]), "dim")
            if rest > CUT_SHOWN:
                shown.append(f" … {rest - CUT_SHOWN:,} characters more", "dim")
        if not shown.plain.endswith("\n"):
            shown.append("\n")
    return shown


def _show_tokens(drawn: Console, found: Inspection, most: int) -> None:
    """Tokens with their surprisal then and now: all in order, or those that say most."""
    from rich.text import Text

    then = found.then
    now = found.now.nats if found.now is not None else None
    both = now - then if now is not None and then is not None else None
    weight = np.abs(both) if both is not None else then if then is not None else now
    assert weight is not None
    chosen: np.ndarray = np.arange(len(weight))
    title = "every token"
    if most < len(weight):
        chosen = np.sort(np.argsort(-np.nan_to_num(weight, nan=-1.0), kind="stable")[:most])
        what = "that changed most" if both is not None else "that surprised most"
        title = f"the {most} tokens {what} (all of them: --tokens {len(weight)})"
    drawn.print()
    drawn.print(Text(f"{title}, nats", "bold"))
    columns: list[dict[str, Any]] = [{"header": "place", "justify": "right", "min_width": 5}, {"header": "token"}]
    columns += [
        {"header": name, "justify": "right", "min_width": len("change")}
        for name, column in (("then", then), ("now", now), ("change", both))
        if column is not None
    ]
    if found.now is not None:
        # The one column that may be cut.
        columns[1]["min_width"] = max(len(_quoted(found.text_of(found.tokens[index + 1]))) for index in chosen)
        columns.append({"header": f"what checkpoint-{found.now.step} expected", "overflow": "ellipsis"})
    table = terminal.grid(*(column | {"no_wrap": True} for column in columns))
    for index in chosen.tolist():
        token = found.tokens[index + 1]
        cells = [Text(str(index + 1), "dim"), _quoted(found.text_of(token))]
        cells += [
            Text(terminal.number(float(column[index]), ".2f"), terminal.surprisal_style(float(column[index])))
            for column in (then, now)
            if column is not None
        ]
        if both is not None:
            change = float(both[index])
            cells.append(Text(terminal.number(change, "+.2f"), terminal.LESS if change < 0 else terminal.MORE))
        if found.now is not None:
            guesses = Text(overflow="ellipsis", no_wrap=True)
            for guess in found.now.guesses[index]:
                right = guess.id == token.id
                guesses.append_text(_quoted(guess.text, "bold" if right else ""))
                guesses.append(f" {guess.probability:.0%}  ", "dim")
            cells.append(guesses)
        table.add_row(*cells)
    drawn.print(table)


def _quoted(text: str, style: str = "") -> Text:
    """The first characters of a token's text between marks, so that its spaces are seen."""
    from rich.text import Text

    shown = terminal.visible(text, line_ends=False)
    return Text(f"‹{shown if len(shown) <= TOKEN_SHOWN else shown[: TOKEN_SHOWN - 1] + '…'}›", style)


# ---- the command ----


def main(options: argparse.Namespace) -> int:
    """`inspect RUN --step N` or `--find TEXT`; the exit code."""
    if options.find is not None:
        if any(each is not None for each in (options.checkpoint, options.tokens, options.sample)):
            raise UsageError("--find: --checkpoint, --tokens and --sample belong to --step; leave them out")
        return search_index.main(options.run, options.find, options.json)
    found, predicted = passport(options.run, options.step, options.sample)
    if options.json:
        complete(found, predicted, options.checkpoint)
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
        return 0
    drawn = terminal.console()
    try:
        complete(found, predicted, options.checkpoint)
    except UserError:
        # What the ledger says is known in any case.
        show_passport(drawn, found)
        raise
    show_passport(drawn, found)
    show_text(drawn, found, options.tokens)
    return 0
