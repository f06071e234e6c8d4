"""What a run shows, made from its record: `metrics_history.json`, `text_samples.json`, charts.

`python -m slimpajama_hf views RUN` makes all of it again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf import files, screen
from slimpajama_hf.record import columns
from slimpajama_hf.record.run_folder import OF_A_SCRIPT, RunFolder

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns


#: Keys of `metrics_history.json` with their columns of the ledger. The first five are a promise.
METRICS = {
    "steps": "step",
    "loss": "loss",
    "accuracy": "accuracy",
    "throughput": "throughput",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens": "tokens",
}


def _strict(values: np.ndarray) -> list[Any]:
    """A column as JSON values; None where a value is not finite."""
    items = values.tolist()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return [value if math.isfinite(value) else None for value in items]
    return items


def write_metrics_history(folder: RunFolder, columns: Columns) -> Path:
    """`{"steps": [...], "loss": [...], ...}`: accuracy as a fraction, throughput in tokens/s, NaN as null. Keys of
    `METRICS` come first, then all numbers that were added to steps."""
    path = folder.viz / "metrics_history.json"
    shown = {key: getattr(columns, column) for key, column in METRICS.items()} | columns.added
    files.write_json(path, {key: _strict(values) for key, values in shown.items()})
    return path


def read_samples(path: Path, fields: Sequence[str] = ("input", "output", "accuracy")) -> list[dict[str, Any]]:
    """The generated samples, oldest first. Lines without a `step` or one of `fields` are left out and counted on the
    screen; a torn last line is left out."""
    left_out: list[str] = []
    entries = [entry for _, entry in files.json_lines(path, left_out)]
    samples = [each for each in entries if type(each.get("step")) is int and all(name in each for name in fields)]
    count = len(left_out) + len(entries) - len(samples)
    if count:
        screen.say(f"{path}: {count:,} lines are no entries of it and are left out")
    return samples


def write_text_samples(folder: RunFolder, samples: list[dict[str, Any]]) -> Path:
    """`[{"step", "input", "output", "accuracy", ...}]`."""
    path = folder.viz / "text_samples.json"
    files.write_json(path, samples, indent=1)
    return path


#: Up to so many steps the JSON files are written at every redraw.
ALWAYS_WRITTEN_STEPS = 20_000
#: The same limit if no chart is drawn, because the files cost more than the rest then.
ALWAYS_WRITTEN_ALONE_STEPS = 2_000
#: In longer runs they are written after each growth by this share, and at the end. Writing them at every redraw would
#: cost more with every step; this costs the same per step however long the run is.
WRITTEN_AFTER_GROWTH = 0.05


class Views:
    """Redraws the views of one run; reads only what was added to its ledger."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._reader = columns.Reader(folder.ledger)
        self._written_at = 0

    def _due(self, steps: int, with_chart: bool) -> bool:
        always = ALWAYS_WRITTEN_STEPS if with_chart else ALWAYS_WRITTEN_ALONE_STEPS
        return steps <= always or steps >= (1 + WRITTEN_AFTER_GROWTH) * self._written_at

    def redraw(
        self,
        steps: int | None,
        title: str,
        subtitle: str,
        max_steps: int,
        final: bool = True,
        with_chart: bool = True,
    ) -> Path | None:
        """Write metrics, samples and chart as of `steps` steps (None: all); returns the chart's path.

        While a long run is in progress (not `final`), the two JSON files are written after every 5 % of growth.
        """
        columns = self._reader.update()
        if steps is not None:
            columns = columns.first(steps)
        samples = [sample for sample in read_samples(self.folder.samples) if sample["step"] < max(len(columns), 1)]
        self.folder.viz.mkdir(parents=True, exist_ok=True)
        if final or self._due(len(columns), with_chart):
            write_metrics_history(self.folder, columns)
            write_text_samples(self.folder, samples)
            self._written_at = len(columns)
        if not with_chart:
            return None
        from slimpajama_hf.views import charts

        return charts.write(self.folder.viz, columns, samples, charts.Caption(title, subtitle, max_steps))


def caption_of(record: dict[str, Any]) -> tuple[str, str]:
    """(title, subtitle) of a run's chart, from its `run.json`."""
    model, corpus = record["model"], record["corpus"]
    # The last two parts of a path are enough.
    corpus_name = "/".join(Path(corpus["name"]).parts[-2:]) if corpus["mirror"] == "local" else corpus["name"]
    title = f"{model['name']} on {corpus_name}"
    subtitle = f"{model['parameters'] / 1e6:.1f}M parameters · {corpus['mirror']} · tokenizer {record['tokenizer']}"
    # Older runs do not say it; theirs is at least the number of processes.
    documents = record.get("documents_a_step", record.get("processes", 1))
    how = "one document a step" if documents == 1 else f"{documents} documents a step"
    if record.get("made_by") == OF_A_SCRIPT:
        how = "a script of its own (RunRecord)"
    return title, f"{subtitle} · {how}"


def main(run: str) -> int:
    folder = RunFolder(Path(run))
    record = folder.read_record()
    chart = Views(folder).redraw(None, *caption_of(record), max_steps=record["max_steps"])
    sys.stderr.write(f"{chart}\n")
    return 0
