"""A stored run: its record, its manifests, the rows of its ledger."""

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
    """The result of a command: whether all is well, the lines for the screen, and the data for programs."""

    ok: bool
    lines: list[str]
    data: dict[str, Any]
    """JSON values."""


class Run:
    """A stored run. Raises UserError if the folder is not that of a run."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(Path(path).expanduser())
        self.record = self.folder.read_record()
        self.manifests = {step: _manifest(self.folder.path, step) for step in checkpoints.steps(self.folder.path)}
        """Manifest of each checkpoint by its step, ascending; None if it cannot be read."""
        self.line = b""
        """The line of the ledger that `rows` read last."""
        self.unreadable: list[str] = []
        """What is wrong with lines that `rows` skipped; the caller empties this list."""

    def _repr_html_(self) -> str:
        """The run as a notebook shows it."""
        from slimpajama_hf.views import in_notebook

        return in_notebook.of_run(self.folder, self.record)

    def config(self) -> dict[str, Any]:
        """The keys of run_config.yaml; empty if it is not there. Raises UsageError if it is not a configuration."""
        return yaml_file.read_config(str(self.folder.config)) if self.folder.config.is_file() else {}

    def config_to_train(self) -> dict[str, Any]:
        """As `config`; for a run of somebody else only keys that decide its numbers. Raises UsageError if none."""
        config = yaml_file.read_config(str(self.folder.config))
        return config if ownership.is_own(self.folder) else what_decides(config)

    def rows(self) -> Iterator[Row]:
        """The rows of the ledger that can be read; `unreadable` says what is wrong with the others."""
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
        """The rows of the ledger. Raises UserError at the first line that is not the row of its step."""
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
