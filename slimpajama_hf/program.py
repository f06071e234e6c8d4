"""How our programs begin and end: an error that a user can fix becomes one sentence, and every end an exit code."""

from __future__ import annotations

import atexit
import errno
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from slimpajama_hf import devices, loading, screen
from slimpajama_hf.errors import SaidByTheFirst, UsageError, UserError
from slimpajama_hf.settings.arguments import help_text

#: Seconds that the other processes wait before they end, so that the first can say what is wrong.
SECONDS_FOR_THE_FIRST = 10.0


def run(main: Any, if_stopped: str = "stopped before the first step; nothing to save") -> int:
    """Call `main(argv)` and return the exit code. An error that a user can fix is said in one sentence on stderr.

    `if_stopped` is said after a Ctrl-C that `main` does not catch. Training catches it from step 0 on.
    """
    argv = sys.argv[1:]
    loading.in_a_process_of_its_own()
    screen.open_what_is_closed()
    # Before the processes are connected, all of them say the same.
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
            # A module of ours, or of a broken package: installing what a flag needs would not help.
            raise
        lacking = f"{package} is not installed in this Python ({sys.executable})"
        _say_error(UserError(f"{lacking}; type make install, then source .venv/bin/activate"))
        return UserError.exit_code
    except ImportError as error:
        # transformers raises this for a package that a flag needs.
        _say_error(UserError(" ".join(str(error).split())))
        return UserError.exit_code
    except BrokenPipeError:
        # The reader of our output does not want the rest, as `head`.
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


#: Errors of the machine, not of this program -> what to do about them.
_MACHINE = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room, or ask for a larger quota", errno.EIO: "look at the disk",
    errno.EROFS: "make it writable", errno.EACCES: "make it writable and readable for you",
    errno.EPERM: "make it writable and readable for you", errno.EFBIG: "raise the limit: ulimit -f unlimited",
    errno.EMFILE: "raise the limit: ulimit -n 4096", errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs, or raise ulimit -v", errno.EAGAIN: "close other programs, or raise ulimit -u",
}  # fmt: skip


def _of_the_machine(error: OSError | MemoryError) -> str | None:
    """Say in a sentence what the machine refused; None if the error is one of this program."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno
    if number not in _MACHINE:
        return None
    what = error.filename if isinstance(error, OSError) and error.filename else "a file or memory of this program"
    return f"{what}: {os.strerror(number)}; {_MACHINE[number]}, then type the same command again"


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main(argv)` with the command line and leave the program with what it returns, the exit code.

        if __name__ == "__main__":
            run_program(main)

    An error that a user can fix is one sentence on stderr and a code other than 0; `--help` shows the flags.
    """
    end(run(main))


def end(code: int) -> NoReturn:
    """Leave the program with an exit code, after running what is registered for its end.

    With several processes Python is not shut down the usual way. Models prepared by DDP keep threads of gloo alive that
    now and then end the process by SIGABRT ("terminate called without an active exception"), and the launcher would
    call a finished run a failure.
    """
    if devices.is_distributed():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _say_error(error: UserError) -> None:
    """Print an error once, also with several processes. All have the same flags, and the first does some work for all:
    it prints errors of these. An error that one process alone has met is printed by that process."""
    rank = os.environ.get("RANK", "0") if devices.is_distributed() else "0"
    screen.SCREEN.muted = False
    if rank == "0":
        screen.say(f"error: {error}")
    elif not isinstance(error, UsageError | SaidByTheFirst):
        screen.say(f"error: process {rank}: {error}")
    else:
        # A launcher ends all processes as soon as one fails. The first must have said why by then.
        time.sleep(SECONDS_FOR_THE_FIRST)
