"""`completion SHELL`: print a script for the shell that completes every command and flag."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

HELP = "a script that completes commands and flags: bash, zsh or fish"

#: Shell -> where it looks for the script. zsh looks in the folders of its `fpath`.
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/slimpajama-hf",
    "zsh": "_slimpajama-hf in a folder of $fpath",
    "fish": "~/.config/fish/completions/slimpajama-hf.fish",
}

#: Names of arguments that name a file or a folder.
_FILES = {"config", "dataset", "eval_dataset", "tokenizer", "model", "output"}
_FOLDERS = {"run", "runs", "other", "output_dir", "resume_from_checkpoint"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `completion`."""
    places = "; ".join(f"{shell}: {place}" for shell, place in PLACES.items())
    parser.description = (
        f"Writes the script to stdout. Once: slimpajama-hf completion SHELL > FILE, with FILE for {places}"
    )
    parser.add_argument("shell", choices=tuple(PLACES), help="the shell that you type in")


def main(options: argparse.Namespace) -> int:
    import shtab

    from slimpajama_hf.settings.arguments import OURS
    from slimpajama_hf.settings.training_arguments import SlimPajamaTrainingArguments, make_parser

    whole: Any = options.whole
    commands = next(action for action in whole._actions if isinstance(action, argparse._SubParsersAction)).choices
    flags = make_parser([*OURS, SlimPajamaTrainingArguments])
    for name in ("train", "plan"):
        commands[name].add_argument("--config", help="flags written down in YAML; may be given several times")
        for action in flags._actions:
            # Complete one spelling of each flag: with underscores, as in help and in configurations.
            action.option_strings = action.option_strings[:1]
            # argparse needs "5 %%", which is how transformers writes it. Our own help says "5 %".
            action.help = re.sub(r"%(?!\(default\))%?", "%%", action.help) if action.help else action.help
            commands[name]._add_action(action)
    for parser in commands.values():
        for action in parser._actions:
            kind = shtab.FILE if action.dest in _FILES else shtab.DIRECTORY if action.dest in _FOLDERS else None
            if kind is not None and action.choices is None:
                action.complete = kind
    whole.prog = "slimpajama-hf"
    # The default prefix of function names begins with `hf_` and would be blanked out like a Hub token.
    sys.stdout.write(shtab.complete(whole, options.shell, root_prefix="slimpajama") + "\n")
    return 0
