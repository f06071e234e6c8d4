"""A run folder as it lies there: its record, its manifests, the rows of its ledger."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints, ledger
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.settings import yaml_file

Row = dict[str, Any]

#: Fields that every row has; later versions may add fields that have a default.
_REQUIRED = frozenset(
    field.name
    for field in dataclasses.fields(ledger.Row)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
) | {"chain"}


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
        self.unreadable: list[str] = []
        """What is wrong with the lines that `rows` passed over, since somebody last emptied this."""

    def config(self) -> dict[str, Any]:
        """The keys of run_config.yaml; nothing if it is not there. Raises UsageError when it is no configuration."""
        return yaml_file.read_config(str(self.folder.config)) if self.folder.config.is_file() else {}

    def rows(self) -> Iterator[Row]:
        """The rows of the ledger that can be read; of the others, `unreadable` says what is wrong."""
        if not self.folder.ledger.is_file():
            return
        with open(self.folder.ledger, "rb") as file:
            for line in file:
                try:
                    row = read_row(line)
                except ValueError as error:
                    self.unreadable.append(str(error))
                else:
                    yield row

    def whole_rows(self) -> Iterator[Row]:
        """The rows of the ledger, each with the step that its line stands for. Raises UserError at the first other."""
        for number, row in enumerate(self.rows()):
            if self.unreadable or row["step"] != number:
                wrong = self.unreadable[0] if self.unreadable else f"its line holds step {row['step']}"
                raise UserError(
                    f"{self.folder.ledger}: step {number}: {wrong}; "
                    f"see python -m slimpajama_hf verify {self.folder.path}"
                )
            yield row


def _manifest(run: Path, step: int) -> dict[str, Any] | None:
    try:
        manifest = json.loads((checkpoints.path_of(run, step) / checkpoints.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def refuse_constant(name: str) -> None:
    raise ValueError(f"not strict JSON ({name})")


def read_row(line: bytes) -> Row:
    """A line of a ledger as a row. Raises ValueError saying what is wrong with it in a few words."""
    if not line.endswith(b"\n"):
        raise ValueError("a torn line (it has no end)")
    try:
        row = json.loads(line, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if missing := _REQUIRED - row.keys():
        raise ValueError(f"fields are missing ({', '.join(sorted(missing))})")
    if type(row["step"]) is not int:
        raise ValueError(f"its step is no number ({row['step']!r})")
    return row


def checkpoint_problem(run: Run, step: int) -> str | None:
    try:
        return checkpoints.problem(checkpoints.path_of(run.folder.path, step))
    except (KeyError, TypeError, AttributeError):
        return "its manifest is not one of ours"


def shown_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
