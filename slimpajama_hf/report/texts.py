"""The texts on the page: passports, samples, prompts, and unusual documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import files
from slimpajama_hf.record import surprisals
from slimpajama_hf.report import documents
from slimpajama_hf.report.numbers import BLOCK, mean_of

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns
    from slimpajama_hf.record.run_folder import RunFolder


_UNUSUAL = 12


# ---- documents -----------------------------------------------------------------------------------------------------


def with_surprisals(passports: list[dict[str, Any]], rows: Columns, nats: np.ndarray | None) -> list[dict[str, Any]]:
    """The passports. Surprisals before the step are added from the surprisals file if a passport has none and the file
    has them."""
    if nats is None:
        return passports
    begins, found = surprisals.offsets(rows.predicted), []
    for passport in passports:
        step, predicted = passport["step"], len(passport["input_ids"]) - 1
        values = np.asarray(nats[begins[step] : begins[step] + predicted], np.float64)
        if "before" not in passport and rows.first_predicted[step] == predicted == len(values):
            passport = passport | {"before": values.tolist()}
        found.append(passport)
    return found


def pack_passports(passports: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of the passports, joined, and the texts that their indices refer to.

    `piece`: the tokens of each passport. `before`, `after`: ten-thousandths of a nat, tokens - 1 of each. `top`,
    `chance`: if a passport has them, five guesses for each predicted token; the probability is the square of n/255.
    """
    vocabulary: dict[str, int] = {}

    def number(text: Any) -> int:
        return vocabulary.setdefault(str(text), len(vocabulary))

    piece: list[int] = []
    before: list[np.ndarray] = []  # parts, joined at the end
    after: list[np.ndarray] = []
    top: list[np.ndarray] = []
    chance: list[np.ndarray] = []
    for passport in passports:
        predicted = len(passport["input_ids"]) - 1
        piece += [number(text) for text in passport["pieces"]]
        unknown = np.full(predicted, documents.UNKNOWN, np.uint32)
        for name, parts in (("before", before), ("after", after)):
            parts.append(documents.ten_thousandths(documents.numbers(passport[name])) if name in passport else unknown)
        if "top_ids" in passport:
            guesses = passport.get("guesses", {})
            top.append(
                np.array(
                    [[number(guesses.get(str(i), f"<{i}>")) for i in _five(ids, -1)] for ids in passport["top_ids"]],
                    np.uint32,
                ).ravel()
            )
            probabilities = np.array([documents.numbers(_five(row, 0.0)) for row in passport["top_probs"]])
            chance.append((np.sqrt(np.nan_to_num(probabilities).clip(0, 1)) * 255).round().astype(np.uint8).ravel())
    arrays = {"piece": np.array(piece, np.uint32)}
    for name, parts, kind in (
        ("before", before, np.uint32),
        ("after", after, np.uint32),
        ("top", top, np.uint32),
        ("chance", chance, np.uint8),
    ):
        arrays[name] = np.concatenate(parts) if parts else np.zeros(0, kind)
    if len(vocabulary) < 65536:
        arrays["piece"], arrays["top"] = arrays["piece"].astype(np.uint16), arrays["top"].astype(np.uint16)
    return arrays, list(vocabulary)


def _five(values: list[Any], filler: Any) -> list[Any]:
    return [*values[:5], *[filler] * (5 - len(values))]


def samples_of(folder: RunFolder, texts: Texts, notes: list[str]) -> list[dict[str, Any]]:
    """What the model generated after the beginnings of documents, with the true continuation."""
    found = [entry for _, entry in files.json_lines(folder.samples) if isinstance(entry.get("step"), int)]
    found = [found[place] for place in documents.spread(len(found), documents.MOST_SAMPLES)]
    samples = []
    for entry in found:
        if entry["step"] >= len(texts.rows):
            continue
        passport = texts.passports.get(entry["step"])
        true = entry.get("continuation")
        if true is None and passport is not None:
            begin = len(entry.get("input_ids") or [])
            true = documents.text_of(passport, begin, begin + 40)
        samples.append(
            {name: entry.get(name) for name in ("step", "input", "output", "accuracy", "error")} | {"true": true}
        )
    if not samples:
        notes.append("No samples were generated in this run yet (--display_samples N asks for one every N steps).")
    return samples


