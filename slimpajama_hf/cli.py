"""argv and YAML files -> argument dataclasses. A YAML file is flags written down: one parser checks everything."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import difflib
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from slimpajama_hf import devices, precision, screen
from slimpajama_hf.arguments import (
    OLD_FLAGS,
    OURS,
    REFUSED_FLAGS,
    DataArguments,
    ModelArguments,
    RunArguments,
    help_text,
)
from slimpajama_hf.errors import SaidByTheFirst, UsageError, UserError

if TYPE_CHECKING:
    from slimpajama_hf.training_arguments import SlimPajamaTrainingArguments

TEST_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "test.yaml"

#: A configuration is a page of flags; anything larger is a mistake (or an alias bomb).
LARGEST_CONFIG_BYTES = 100_000

#: So long the first of several processes may take to say what ends them all; then its launcher ends the others.
SECONDS_FOR_THE_FIRST = 10.0


@dataclasses.dataclass
class Settings:
    """Everything that was asked for, resolved."""

    data: DataArguments
    model: ModelArguments
    run: RunArguments
    training: SlimPajamaTrainingArguments
    typed: frozenset[str]
    """Names that a configuration file or a flag set, as opposed to defaults."""

    def value(self, name: str) -> Any:
        """An argument by its flag's name, as it would be written down."""
        for group in (self.data, self.model, self.run, self.training):
            if hasattr(group, name):
                value = getattr(group, name)
                return getattr(value, "value", value)
        return None

    @property
    def output_dir(self) -> str:
        """Folder of the run."""
        return str(self.training.output_dir)

    def to_yaml(self) -> str:
        """The resolved configuration as flags written down; `--config` takes it back."""
        from slimpajama_hf.training_arguments import changed_fields

        values: dict[str, Any] = {}
        for group in (self.data, self.model, self.run):
            values |= dataclasses.asdict(group)
        values |= changed_fields(self.training)
        if self.model.beta2_half_life_tokens is not None:
            # It follows from the half-life; both would look like two people's wishes.
            values.pop("adam_beta2", None)
        # What belongs to one start and not to the run is not written down.
        for name in ("test", "overwrite_output_dir", "gpu", "resume_from_checkpoint", "allow_changes"):
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: not YAML ({reason}); expected lines such as `max_steps: 1000`") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config {path}: expected `name: value` lines, found {type(values).__name__}")
    return values


def config_to_argv(values: dict[str, Any], path: str) -> list[str]:
    """Keys of a YAML file as flags. A null value leaves the default."""
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
            argv += [flag, *map(str, value)]
        else:
            argv.append(f"{flag}={value}")
    return argv


def split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Configuration files named in `argv` (in order), and the other arguments."""
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


def rename(argv: Sequence[str]) -> list[str]:
    """Flags in today's names: underscores, old flags renamed. Raises UsageError for those that are gone."""
    renamed = []
    for token in argv:
        # `-5` is a value; `--flag` and `--flag=value` are flags.
        if not token.startswith("--") or len(token) < 3:
            renamed.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name in REFUSED_FLAGS:
            raise UsageError(REFUSED_FLAGS[name])
        renamed.append(f"--{OLD_FLAGS.get(name, name)}{equals}{value}")
    return renamed


def _typed_names(argv: Sequence[str]) -> frozenset[str]:
    return frozenset(token[2:].partition("=")[0] for token in argv if token.startswith("--"))


def _refuse_empty(tokens: Sequence[str], origin: dict[str, str]) -> None:
    """A shell variable that is not set leaves an empty word; each flag would make something else of it."""
    for before, token in itertools.pairwise(["", *tokens]):
        flag = before if token == "" else token[:-1] if token.endswith("=") else ""
        name = flag.removeprefix("--")
        if flag.startswith("--") and "=" not in name:
            where = f"{origin[name]}: " if name in origin else ""
            raise UsageError(f"{where}--{name}: there is nothing after it; give it a value or leave it out")


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


