"""`transformers.TrainingArguments` with the defaults of one document per step, and the parser of all arguments."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from slimpajama_hf.arguments import TRAINING_DEFAULTS
from slimpajama_hf.errors import UsageError


def _with_our_defaults() -> type:
    """Re-declare the fields of `TRAINING_DEFAULTS`; types and help stay those of transformers."""
    base = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    namespace: dict[str, Any] = {"__annotations__": {}}
    for name, (default, _) in TRAINING_DEFAULTS.items():
        namespace["__annotations__"][name] = base[name].type
        namespace[name] = dataclasses.field(default=default, metadata=base[name].metadata)
    return dataclasses.dataclass(type("_Defaults", (TrainingArguments,), namespace))


class SlimPajamaTrainingArguments(_with_our_defaults()):  # type: ignore[misc]
    """Training arguments of this project. Batch size 1: a step is a document of each process."""

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: expected the number of documents to learn, 1 or more")
        if self.per_device_train_batch_size != 1:
            raise ValueError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size}: a step is one document here; "
                "leave it at 1"
            )
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: expected how many documents each "
                "process puts into a step, 1 or more"
            )
        if self.auto_find_batch_size:
            raise ValueError("--auto_find_batch_size: there is nothing below a batch of 1; leave it out")
        if self.lr_scheduler_type != "constant_with_warmup":
            raise ValueError(
                f"--lr_scheduler_type {self.lr_scheduler_type}: the schedule is linear warm-up, then constant; "
                "leave it out and choose --learning_rate and --warmup_steps"
            )
        if self.warmup_steps < 0 or self.learning_rate <= 0:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps}, --learning_rate {self.learning_rate}: "
                "expected 0 or more steps, and a rate above 0"
            )
        if self.save_steps <= 0:
            raise ValueError(f"--save_steps {self.save_steps}: expected a number of steps above 0, or --no-checkpoint")
        if self.eval_steps is not None and self.eval_strategy == "no":  # type: ignore[has-type]
            self.eval_strategy = "steps"
        report_to: Any = self.report_to  # type: ignore[has-type]
        if report_to not in (None, "none", ["none"], []):
            from slimpajama_hf import trackers

            if isinstance(report_to, str):
                report_to = [name.strip() for name in report_to.split(",")]
            # Before anything is opened: one that is unknown or not installed is said now.
            self.report_to = trackers.asked(report_to)
        # None stays None until the corpus and the model are known (cli.complete); transformers wants a name meanwhile.
        output_dir = self.output_dir  # type: ignore[has-type]
        super().__post_init__()
        if output_dir is None:
            self.output_dir = None


def changed_fields(arguments: TrainingArguments) -> dict[str, Any]:
    """Fields of transformers' that differ from our defaults, plus those shown in `--help`; secrets never."""
    defaults = {field.name: field for field in dataclasses.fields(SlimPajamaTrainingArguments)}
    plain = arguments.to_dict()
    changed = {}
    for name, field in defaults.items():
        if not field.init or name.endswith("_token") or name not in plain:
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = plain[name]
        if name == "report_to" and isinstance(value, list):
            # As it is typed.
            value = ",".join(value) or "none"
        if name in _DERIVED or value is None or (not value and default in (None, False, 0, "", "none", [], {})):
            continue
        # to_dict() turns enumerations into their values.
        if TRAINING_DEFAULTS.get(name, (None, None))[1] is not None or value != getattr(default, "value", default):
            changed[name] = value
    return changed


#: Filled in by transformers from the machine or from other fields: not part of what was asked for.
_DERIVED = frozenset(
    {
        "local_rank", "logging_dir", "run_name", "bf16", "accelerator_config", "eval_strategy",
        "parallelism_config",
        "lr_scheduler_kwargs", "fsdp_config", "hub_token", "ddp_backend", "per_device_train_batch_size",
        "trackio_space_id", "fsdp", "project", "do_eval",
    }
)  # fmt: skip


class _Parser(HfArgumentParser):
    """argparse that says one sentence instead of a page of usage."""

    def __init__(self, dataclass_types: list[Any]) -> None:
        super().__init__(dataclass_types, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        # argparse: "argument --max_steps/--max-steps: invalid int value: 'ten'"
        text = message.removeprefix("argument ")
        flags, colon, rest = text.partition(": ")
        if colon and flags.startswith("--"):
            text = f"{flags.partition('/')[0].partition(',')[0]}: {rest}"
            if rest.startswith("invalid "):
                kind, _, value = rest.removeprefix("invalid ").partition(" value: ")
                names = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
                if value:
                    text = f"{flags.partition('/')[0]}: found {value}, expected {names.get(kind, kind)}"
        raise UsageError(text)


def make_parser(dataclass_types: list[Any]) -> _Parser:
    return _Parser(dataclass_types)
