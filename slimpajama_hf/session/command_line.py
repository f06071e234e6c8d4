"""The command line of a start. A resumed run also gets the flags with which it was begun."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings.flags import all_tokens, read_flags, without_config
from slimpajama_hf.settings.yaml_file import read_config

if TYPE_CHECKING:
    from slimpajama_hf.settings.settings import Settings, Stranger


def parse(argv: Sequence[str]) -> Settings:
    """Resolve field defaults < configuration files in order < flags.

    For a resumed run, the configuration with which it was begun counts less than the files and flags given now. Raises
    UsageError with one sentence for anything that cannot be understood, and UserError for a resume that changes what
    matters.
    """
    from slimpajama_hf.record import checkpoints, ownership, run_folder
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.session import resume

    settings = read_flags(argv)
    asked = settings.training.resume_from_checkpoint
    named = settings.data.dataset if "dataset" in settings.typed else None
    checkpoint: Path | None = None
    if not resume.is_asked(asked):
        return settings
    run = Path(settings.output_dir)
    resume.refuse_run_folder(str(asked))
    from slimpajama_hf.hub import fetch, stranger

    if fetch.is_repo(str(asked)):
        run = run if "output_dir" in settings.typed else Path(fetch.folder_for(str(asked)))
        checkpoint = fetch.fetch(str(asked), str(run), named, settings.training.hub_token)
        argv = [*argv, "--resume_from_checkpoint", str(checkpoint)]
    elif str(asked).lower() != "true" and "output_dir" not in settings.typed:
        run = Path(str(asked)).parent
    folder = RunFolder(run)
    if not folder.config.is_file():
        return settings
    if folder.record.is_file():
        run_folder.refuse_of_a_script(run, folder.read_record(), "going on with it")
    config: dict[str, Any] = read_config(str(folder.config))
    found: Stranger | None = None
    if not ownership.is_own(folder):
        # Its configuration was not written by this user, even if the user names that very file.
        argv = without_config(argv, folder.config)
        typed = read_flags(argv)
        named = typed.data.dataset if "dataset" in typed.typed else None
        newest = checkpoints.newest_good(run)[0] if str(asked).lower() == "true" else checkpoint or Path(str(asked))
        config, found = stranger.look_at(folder, config, newest, named)
    begun_with = resume.flags_of_run(config, folder)
    recorded = read_flags(begun_with)
    settings = read_flags([*begun_with, f"--warmup_steps={recorded.training.warmup_steps}", *argv])
    settings = dataclasses.replace(settings, stranger=found)
    settings = settings.changed(training={"output_dir": str(run)})
    resume.refuse_changes(settings, recorded)
    return settings


def gpu_asked(argv: Sequence[str]) -> tuple[int | None, bool]:
    """Return `--gpu` and `--use_cpu`. They are read before all the rest, because parsing the rest initializes CUDA.

    If a value cannot be understood, `parse` will say so.
    """
    flags, from_files, _ = all_tokens(argv)
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
