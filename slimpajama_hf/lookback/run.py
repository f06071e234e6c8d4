"""A run folder as it lies there: its record, its manifests, the rows of its ledger."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints, ledger, ownership
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.settings import yaml_file
from slimpajama_hf.settings.what_matters import what_decides

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a command found: whether all holds, the lines that say it, and the same for a program."""

    ok: bool
    lines: list[str]
    data: dict[str, Any]
    """JSON values."""


# ---- the run ----


class Run:
    """A run folder as it lies there. Raises UserError when it is not the folder of a run."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(Path(path).expanduser())
        self.record = self.folder.read_record()
        self.manifests = {step: _manifest(self.folder.path, step) for step in checkpoints.steps(self.folder.path)}
        """Manifest of each checkpoint by its step, ascending; None where it cannot be read."""
        self.line = b""
        """The line of the ledger that `rows` has read last."""
        self.unreadable: list[str] = []
        """What is wrong with the lines that `rows` passed over, since somebody last emptied this."""

    def _repr_html_(self) -> str:
        """The run as a notebook shows it."""
        from slimpajama_hf.views import in_notebook

        return in_notebook.of_run(self.folder, self.record)

    def config(self) -> dict[str, Any]:
        """The keys of run_config.yaml; nothing if it is not there. Raises UsageError when it is no configuration."""
        return yaml_file.read_config(str(self.folder.config)) if self.folder.config.is_file() else {}

    def config_to_train(self) -> dict[str, Any]:
        """As `config`, of somebody else's run what decides its numbers alone. Raises UsageError where there is none."""
        config = yaml_file.read_config(str(self.folder.config))
        return config if ownership.is_own(self.folder) else what_decides(config)

    def rows(self) -> Iterator[Row]:
        """The rows of the ledger that can be read; of the others, `unreadable` says what is wrong."""
        if not self.folder.ledger.is_file():
            return
        with open(self.folder.ledger, "rb") as file:
            for self.line in file:
                try:
                    row = ledger.decode(self.line)
                except ValueError as error:
                    self.unreadable.append(str(error))
                else:
                    yield row

    def whole_rows(self) -> Iterator[Row]:
        """The rows of the ledger, each with the step that its line stands for. Raises UserError at the first other."""
        try:
            yield from ledger.rows(self.folder.ledger)
        except ledger.Damaged as error:
            raise UserError(f"{error}; see python -m slimpajama_hf verify {self.folder.path}") from None


def _manifest(run: Path, step: int) -> dict[str, Any] | None:
    try:
        return checkpoints.read_manifest(checkpoints.path_of(run, step))
    except ValueError:
        return None


def checkpoint_problem(run: Run, step: int) -> str | None:
    try:
        return checkpoints.problem(checkpoints.path_of(run.folder.path, step))
    except (KeyError, TypeError, AttributeError):
        return "its manifest is not one of ours"


def shown_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
