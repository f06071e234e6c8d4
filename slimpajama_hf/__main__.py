"""`slimpajama-hf`, or `python -m slimpajama_hf`: `--help` lists the commands, and each has a `--help` of its own.

Each file of `commands/` is a command. It has `HELP`, `add_arguments(parser)` and `main(options)`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from slimpajama_hf import program
from slimpajama_hf.errors import UsageError

#: Commands that take the flags of training, which have a parser of their own: their `main` gets the words as typed.
_OF_TRAINING = ("plan", "train")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def _commands() -> dict[str, ModuleType]:
    """The modules of `commands/` by name. They import nothing heavy before their `main` is called."""
    from slimpajama_hf import commands

    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return {name: importlib.import_module(f"slimpajama_hf.commands.{name}") for name in names}


def _parser() -> argparse.ArgumentParser:
    installed = Path(sys.argv[0]).stem == "slimpajama-hf"
    parser = _Parser(
        prog="slimpajama-hf" if installed else "python -m slimpajama_hf",
        description="Train, look at what a run left, and make tokenizers.",
    )
    # The command `completion` reads the whole parser.
    parser.set_defaults(whole=parser)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, command in _commands().items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    return parser


def main(argv: list[str]) -> int:
    if argv and argv[0] in _OF_TRAINING:
        return _commands()[argv[0]].main(argv[1:])
    options = _parser().parse_args(argv)
    return _commands()[options.command].main(options)


def command() -> NoReturn:
    """Run the command in `sys.argv`, and exit with its code."""
    argv = sys.argv[1:]
    if argv[:1] == ["train"]:
        program.end(program.run(main))
    # argparse prints the help of a command; `program.run` would print the help of training.
    if any(flag in argv for flag in ("-h", "--help")):
        _parser().parse_args(argv)
    raise SystemExit(program.run(main, if_stopped="stopped"))


if __name__ == "__main__":
    command()
