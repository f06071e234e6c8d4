"""The README.md of a pushed run: metadata, curve, numbers, samples, how to load the model and how to repeat the run.

Text from a corpus or a model is escaped character by character (`escaped`), so it cannot make a link, heading, HTML
tag, mention or table cell.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf.record.columns import LAST_STEPS, mean_of_last
from slimpajama_hf.terminal import visible

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns


#: How many of the newest samples are shown, and how many characters of each.
SAMPLES, SAMPLE_LETTERS = 3, 600

_TASK = "text-generation"

#: File extensions, and the loader of `datasets` for each.
_LOADERS = {"json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text", "csv": "csv"}


@dataclasses.dataclass(frozen=True)
class About:
    """The contents of a card at one step; paths of this machine have been removed."""

    repo: str
    record: dict[str, Any]
    """The content of `run.json`."""
    columns: Columns
    """The ledger up to the step."""
    chain: str
    """The ledger's last hash."""
    samples: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    """The last line of `evaluations.jsonl`."""
    config: dict[str, Any]
    """The content of `run_config.yaml`."""
    license: str | None = None
    averaged: bool = False
    """Whether the weights are the run's average, because it scored better than the last weights."""
    has_chart: bool = True
    resumable: bool = True


def escaped(text: str) -> str:
    """`text` as plain words in Markdown and HTML: ASCII punctuation as entities, control characters made visible."""
    shown = visible(text, line_ends=False)
    return re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match.group())};", shown)


def render(about: About) -> str:
    """The whole README.md, metadata first. The same run at the same step gives the same text."""
    from huggingface_hub import ModelCard

    card = ModelCard(f"---\n{_metadata(about).to_yaml()}\n---\n\n{_body(about)}")
    return str(card)


def _metadata(about: About) -> Any:
    """`ModelCardData`, with known facts only."""
    from huggingface_hub import ModelCardData

    record = about.record
    corpus = hub_corpus(record)
    more: dict[str, Any] = {"license": about.license} if about.license else {}
    if corpus is not None:
        more["datasets"] = [corpus[0]]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=[_architecture(record), "pretraining", "slimpajama-hf"],
        model_name=about.repo.rpartition("/")[2],
        eval_results=results(about) or None,
        **more,
    )


def _architecture(record: dict[str, Any]) -> str:
    """The `model_type` of the model's configuration. Older runs do not say it; nearly all of them trained a GPT-2."""
    return str(record["model"].get("architecture", "gpt2"))


def hub_corpus(record: dict[str, Any]) -> tuple[str, str] | None:
    """(dataset id, revision) of a corpus on the Hub; None for the embedded one and for local files."""
    corpus = record["corpus"]
    if corpus["repo"]:
        return corpus["repo"], corpus["revision"]
    for _, url, *_ in corpus["files"][:1]:
        match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/.+", url)
        if match:
            return match.group(1), match.group(2)
    return None


def results(about: About) -> list[Any]:
    """`EvalResult`s: prequential scores, which every run has, and held-out ones if `--eval_steps` measured them."""
    from huggingface_hub import EvalResult

    corpus = hub_corpus(about.record)
    name, revision = corpus or (about.record["corpus"]["name"], None)
    found = []

    def add(split: str, metric: str, shown: str, value: float, dataset: str, at: str | None) -> None:
        # Only a dataset on the Hub has a revision.
        kind = dataset if at else _loader_of(about.record)
        if math.isfinite(value):
            found.append(
                EvalResult(
                    task_type=_TASK, task_name="Text generation", dataset_type=kind,
                    dataset_name=f"{dataset}, {split}", dataset_split=split, dataset_revision=at,
                    metric_type=metric, metric_name=shown, metric_value=round(value, 6),
                )
            )  # fmt: skip

    columns = about.columns
    add("train", "bits_per_byte", "Bits per byte (prequential)", columns.prequential_bits_per_byte(), name, revision)
    loss = mean_of_last(columns.loss)
    add("train", "loss", f"Loss (prequential, last {LAST_STEPS} documents), nats per token", loss, name, revision)
    accuracy = mean_of_last(columns.accuracy)
    add("train", "accuracy", f"Next-token accuracy (prequential, last {LAST_STEPS})", accuracy, name, revision)
    if about.evaluation is not None:
        where, scores = about.evaluation["corpus"], about.evaluation["scores"]["all"]
        place, _, at = where.partition("@")
        for metric, shown in (
            ("loss", "Loss (held out), nats per token"),
            ("perplexity", "Perplexity (held out)"),
            ("accuracy", "Next-token accuracy (held out)"),
            ("bits_per_byte", "Bits per byte (held out)"),
        ):
            dataset = place if "/" in place else name
            add("validation", metric, shown, scores[metric], dataset, at or None)
    return found


