"""Turn argv and YAML files into argument dataclasses. YAML keys become flags, so that one parser checks everything."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from slimpajama_hf import CONFIGS, devices, loading, precision, screen
from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings import old_program
from slimpajama_hf.settings.arguments import OURS
from slimpajama_hf.settings.settings import Settings
from slimpajama_hf.settings.yaml_file import read_config

TEST_CONFIG = CONFIGS / "test.yaml"
TEST_FOLDER = str(Path("runs") / "test-run")


def config_to_argv(values: dict[str, Any], path: str) -> list[str]:
    """Turn the keys of a YAML file into flags. A null value leaves the default."""
    argv: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        flag = f"--{key}"
        if isinstance(value, list):
            if any(isinstance(item, list | dict) for item in value):
                raise UsageError(f"{path}: {key} holds a nested list; expected plain values")
            if not value:
                raise UsageError(f"{path}: {key} is an empty list; expected values, or leave the line out")
            argv += [flag, *map(str, value)]
        else:
            argv.append(f"{flag}={value}")
    return argv


def split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `argv` into the configuration files that it names, in order, and the other arguments."""
    configs, rest, tokens = [], [], iter(argv)
    for token in tokens:
        if token == "--config":
            path = next(tokens, None)
            if path is None:
                raise UsageError("--config: expected the name of a YAML file after it")
            configs.append(path)
        elif token.startswith("--config="):
            configs.append(token.removeprefix("--config="))
        else:
            rest.append(token)
    return configs, rest


def rename(argv: Sequence[str], file: str = "") -> list[str]:
    """Give flags their names of today: underscores, and new names for old flags. Raises UsageError for flags that are
    gone, and names the configuration `file` that has them."""
    renamed = []
    for token in argv:
        # `-5` is a value; `--flag` and `--flag=value` are flags.
        if not token.startswith("--") or len(token) < 3:
            renamed.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name in old_program.GONE:
            raise UsageError((f"{file}: " if file else "") + old_program.refusal(name))
        renamed.append(f"--{old_program.RENAMED.get(name, name)}{equals}{value}")
    return renamed


def _typed_names(argv: Sequence[str]) -> frozenset[str]:
    return frozenset(token[2:].partition("=")[0] for token in argv if token.startswith("--"))


def _refuse_empty(tokens: Sequence[str], origin: dict[str, str]) -> None:
    """Raise UsageError for an empty value. An unset shell variable leaves one, and flags would differ in reading it."""
    for before, token in itertools.pairwise(["", *tokens]):
        flag = before if token == "" else token[:-1] if token.endswith("=") else ""
        name = flag.removeprefix("--")
        if flag.startswith("--") and "=" not in name:
            where = f"{origin[name]}: " if name in origin else ""
            raise UsageError(f"{where}--{name}: there is nothing after it; give it a value or leave it out")


def _refuse_not_utf8(tokens: Sequence[str]) -> None:
    """Raise UsageError for bytes that are not UTF-8: they could not be written into `run_config.yaml`."""
    for token in tokens:
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise UsageError(
                f"{token.encode('utf-8', 'replace').decode()}: it holds bytes that are no UTF-8; rename the file, or "
                "name its folder or a 'glob' instead"
            )


def _refuse_unknown(unknown: Sequence[str], known: Sequence[str], origin: dict[str, str]) -> NoReturn:
    token = unknown[0]
    name = token[2:].partition("=")[0] if token.startswith("--") else token
    if not token.startswith("--"):
        if any(mark in token for mark in ("/", ".")):
            raise UsageError(
                f"{token!r}: a value without a flag; a pattern must be quoted, as --dataset 'folder/*.jsonl.zst'"
            )
        raise UsageError(f"{token!r}: a value without a flag; see --help")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean --{close[0]}?" if close else "see --help"
    where = f"{origin[name]}: " if name in origin else ""
    raise UsageError(f"{where}--{name}: no such flag; {hint}")


