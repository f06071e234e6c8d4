"""How a program of ours begins and ends: argv in, one sentence for what a user can mend, an exit code out."""

from __future__ import annotations

import atexit
import errno
import functools
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

from slimpajama_hf import devices, loading, screen
from slimpajama_hf.errors import SaidByTheFirst, UsageError, UserError
from slimpajama_hf.settings.arguments import help_text

#: So long the first of several processes may take to say what ends them all; then its launcher ends the others.
SECONDS_FOR_THE_FIRST = 10.0


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
    loading.in_a_process_of_its_own()
    screen.open_what_is_closed()
    # What is said before they have met is the same in all of them.
    screen.SCREEN.muted = devices.is_distributed() and os.environ.get("RANK", "0") != "0"
    with screen.gated():
        return _run(main, argv, if_stopped)


def _run(main: Any, argv: list[str], if_stopped: str) -> int:
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
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "slimpajama_hf") or importlib.util.find_spec(package) is not None:
            # A module of this program, or of one that is broken: no flag asks for it.
            raise
        lacking = f"{package} is not installed in this Python ({sys.executable})"
        _say_error(UserError(f"{lacking}; type make install, then source .venv/bin/activate"))
        return UserError.exit_code
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
    except (OSError, MemoryError) as error:
        words = _of_the_machine(error)
        if words is None:
            raise
        _say_error(UserError(words))
        return UserError.exit_code


#: What a machine refuses whatever this program does, and what to do about it.
_MACHINE = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room, or ask for a larger quota", errno.EIO: "look at the disk",
    errno.EROFS: "make it writable", errno.EACCES: "make it writable and readable for you",
    errno.EPERM: "make it writable and readable for you", errno.EFBIG: "raise the limit: ulimit -f unlimited",
    errno.EMFILE: "raise the limit: ulimit -n 4096", errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs, or raise ulimit -v", errno.EAGAIN: "close other programs, or raise ulimit -u",
}  # fmt: skip


def _of_the_machine(error: OSError | MemoryError) -> str | None:
    """What the machine did not give, in a sentence; None where the error is one of this program."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno
    if number not in _MACHINE:
        return None
    what = error.filename if isinstance(error, OSError) and error.filename else "a file or memory of this program"
    return f"{what}: {os.strerror(number)}; {_MACHINE[number]}, then type the same command again"


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