def _loader_of(record: dict[str, Any]) -> str:
    """The loader of `datasets` for a corpus of files; a card names it if there is no dataset on the Hub."""
    for name, *_ in record["corpus"]["files"][:1]:
        for part in reversed(name.lower().split(".")[1:]):
            if part in _LOADERS:
                return _LOADERS[part]
    return "text"


# ---- the text ------------------------------------------------------------------------------------------------------


def _body(about: About) -> str:
    parts = [_opening(about), _numbers(about), _domains(about), _held_out(about), _samples(about), _loading(about)]
    return "\n\n".join(part for part in [*parts, _repeating(about)] if part) + "\n"


def _opening(about: About) -> str:
    record, columns = about.record, about.columns
    model, corpus = record["model"], hub_corpus(record)
    where = (
        f"[{escaped(corpus[0])}](https://huggingface.co/datasets/{corpus[0]}) at revision `{_code(corpus[1])}`"
        if corpus is not None
        else {"embedded": "the sources and documentation of a Python installation"}.get(
            record["corpus"]["mirror"], f"local files ({escaped(record['corpus']['name'])})"
        )
    )
    architecture = _architecture(record)
    kind = "GPT-2" if architecture == "gpt2" else f"model of the architecture `{_code(architecture)}`"
    of_several = " of each process" if len(columns) and columns.samples[0] > 1 else ""
    lines = [
        f"# {escaped(about.repo.rpartition('/')[2])}",
        f"A {kind} of {model['parameters'] / 1e6:,.1f}M parameters, trained from nothing on {where}, **one document "
        f"per optimizer step{of_several}**: {len(columns):,} of {record['max_steps']:,} steps, each with its row in "
        "[`ledger.jsonl`](ledger.jsonl).",
    ]
    if about.has_chart:
        lines.append("![Loss, accuracy, throughput and learning rate by step](training_viz/training_latest.png)")
    return "\n\n".join(lines)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _counted(record: dict[str, Any]) -> str:
    """What was read of documents before they were scored, in words."""
    counted = record.get("initial_embeddings")
    return f"; neighbours in the first {counted['documents']:,} were counted before" if counted else ""


def _numbers(about: About) -> str:
    columns, model = about.columns, about.record["model"]
    documents = int(columns.samples.sum())
    rows = [
        ["steps, one document each", f"{len(columns):,}"]
        if documents == len(columns)
        else ["steps, documents", f"{len(columns):,}, {documents:,}"],
        ["tokens read", f"{int(columns.tokens.sum()):,}"],
        [f"loss, nats per token (mean of the last {LAST_STEPS} documents)", _number(mean_of_last(columns.loss), ".4f")],
        [f"next-token accuracy (the same {LAST_STEPS})", _number(mean_of_last(columns.accuracy), ".1%")],
        [f"bits per byte, prequential (all documents{_counted(about.record)})",
         _number(columns.prequential_bits_per_byte(), ".4f")],
        ["tokens of a document", f"the first {model['max_seq_length']:,}" if model["sample_mode"] == "truncate"
         else f"{escaped(model['sample_mode'])}, {model['max_seq_length']:,}"],
        ["vocabulary", f"{about.record.get('tokenizer_size', model['vocab_size']):,} "
         f"({escaped(str(about.record['tokenizer']))})"],
    ]  # fmt: skip
    for name, shown in (("learning_rate", "learning rate"), ("warmup_steps", "warm-up steps"), ("seed", "seed")):
        if name in about.config:
            rows.append([shown, f"{about.config[name]:g}"])
    rows.append(["precision", escaped(str(model["precision"]))])
    note = (
        "*Prequential*: a document is scored before it is learned, and none is read twice, so these are scores on text "
        "that the model had not seen."
        if not about.config.get("epochs") or about.config["epochs"] == 1
        else "*Prequential*: a document is scored before it is learned; this run read its corpus more than once."
    )
    return f"## Numbers\n\n{_table(['', ''], rows)}\n\n{note}"


def _domains(about: About) -> str:
    columns = about.columns
    rows = []
    for index in np.argsort(np.bincount(columns.domain, minlength=len(columns.domains)))[::-1].tolist():
        of = columns.domain == index
        bits, size = columns.code_bits[of], columns.text_bytes[of]
        counted = np.isfinite(bits)
        per_byte = float(bits[counted].sum() / max(int(size[counted].sum()), 1)) if counted.any() else math.nan
        rows.append([
            escaped(columns.domains[index]), f"{int(of.sum()):,}", f"{int(columns.tokens[of].sum()):,}",
            _number(mean_of_last(columns.loss[of]), ".4f"), _number(mean_of_last(columns.accuracy[of]), ".1%"),
            _number(per_byte, ".4f"),
        ])  # fmt: skip
    head = [
        "domain",
        "documents",
        "tokens",
        f"loss, last {LAST_STEPS}",
        f"accuracy, last {LAST_STEPS}",
        "bits per byte",
    ]
    return f"## By domain\n\n{_table(head, rows)}" if rows else ""


