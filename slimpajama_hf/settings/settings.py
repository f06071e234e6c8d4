"""`Settings`: everything that was asked for, resolved."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from slimpajama_hf.settings.update_rules import UpdateRules

if TYPE_CHECKING:
    from slimpajama_hf.settings.arguments import DataArguments, ModelArguments, RunArguments
    from slimpajama_hf.settings.training_arguments import SlimPajamaTrainingArguments


@dataclasses.dataclass(frozen=True)
class Stranger:
    """What is known of a resumed run that this user did not begin on this machine (`hub/stranger.py`)."""

    dataset: str | None
    """The corpus that the user named now, if any."""
    taken: tuple[str, ...]
    """Arguments that are taken from the run's folder."""
    left: tuple[str, ...]
    """Arguments that the run's folder has and that are not taken from it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that was asked for, resolved. Settings never change: `changed` makes a copy, and the Trainer gets
    arguments of its own (`for_trainer`)."""

    data: DataArguments
    model: ModelArguments
    run: RunArguments
    training: SlimPajamaTrainingArguments
    typed: frozenset[str]
    """Names that a configuration file or a flag set, as opposed to defaults."""
    stranger: Stranger | None = None
    """Set if the run that goes on is somebody else's."""

    def changed(self, **groups: dict[str, Any]) -> Settings:
        """Return a copy with other values, as `changed(model={"precision": "float32"})`."""
        kept = {name: dict(values) for name, values in groups.items()}
        training = kept.pop("training", None)
        found: dict[str, Any] = {name: dataclasses.replace(getattr(self, name), **kept[name]) for name in kept}
        if training is not None:
            found["training"] = self.training.with_values(**training)
        return dataclasses.replace(self, **found)

    def for_trainer(self) -> SlimPajamaTrainingArguments:
        """Return arguments for the Trainer, which may be changed. Its own logging and pushing are off, because we do
        both (`watching/trackers.py`, `hub/background.py`)."""
        arguments = self.training.with_values(report_to=[], push_to_hub=False)
        arguments.may_change()
        return arguments

    def value(self, name: str) -> Any:
        """The value of a flag, as a configuration file has it; None for an unknown name."""
        for group in (self.data, self.model, self.run, self.training):
            if hasattr(group, name):
                value = getattr(group, name)
                return getattr(value, "value", value)
        return None

    @property
    def rules(self) -> UpdateRules:
        """How hidden matrices and embeddings learn. Raises UsageError for `--embedding_moment row`
        where it would have no effect."""
        asked = self.model
        return UpdateRules.of(self.value("optim"), asked.hidden_optim, asked.hidden_rate, asked.embedding_moment)

    @property
    def output_dir(self) -> str:
        """Folder of the run."""
        return str(self.training.output_dir)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, which `--config` can read."""
        from slimpajama_hf.settings.training_arguments import changed_fields

        values: dict[str, Any] = {}
        for group in (self.data, self.model, self.run):
            values |= dataclasses.asdict(group)
        values |= changed_fields(self.training)
        if self.model.beta2_half_life_tokens is not None:
            # It follows from the half-life. A file with both would look as if both had been asked for.
            values.pop("adam_beta2", None)
        # These flags belong to one start, not to the run.
        for name in ("test", "overwrite_output_dir", "gpu", "watch", "resume_from_checkpoint", "allow_changes"):
            values.pop(name, None)
        lines = ["# The resolved configuration of this run; `--config` takes it back."]
        for name, value in values.items():
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer():
                # transformers declares some counts as float: 1000 and 1000.0 are one configuration.
                value = int(value)
            line = f"{name}: {json.dumps(value, ensure_ascii=False)}"
            # An interval that nobody typed stays a default: typed ones are obeyed whatever they cost.
            default = name in ("viz_interval", "display_samples") and name not in self.typed
            lines.append(f"# {line}" if default else line)
        return "\n".join(lines) + "\n"