def prompts_of(folder: RunFolder) -> list[dict[str, Any]]:
    """What the model generated after the fixed prompts, by step."""
    found = [
        {
            "step": entry["step"],
            "texts": [[str(text.get("prompt")), str(text.get("output"))] for text in entry["texts"]],
        }
        for _, entry in files.json_lines(folder.path / documents.PROMPTS)
        if isinstance(entry.get("step"), int) and isinstance(entry.get("texts"), list)
    ]
    return [found[place] for place in documents.spread(len(found), documents.MOST_WRITINGS)]


def unusual_documents(rows: Columns, texts: Texts) -> dict[str, Any]:
    """The hardest and the easiest documents for their time, by robust z-score among the surrounding steps.

    If the run noted unusual documents while it trained, these have their texts. Otherwise scores are computed here, by
    blocks of steps.
    """
    noted = {step: p["unusual"] for step, p in texts.passports.items() if isinstance(p.get("unusual"), int | float)}
    finite = np.flatnonzero(np.isfinite(rows.loss))
    if noted:
        scores = noted
    elif len(finite) >= BLOCK:
        losses = rows.loss[finite]
        blocks = losses[: len(losses) // BLOCK * BLOCK].reshape(-1, BLOCK)
        low, middle, high = np.percentile(blocks, (25, 50, 75), axis=1)
        block = np.minimum(np.arange(len(losses)) // BLOCK, len(blocks) - 1)
        z = (losses - middle[block]) / (np.maximum(high - low, 1e-3)[block] / 1.349)
        order = np.argsort(z)
        scores = {int(finite[place]): float(z[place]) for place in (*order[:_UNUSUAL], *order[-_UNUSUAL:])}
    else:
        order = finite[np.argsort(rows.loss[finite])]
        mean = mean_of(rows.loss) or 0.0
        ends = {
            int(i)
            for i in (*order[: min(_UNUSUAL, len(order) // 2)], *order[len(order) - min(_UNUSUAL, len(order) // 2) :])
        }
        scores = {step: float(rows.loss[step] - mean) for step in ends}
    ordered = sorted(scores, key=lambda step: scores[step])
    near = 25

    def described(step: int) -> dict[str, Any]:
        around = rows.loss[max(step - near, 0) : step + near + 1]
        usual = around[np.isfinite(around)]
        return {
            "step": step,
            "score": scores[step],
            "loss": float(rows.loss[step]),
            "usual": float(np.median(usual)) if len(usual) else None,
            "text": texts.opening(step),
        }

    return {
        "scored": bool(noted) or len(finite) >= BLOCK,
        "hardest": [described(step) for step in reversed(ordered) if scores[step] > 0][:_UNUSUAL],
        "easiest": [described(step) for step in ordered if scores[step] < 0][:_UNUSUAL],
    }


class Texts:
    """The texts of steps, from passports, or from the corpus if it is on this disk."""

    def __init__(self, record: dict[str, Any], rows: Columns, passports: list[dict[str, Any]]) -> None:
        self.record, self.rows = record, rows
        self.passports = {passport["step"]: passport for passport in passports}

    def opening(self, step: int) -> str | None:
        """The beginning of a step's document, if there is a passport."""
        passport = self.passports.get(step)
        return documents.text_of(passport)[: documents.OPENING_CHARACTERS] if passport else None

    def read(self, samples: list[dict[str, Any]], unusual: dict[str, Any]) -> None:
        """Add missing texts to `samples` and `unusual` from the files of the corpus, checked by their hash."""
        rows = self.rows
        listed = [entry for kind in ("hardest", "easiest") for entry in unusual[kind] if entry["text"] is None]
        lacking = [sample for sample in samples if sample["true"] is None]
        steps = {entry["step"] for entry in (*listed, *lacking)}
        places = {step: (rows.names["shard"][rows.shard[step]], int(rows.row[step])) for step in steps}
        if not places:
            return
        wanted = {place: rows.sha1[step].tobytes().hex() for step, place in places.items()}
        found = documents.read_again(self.record, wanted, documents.READING_SECONDS)
        for entry in listed:
            text = found.get(places[entry["step"]])
            entry["text"] = text[: documents.OPENING_CHARACTERS] if text is not None else None
        for sample in lacking:
            text = found.get(places[sample["step"]])
            begin = sample["input"] or ""
            # Only the first sample of a document begins like it, and only if the tokenizer keeps spaces.
            if text is not None and text.startswith(begin):
                sample["true"] = text[len(begin) : len(begin) + documents.OPENING_CHARACTERS]