def all_tokens(argv: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """The typed flags, the flags of all configuration files in order, and for each of these the file that has it."""
    configs, flags = split_config(argv)
    flags = rename(flags)
    if "--test" in flags or any(token.lower() in ("--test=true", "--test=1") for token in flags):
        configs.insert(0, str(TEST_CONFIG))
    origin: dict[str, str] = {}
    from_files: list[str] = []
    for path in configs:
        tokens = rename(config_to_argv(read_config(path), path), path)
        origin |= dict.fromkeys(_typed_names(tokens), path)
        from_files += tokens
    return flags, from_files, origin


def without_config(argv: Sequence[str], path: Path) -> list[str]:
    """The command line without `--config path`."""
    configs, flags = split_config(argv)
    kept = [config for config in configs if Path(config).resolve() != path.resolve()]
    return [*(word for config in kept for word in ("--config", config)), *flags]


def read_flags(argv: Sequence[str]) -> Settings:
    """Settings of a run that starts anew: field defaults < configuration files in order < flags."""
    devices.refuse_launchers_wishes()
    flags, from_files, origin = all_tokens(argv)
    _refuse_empty([*from_files, *flags], origin)
    _refuse_not_utf8([*from_files, *flags])
    typed = _typed_names([*from_files, *flags])

    devices.wait_politely()
    devices.take_huge_pages()
    with loading.libraries("torch and transformers"):
        from slimpajama_hf.settings.training_arguments import SlimPajamaTrainingArguments, make_parser, refuse_typed

    parser = make_parser([*OURS, SlimPajamaTrainingArguments])
    known = sorted({action[2:] for action in parser._option_string_actions if action.startswith("--")})
    try:
        # The parser lets later values win. That alone makes the order of precedence.
        *groups, unknown = parser.parse_args_into_dataclasses(
            args=[*from_files, *flags], return_remaining_strings=True, look_for_args_file=False
        )
    except UsageError as error:
        flag = str(error).partition(":")[0].removeprefix("--")
        if flag in origin and flag not in _typed_names(flags):
            raise UsageError(f"{origin[flag]}: {error}") from None
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    if unknown:
        _refuse_unknown(unknown, known, origin)
    data, model, run, training = groups
    refuse_typed(typed, training)
    training.freeze()
    screen.keep_secret(training.hub_token)
    return complete(Settings(data, model, run, training, typed))


def beta2_of_half_life(half_life_tokens: float, tokens_per_step: int) -> float:
    """The `beta2` with which a gradient counts half after so many tokens (Marek et al. 2025, arXiv 2507.07101)."""
    return float(0.5 ** (tokens_per_step / half_life_tokens))


def complete(settings: Settings) -> Settings:
    """Fill in the values that follow from other arguments or from the launcher."""
    training: Any = settings.training
    flags = {name: value for name, value in training.precision_flags.items() if value or name in settings.typed}
    completed: dict[str, Any] = {}
    if settings.run.no_checkpoint:
        completed["save_strategy"] = type(training.save_strategy)("no")
    half_life = settings.model.beta2_half_life_tokens
    if half_life is not None:
        beta2 = beta2_of_half_life(half_life, settings.data.max_seq_length)
        if "adam_beta2" in settings.typed and training.adam_beta2 != beta2:
            raise UsageError(
                f"--beta2_half_life_tokens {half_life:g} means --adam_beta2 {beta2:.6g}, and --adam_beta2 "
                f"{training.adam_beta2:g} is given too; leave one of them out"
            )
        completed["adam_beta2"] = beta2
    if training.output_dir is None:
        # A test has a folder of its own, so that a later run without --output_dir does not find the test there.
        named = _folder_named_after(settings.data.dataset, settings.model.model)
        completed["output_dir"] = TEST_FOLDER if settings.run.test else named
    chosen = precision.asked(settings.model.precision, flags)
    settings = settings.changed(model={"precision": chosen}, training=completed)
    _ = settings.rules  # refuses what would have no effect
    if settings.run.lr_find:
        settings = _range_test(settings)
    # A fraction of the steps becomes a number now: a resume with more steps must not warm up again.
    return settings.changed(training={"warmup_steps": settings.training.get_warmup_steps(settings.training.max_steps)})


def _folder_named_after(dataset: str, model: str) -> str:
    corpus = Path(dataset).name if "*" not in dataset else "local"
    corpus = corpus.partition(".")[0] or "local"
    model = Path(model).parent.name or "config" if model.endswith(".json") else model
    return str(Path("runs") / f"{corpus}-{model}")


def _range_test(settings: Settings) -> Settings:
    """Settings of `--lr_find`: a short run in a folder beside that of the run."""
    from slimpajama_hf.settings import arguments

    training: Any = settings.training
    if training.resume_from_checkpoint or training.push_to_hub:
        raise UsageError("--lr_find: a test of its own; leave --resume_from_checkpoint and --push_to_hub out")
    # Marked as typed, because typed intervals are obeyed.
    settings = dataclasses.replace(settings, typed=settings.typed | {"viz_interval", "display_samples"})
    return settings.changed(
        training={
            "output_dir": f"{training.output_dir}-lr_find",
            "max_steps": arguments.STEPS,
            "save_strategy": type(training.save_strategy)("no"),
            "eval_steps": None,
            "eval_strategy": type(training.eval_strategy)("no"),
        },
        run={
            "no_checkpoint": True, "overwrite_output_dir": True, "viz_interval": 0, "display_samples": 0,
        },
        model={"average_weights": 0.0},
    )  # fmt: skip
