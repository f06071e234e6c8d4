"""A configuration file: flags written down in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimpajama_hf.errors import UsageError

#: A configuration is a page of flags; anything larger is a mistake (or an alias bomb).
LARGEST_CONFIG_BYTES = 100_000


def read_config(path: str) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UsageError when it is missing, too large, or not a mapping."""
    import yaml

    file = Path(path)
    if not file.is_file():
        found = "a folder" if path and file.is_dir() else "no such file"
        raise UsageError(f"--config {path}: {found}; expected a YAML file such as configs/laptop.yaml")
    if file.stat().st_size > LARGEST_CONFIG_BYTES:
        raise UsageError(
            f"--config {path}: {file.stat().st_size:,} bytes; a page of flags has at most {LARGEST_CONFIG_BYTES:,}"
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: not UTF-8, a date that does not exist, a number with too many digits.
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: not YAML ({reason}); expected lines such as `max_steps: 1000`") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config {path}: expected `name: value` lines, found {type(values).__name__}")
    return values