def parse(argv: Sequence[str]) -> Settings:
    """Resolve field defaults < configuration files in order < flags.

    A resumed run goes on with its own configuration: what it was begun with stands below the files and flags given now.
    Raises UsageError with one sentence for anything that cannot be understood, UserError for a resume that changes
    what matters.
    """
    from slimpajama_hf import resume
    from slimpajama_hf.run_folder import RunFolder

    settings = _parse(argv)
    asked = settings.training.resume_from_checkpoint
    if not resume.is_asked(asked):
        return settings
    run = Path(settings.output_dir)
    resume.refuse_run_folder(str(asked))
    from slimpajama_hf.hub import fetch

    if fetch.is_repo(str(asked)):
        run = run if "output_dir" in settings.typed else Path(fetch.folder_for(str(asked)))
        dataset = settings.data.dataset if "dataset" in settings.typed else None
        checkpoint = fetch.fetch(str(asked), str(run), dataset, settings.training.hub_token)
        argv = [*argv, "--resume_from_checkpoint", str(checkpoint)]
    elif str(asked).lower() != "true" and "output_dir" not in settings.typed:
        run = Path(str(asked)).parent
    own = RunFolder(run).config
    if not own.is_file():
        return settings
    begun_with = resume.flags_of_run(read_config(str(own)), str(own))
    recorded = _parse(begun_with)
    settings = _parse([*begun_with, f"--warmup_steps={recorded.training.warmup_steps}", *argv])
    training: Any = settings.training
    training.output_dir = str(run)
    resume.refuse_changes(settings, recorded)
    return settings


def gpu_asked(argv: Sequence[str]) -> tuple[int | None, bool]:
    """What `--gpu` and `--use_cpu` say, read before all the rest: parsing that wakes CUDA, which then sees no other.

    A value that cannot be understood is left to `parse`, which says so.
    """
    flags, from_files, _ = _tokens(argv)
    asked = _DeviceFlags(add_help=False, allow_abbrev=False)
    asked.add_argument("--gpu", type=int)
    asked.add_argument("--use_cpu", nargs="?", const="true", default="false")
    try:
        found, _ = asked.parse_known_args([*from_files, *flags])
    except UsageError:
        return None, True
    return found.gpu, found.use_cpu.lower() in ("yes", "true", "t", "y", "1")


