"""A JSON schema of configuration files, made from the flags. Editors complete and check with it."""

from __future__ import annotations

from typing import Any

from transformers.hf_argparser import string_to_bool

from slimpajama_hf.settings.arguments import OURS, TRAINING_DEFAULTS
from slimpajama_hf.settings.old_program import RENAMED
from slimpajama_hf.settings.training_arguments import PASSED_ON, SlimPajamaTrainingArguments, make_parser

#: Type of a flag -> JSON types of its values. Flags of other types are strings.
_KINDS: dict[Any, list[str]] = {int: ["integer"], float: ["number"], string_to_bool: ["boolean"]}


def schema() -> dict[str, Any]:
    """Return the schema. It leaves out flags that would have no effect here, so that an editor marks them. null keeps a
    default."""
    parser = make_parser([*OURS, SlimPajamaTrainingArguments])
    ours = {name for group in OURS for name in group.__dataclass_fields__}
    known = ours | PASSED_ON | TRAINING_DEFAULTS.keys()
    properties = {
        action.dest: _of_flag(action)
        for action in parser._actions
        if action.dest in known and not action.dest.endswith("_token")
    }
    for old, name in RENAMED.items():
        properties[old] = properties[name] | {"description": f"old name of {name}", "deprecated": True}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A run of slimpajama_hf",
        "description": "The flags of run_clm_slimpajama.py, written down; read by --config.",
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "additionalProperties": False,
    }


def _of_flag(action: Any) -> dict[str, Any]:
    kinds = _KINDS.get(action.type, ["string"])
    if action.dest.endswith(("_kwargs", "_config")):
        kinds = ["string", "object"]
    text = TRAINING_DEFAULTS.get(action.dest, (None, None))[1] or " ".join((action.help or "").split()).replace(
        "%%", "%"
    )
    found: dict[str, Any] = {"type": [*kinds, "null"], "description": text}
    if action.choices is not None:
        found = {"enum": [*action.choices, None], "description": text}
    elif action.nargs in ("+", "*"):
        found["type"] = ["array", *found["type"]]
        found["items"] = {"type": kinds}
    default = getattr(action.default, "value", action.default)
    if isinstance(default, bool | int | float | str):
        found["default"] = default
    return found
