"""`transformers.TrainingArguments` with the defaults of one document per step, and the parser of all arguments."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from typing import Any, NoReturn

from accelerate.utils import DynamoBackend
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings import ranges
from slimpajama_hf.settings.arguments import TRAINING_DEFAULTS


def _with_our_defaults() -> type:
    """Re-declare the fields of `TRAINING_DEFAULTS`; types and help stay those of transformers."""
    base = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    namespace: dict[str, Any] = {"__annotations__": {}}
    for name, (default, _) in TRAINING_DEFAULTS.items():
        namespace["__annotations__"][name] = base[name].type
        namespace[name] = dataclasses.field(default=default, metadata=base[name].metadata)
    return dataclasses.dataclass(type("_Defaults", (TrainingArguments,), namespace))


#: Fields that do here what the documentation of transformers says. If a field is not here, not in `TRAINING_DEFAULTS`
#: and not in `REFUSED`, it is new: tests/settings/test_training_arguments.py fails until somebody decides about it.
PASSED_ON = frozenset(
    {
        "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
        "max_grad_norm", "gradient_accumulation_steps", "neftune_noise_alpha",
        # The same as `--precision` (precision.py).
        "bf16", "fp16",
        "tf32", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
        "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
        "use_liger_kernel", "liger_kernel_config", "full_determinism", "use_cpu",
        "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        "eval_strategy", "eval_delay", "eval_on_start", "save_only_model", "hub_token", "hub_revision",
        "auto_find_batch_size", "do_train",
        # For several processes.
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
        "ddp_timeout", "local_rank",
    }
)  # fmt: skip

_READ = "documents are read by this program's own reader, one step ahead"
_ROWS = "every step is a row of the ledger, and --report_to TRACKER sends each of them on"
_SCORED = "held-out documents are scored one at a time, in float32, and every score is written down"
_SAVED = "a checkpoint is saved every --save_steps N, at the end, on Ctrl-C and on SIGTERM"
_SHARDS = "use accelerate launch --config_file configs/accelerate/fsdp2.yaml"

#: Field that would have no effect here, or a wrong one -> what to use instead. It is refused unless it has its default
#: (ours, if `TRAINING_DEFAULTS` has one).
REFUSED: dict[str, str] = {
    "num_train_epochs": "a run learns --max_steps N documents; for several passes over the corpus add --epochs N",
    "lr_scheduler_kwargs": "the schedule is linear warm-up, then constant; choose --learning_rate and --warmup_steps",
    "average_tokens_across_devices": "the loss is always the mean over all tokens of a step",
    "label_smoothing_factor": "the loss is the plain code length of the next token, which every figure here counts on",
    "bf16_full_eval": _SCORED,
    "fp16_full_eval": _SCORED,
    "use_cache": "training never fills a cache, and writing samples always does",
    "torch_empty_cache_steps": "a step allocates the same memory every time, so there is nothing to give back",
    "logging_strategy": _ROWS,
    "logging_steps": _ROWS,
    "logging_first_step": _ROWS,
    "logging_nan_inf_filter": "a loss that is no number stands in the ledger as what it is, and its update is skipped",
    "log_on_each_node": "one process speaks for all",
    "log_level": "set TRANSFORMERS_VERBOSITY in the environment to see what transformers says",
    "log_level_replica": "one process speaks for all",
    "include_num_input_tokens_seen": "the ledger has the tokens of every step",
    "disable_tqdm": "the progress bar is this program's own; into a pipe or a file it writes lines",
    "per_device_eval_batch_size": _SCORED,
    "prediction_loss_only": _SCORED,
    "eval_do_concat_batches": _SCORED,
    "eval_use_gather_object": _SCORED,
    "eval_accumulation_steps": _SCORED,
    "include_for_metrics": _SCORED,
    "batch_eval_metrics": _SCORED,
    "save_on_each_node": "the first process writes each checkpoint; let all machines see one --output_dir",
    "enable_jit_checkpoint": _SAVED,
    "load_best_model_at_end": "every checkpoint is kept with its scores in evaluations.jsonl; load the one you want",
    "metric_for_best_model": "every checkpoint is kept with its scores in evaluations.jsonl; load the one you want",
    "greater_is_better": "every checkpoint is kept with its scores in evaluations.jsonl; load the one you want",
    "hub_always_push": "a push that finds another under way waits; a newer one that comes meanwhile takes its place",
    "ignore_data_skip": "a run goes on at the next document by itself",
    "restore_callback_states_from_checkpoint": "callbacks keep their state in files of the run and go on by themselves",
    "data_seed": "the order of --shuffle_buffer is drawn from --seed",
    "accelerator_config": _READ,
    "parallelism_config": "a model is copied (DDP) or sharded (FSDP2) by configs/accelerate/, in no other way",
    "dataloader_drop_last": _READ,
    "dataloader_num_workers": _READ,
    "dataloader_pin_memory": _READ,
    "dataloader_persistent_workers": _READ,
    "dataloader_prefetch_factor": _READ,
    "dataloader_multiprocessing_context": _READ,
    "dataloader_in_order": _READ,
    "remove_unused_columns": _READ,
    "label_names": "the labels are the document's own next tokens",
    "train_sampling_strategy": "documents come in the corpus' order, or shuffled by --shuffle_buffer N",
    "length_column_name": "documents come in the corpus' order, or shuffled by --shuffle_buffer N",
    "fsdp": _SHARDS,
    "fsdp_config": _SHARDS,
    "deepspeed": f"DeepSpeed is not supported; to share out a model {_SHARDS}",
    "debug": "a step whose loss or gradient is not a number is always named, with its document",
    "skip_memory_metrics": "the peak memory of a run is always in its run.json",
    "do_eval": "held-out scores come with --eval_steps N",
    "do_predict": "use python -m slimpajama_hf evaluate RUN",
}


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class SlimPajamaTrainingArguments(_with_our_defaults()):  # type: ignore[misc]
    """Our training arguments. The batch size is 1: a step is one document of each process."""

    def __post_init__(self) -> None:
        self._refuse()
        self.precision_flags = {name: bool(getattr(self, name)) for name in ("bf16", "fp16")}
        """What `--bf16` and `--fp16` were set to. The precision is decided when the device is known (precision.py).
        Until then both are off, because transformers would decide now."""
        self.bf16 = self.fp16 = False
        if self.eval_steps is not None:
            self.eval_strategy = "steps"
        report_to: Any = self.report_to  # type: ignore[has-type]
        if report_to not in (None, "none", ["none"], []):
            if isinstance(report_to, str):
                report_to = [name.strip() for name in report_to.split(",")]
            # Unknown or missing trackers are refused now, before anything is opened.
            self.report_to = asked(report_to)
        # None stays None until corpus and model are known (flags.complete). transformers needs a name meanwhile.
        output_dir = self.output_dir  # type: ignore[has-type]
        super().__post_init__()
        if output_dir is None:
            self.output_dir = None

    def freeze(self) -> None:
        """From here on, setting a value raises FrozenInstanceError."""
        self.__dict__["_is_frozen"] = True

    def may_change(self) -> None:
        """Undo `freeze`."""
        self.__dict__["_is_frozen"] = False

    def with_values(self, **values: Any) -> SlimPajamaTrainingArguments:
        """Return a frozen copy with other values."""
        changed = copy.copy(self)
        changed.may_change()
        for name, value in values.items():
            setattr(changed, name, value)
        changed.freeze()
        return changed

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_is_frozen"):
            raise dataclasses.FrozenInstanceError(f"{name}: settings do not change once they are resolved")
        super().__setattr__(name, value)

    def _refuse(self) -> None:
        """Raise ValueError for values that would have no effect or a wrong one."""
        for field in dataclasses.fields(self):
            if field.name in REFUSED and not _is_usual(getattr(self, field.name), _default_of(field)):
                raise ValueError(_refusal(field.name, getattr(self, field.name)))
        ranges.refuse(self)
        if self.per_device_train_batch_size != 1:
            raise ValueError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size}: a step is one document here; "
                "leave it at 1"
            )
        if self.auto_find_batch_size:
            raise ValueError("--auto_find_batch_size: there is nothing below a batch of 1; leave it out")
        if self.lr_scheduler_type != "constant_with_warmup":
            raise ValueError(
                f"--lr_scheduler_type {_as_typed(self.lr_scheduler_type)}: the schedule is linear warm-up, then "
                "constant; leave it out and choose --learning_rate and --warmup_steps"
            )
        if _as_typed(self.save_strategy) not in ("steps", "no"):
            raise ValueError(f"--save_strategy {_as_typed(self.save_strategy)}: {_SAVED}; leave it out")
        if self.eval_steps is None and (_as_typed(self.eval_strategy) != "no" or self.eval_on_start or self.eval_delay):
            raise ValueError("held-out documents are scored every --eval_steps N: add it, or leave the other flags out")
        if _as_typed(self.eval_strategy) not in ("steps", "no"):
            raise ValueError(
                f"--eval_strategy {_as_typed(self.eval_strategy)}: held-out documents are scored every --eval_steps N; "
                "leave it out"
            )
        if (self.optim_args or self.optim_target_modules) and _as_typed(self.optim).startswith("adamw_torch"):
            raise ValueError(
                f"--optim {_as_typed(self.optim)} takes no --optim_args and no --optim_target_modules; leave them out, "
                "or choose another --optim"
            )
        if self.optim_args and any(pair.count("=") != 1 for pair in self.optim_args.split(",")):
            raise ValueError(f"--optim_args {self.optim_args}: expected name=value, several as a=1,b=2")
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "liger_kernel_config"):
            value = getattr(self, name, None)
            if isinstance(value, str) and not _is_json_object(value):
                raise ValueError(f"--{name} {value}: expected a JSON object, as '{{\"name\": 1}}'")
        backends = [backend.value.lower() for backend in DynamoBackend if backend.value != "NO"]
        if self.torch_compile_backend and self.torch_compile_backend.lower() not in backends:
            raise ValueError(f"--torch_compile_backend {self.torch_compile_backend}: expected {', '.join(backends)}")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("--use_liger_kernel: liger-kernel is not installed; pip install it, or leave this out")


def refuse_typed(typed: frozenset[str], arguments: TrainingArguments) -> None:
    """Raise UsageError for a typed flag without effect, even if it was typed with its default, if that is a number or a
    word: whoever types `--num_train_epochs 3` expects three epochs."""
    fields = {field.name: field for field in dataclasses.fields(arguments)}
    for name in sorted(typed & REFUSED.keys() & fields.keys() - TRAINING_DEFAULTS.keys()):
        default = _default_of(fields[name])
        if isinstance(default, int | float | str) and not isinstance(default, bool) and default not in (0, "", "no"):
            raise UsageError(_refusal(name, getattr(arguments, name)))


def _refusal(name: str, value: Any) -> str:
    return f"--{name} {_as_typed(value)}: it would have no effect here: {REFUSED[name]}"


def _is_usual(value: Any, default: Any) -> bool:
    """Whether a field has its default. Values that mean "off" count as equal: argparse turns some into others."""
    off: tuple[Any, ...] = (None, False, "", "no", "none", [], {})
    return value == default or (value in off and default in off)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _as_typed(value: Any) -> str:
    """A value as a user types it: for an enumeration, its word."""
    return str(getattr(value, "value", value))


def changed_fields(arguments: TrainingArguments) -> dict[str, Any]:
    """Fields of transformers that differ from our defaults, plus those shown in `--help`. Never secrets."""
    defaults = {field.name: field for field in dataclasses.fields(SlimPajamaTrainingArguments)}
    plain = arguments.to_dict()
    changed = {}
    for name, field in defaults.items():
        if not field.init or name.endswith("_token") or name not in plain:
            continue
        default = _default_of(field)
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


#: Fields that transformers fills in from the machine or from other fields. The user did not ask for them.
_DERIVED = frozenset(
    {
        "local_rank", "logging_dir", "run_name", "bf16", "fp16", "accelerator_config", "eval_strategy",
        "parallelism_config",
        "lr_scheduler_kwargs", "fsdp_config", "hub_token", "ddp_backend", "per_device_train_batch_size",
        "trackio_space_id", "fsdp", "project", "do_eval",
    }
)  # fmt: skip


class _Parser(HfArgumentParser):
    """An argument parser whose errors are one sentence instead of a page of usage."""

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


def asked(report_to: str | list[str] | None) -> list[str]:
    """The trackers that `--report_to` names. Raises UsageError for one that is unknown or not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UsageError(f"--report_to {name}: expected none, or one or more of {known}")
        if name in ("tensorboard", "trackio", "wandb") and importlib.util.find_spec(name) is None:
            raise UsageError(f"--report_to {name}: the package is not installed; pip install {name}")
    return names