def _held_out(about: About) -> str:
    if about.evaluation is None:
        return ""
    rows = [
        [escaped(domain), f"{scores['samples']:,}", _number(scores["loss"], ".4f"),
         _number(scores["perplexity"], ",.1f"), _number(scores["accuracy"], ".1%"),
         _number(scores["bits_per_byte"], ".4f")]
        for domain, scores in about.evaluation["scores"].items()
    ]  # fmt: skip
    head = ["domain", "documents", "loss", "perplexity", "accuracy", "bits per byte"]
    averaged = (
        " The weights here are an average over the run's last steps: it scored better than the last weights, and these "
        "are its scores."
        if about.averaged
        else ""
    )
    return (
        f"## Held out\n\nAfter step {about.evaluation['step']:,}, on {escaped(about.evaluation['corpus'])}, documents "
        f"that are never trained.{averaged}\n\n{_table(head, rows)}"
    )


def _samples(about: About) -> str:
    good = [sample for sample in about.samples if sample.get("output") is not None][-SAMPLES:]
    if not good:
        return ""
    parts = ["## What it writes", "Greedily, after the opening of a document that it had not read yet."]
    for sample in good:
        opening, written = (_cut(sample[name]) for name in ("input", "output"))
        parts.append(
            f"Step {sample['step']:,}, {escaped(sample['domain'])}:\n\n> {escaped(opening)} **{escaped(written)}**"
        )
    return "\n\n".join(parts)


def _cut(text: str) -> str:
    text = text.strip(" ")
    return (text if len(text) <= SAMPLE_LETTERS else text[: SAMPLE_LETTERS - 1] + "…") or "␣"


def _loading(about: About) -> str:
    return f"""## Loading it

```python
from transformers import pipeline

print(pipeline("text-generation", model="{about.repo}")("The most important thing about"))
```

`AutoModelForCausalLM` and `AutoTokenizer` load it too; no code from this repository is run."""


def _repeating(about: About) -> str:
    record, corpus = about.record, hub_corpus(about.record)
    typed = " ".join(_word(word) for word in repeatable(record["command"]))
    rows = [
        ["run", f"`{_code(record['run_id'])}`"],
        ["ledger, hash of its last row", f"`{_code(about.chain)}`"],
        ["corpus", f"`{_code(record['corpus']['mirror'])}`"],
        *([["its revision", f"`{_code(corpus[1])}`"]] if corpus is not None else []),
        ["slimpajama_hf", f"`{_code(record['version'])}`"],
        *[[escaped(name), f"`{_code(version)}`"] for name, version in record["libraries"].items()],
        ["Python", f"`{_code(record['python'])}`"],
    ]
    head = "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)
    parts = [
        "## Doing it again",
        f"```bash\naccelerate launch {typed}\n```",
        "[`run_config.yaml`](run_config.yaml) is the same with every default written out (`--config` takes it). A run "
        "that repeats this one ends with the same hash, as far as the arithmetic of the machines is the same; "
        "`python -m slimpajama_hf verify FOLDER` checks the ledger of a clone of this repository row by row.",
        head,
    ]
    if about.resumable:
        parts.append(
            "The run can be continued on any machine, at the next document:\n\n```bash\naccelerate launch "
            f"run_clm_slimpajama.py --resume_from_checkpoint {about.repo}\n```"
        )
    return "\n\n".join(parts)


#: Flags about where a start wrote and pushed, which do not change the run; True if the flag takes a value.
_OF_ONE_START = {
    "output_dir": True, "overwrite_output_dir": False, "resume_from_checkpoint": True, "push_to_hub": False,
    "hub_model_id": True, "hub_private_repo": False, "hub_strategy": True, "hub_revision": True, "hub_token": True,
    "hub_license": True, "hub_patience": True, "gpu": True,
}  # fmt: skip


def repeatable(command: list[str]) -> list[str]:
    """The words of a command that determine the run."""
    kept: list[str] = []
    words = list(command) or ["run_clm_slimpajama.py"]
    while words:
        word = words.pop(0)
        name, equals, _ = word.removeprefix("--").replace("-", "_").partition("=")
        if not word.startswith("--") or name not in _OF_ONE_START:
            kept.append(word)
        elif (
            not equals
            and words
            and not words[0].startswith("--")
            and (_OF_ONE_START[name] or words[0].lower() in ("true", "false", "1", "0"))
        ):
            words.pop(0)
    return kept


def _word(word: str) -> str:
    """A word of the command for a fenced block: quoted for a shell, on one line, unable to end the block."""
    return shlex.quote(visible(word, line_ends=False).replace("```", "'''"))


def _code(text: str) -> str:
    """`text` for use inside backticks, also in a table."""
    return visible(str(text), line_ends=False).replace("`", "'").replace("|", "¦")
