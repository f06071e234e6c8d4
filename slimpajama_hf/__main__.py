"""The other commands: `python -m slimpajama_hf --help` lists them, each has a `--help` of its own.

A command is a file of `commands/`: `HELP`, `add_arguments(parser)` and `main(options)`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from types import ModuleType
from typing import NoReturn

from slimpajama_hf import program
from slimpajama_hf.errors import UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def _commands() -> dict[str, ModuleType]:
    """The files of `commands/` by their names; none of them imports anything heavy before it is called."""
    from slimpajama_hf import commands

    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return {name: importlib.import_module(f"slimpajama_hf.commands.{name}") for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m slimpajama_hf", description="Look at what a run left, and make tokenizers.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, command in _commands().items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    return parser


def main(argv: list[str]) -> int:
    if argv[:1] == ["plan"]:
        # Its flags are those of training, which that parser knows.
        from slimpajama_hf.commands import plan

        return plan.main(argv[1:])
    options = _parser().parse_args(argv)
    return _commands()[options.command].main(options)


if __name__ == "__main__":
    # `--help` of a command is argparse's own; program.run would print the training page.
    if any(flag in sys.argv[1:] for flag in ("-h", "--help")):
        _parser().parse_args(sys.argv[1:])
    raise SystemExit(program.run(main, if_stopped="stopped"))