class _DeviceFlags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _tokens(argv: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """The flags typed, those of configuration files in their order, and of each of the latter the file."""
    configs, flags = split_config(argv)
    flags = rename(flags)
    if "--test" in flags or any(token.lower() in ("--test=true", "--test=1") for token in flags):
        configs.insert(0, str(TEST_CONFIG))
    origin: dict[str, str] = {}
    from_files: list[str] = []
    for path in configs:
        tokens = rename(config_to_argv(read_config(path), path))
        origin |= dict.fromkeys(_typed_names(tokens), path)
        from_files += tokens
    return flags, from_files, origin


def _parse(argv: Sequence[str]) -> Settings:
    devices.refuse_launchers_wishes()
    flags, from_files, origin = _tokens(argv)
    _refuse_empty([*from_files, *flags], origin)
    typed = _typed_names([*from_files, *flags])

    devices.wait_politely()
    devices.take_huge_pages()
    with screen.Waiting("loading torch and transformers"):
        from slimpajama_hf.training_arguments import SlimPajamaTrainingArguments, make_parser, refuse_typed

    parser = make_parser([*OURS, SlimPajamaTrainingArguments])
    known = sorted({action[2:] for action in parser._option_string_actions if action.startswith("--")})
    try:
        # The parser's own order is the whole rule of precedence: later wins.
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
    settings = Settings(data, model, run, training, typed)
    complete(settings)
    return settings


def beta2_of_half_life(half_life_tokens: float, tokens_per_step: int) -> float:
    """The `beta2` with which a gradient counts half after so many tokens (Marek et al. 2025, arXiv 2507.07101)."""
    return float(0.5 ** (tokens_per_step / half_life_tokens))


def complete(settings: Settings) -> None:
    """What one argument says about another, and what the launcher says of them."""
    training: Any = settings.training
    flags = {name: value for name, value in training.precision_flags.items() if value or name in settings.typed}
    settings.model.precision = precision.asked(settings.model.precision, flags)
    if settings.run.no_checkpoint:
        training.save_strategy = type(training.save_strategy)("no")
    half_life = settings.model.beta2_half_life_tokens
    if half_life is not None:
        beta2 = beta2_of_half_life(half_life, settings.data.max_seq_length)
        if "adam_beta2" in settings.typed and training.adam_beta2 != beta2:
            raise UsageError(
                f"--beta2_half_life_tokens {half_life:g} means --adam_beta2 {beta2:.6g}, and --adam_beta2 "
                f"{training.adam_beta2:g} is given too; leave one of them out"
            )
        training.adam_beta2 = beta2
    if training.output_dir is None:
        corpus = Path(settings.data.dataset).name if "*" not in settings.data.dataset else "local"
        corpus = corpus.partition(".")[0] or "local"
        model = settings.model.model
        model = Path(model).parent.name or "config" if model.endswith(".json") else model
        training.output_dir = str(Path("runs") / f"{corpus}-{model}")
    if settings.run.lr_find:
        _make_range_test(settings)
    # A share of the steps becomes a number now: more steps later are no reason to warm up again.
    training.warmup_steps = training.get_warmup_steps(training.max_steps)


def _make_range_test(settings: Settings) -> None:
    """`--lr_find`: a short run in a folder beside the run's, of which the curve stays."""
    from slimpajama_hf import range_test

    training: Any = settings.training
    if training.resume_from_checkpoint or training.push_to_hub:
        raise UsageError("--lr_find: a test of its own; leave --resume_from_checkpoint and --push_to_hub out")
    training.output_dir = f"{training.output_dir}-lr_find"
    training.max_steps = range_test.STEPS
    training.save_strategy = type(training.save_strategy)("no")
    settings.run.no_checkpoint = settings.run.overwrite_output_dir = True
    settings.run.viz_interval = settings.run.display_samples = 10**9
    settings.model.average_weights = 0.0


def with_an_end(main: Callable[[list[str], ExitStack], int]) -> Callable[[list[str]], int]:
    """`main(argv)` out of `main(argv, at_end)`: what it leaves to `at_end` is done behind it, however it ends.

    So a program or a notebook can call it again.
    """

    @functools.wraps(main)
    def whole(argv: list[str]) -> int:
        with ExitStack() as at_end:
            return main(argv, at_end)

    return whole


def run(main: Any, if_stopped: str = "stopped before the first step; nothing to save") -> int:
    """Call `main(argv)`; turn what a user can mend into one sentence on stderr and an exit code.

    `if_stopped` is said after a Ctrl-C that `main` leaves to its caller: that of training does so before step 0 only.
    """
    argv = sys.argv[1:]
    screen.open_what_is_closed()
    try:
        if "--help" in argv or "-h" in argv:
            sys.stdout.write(help_text() + "\n")
            code = 0
        else:
            code = int(main(argv) or 0)
        sys.stdout.flush()
        return code
    except UserError as error:
        _say_error(error)
        return error.exit_code
    except ModuleNotFoundError:
        # A module of this program, or of one that is broken: no flag asks for it.
        raise
    except ImportError as error:
        # transformers says so of a package that a flag needs.
        _say_error(UserError(" ".join(str(error).split())))
        return UserError.exit_code
    except BrokenPipeError:
        # Whoever read the output has enough of it.
        screen.give_up(sys.stdout)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        screen.say(if_stopped)
        return 130


def end(code: int) -> NoReturn:
    """Leave the program with an exit code, what is registered for its end done.

    One process of several goes without taking Python apart: threads of gloo that outlive their group, which models
    prepared by DDP hold on to, end it by SIGABRT there now and then ("terminate called without an active exception"),
    and the launcher then calls a run that was done a failure.
    """
    if devices.is_distributed():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _say_error(error: UserError) -> None:
    """Once, also where several processes were started: each has the same flags, and the first speaks for what it did
    for all. What one of them alone met, that one says."""
    rank = os.environ.get("RANK", "0") if devices.is_distributed() else "0"
    screen.SCREEN.muted = False
    if rank == "0":
        screen.say(f"error: {error}")
    elif not isinstance(error, UsageError | SaidByTheFirst):
        screen.say(f"error: process {rank}: {error}")
    else:
        # A launcher ends all as soon as one ends badly: the first has to have said why.
        time.sleep(SECONDS_FOR_THE_FIRST)
