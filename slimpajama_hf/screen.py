"""What the user sees while the program runs: lines, and a sign of life while it waits. All of it goes to stderr."""

from __future__ import annotations

import contextlib
import os
import re
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO


def format_time(seconds: float) -> str:
    """A duration as a person reads it: `12.3s`, `37.8m`, `2.5h`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{seconds / 60:.1f}m"
    return f"{seconds / 3600:.1f}h"


def format_clock(seconds: float) -> str:
    """A duration as `12:30` or `1:02:03`, as tqdm writes it."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


class _Screen:
    """stderr that never stops or delays a run. What a full or closed pipe, or a terminal that is gone, does not take is
    dropped. Hub tokens are blanked out."""

    muted = False
    """Whether nothing is shown: of several processes only one speaks."""
    bar: Any = None
    """The tqdm bar in the last line, if there is one."""
    in_place = False
    """Whether the last line of the terminal is being overwritten in place."""

    def write(self, text: str) -> int:
        text = harmless(redacted(text))
        try:
            if not self.muted and self._takes_it():
                sys.stderr.write(text)
                sys.stderr.flush()
        except OSError:
            give_up(sys.stderr)
        except (ValueError, AttributeError):
            # Closed from within, or never there (`sys.stderr` is None without a file 2, as in pythonw).
            pass
        return len(text)

    def flush(self) -> None:
        """Do nothing: every write is flushed already."""

    def isatty(self) -> bool:
        return is_terminal()

    def fileno(self) -> int:
        # tqdm asks the terminal for its width.
        return sys.stderr.fileno()

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "utf-8"

    @staticmethod
    def _takes_it() -> bool:
        """Whether a line can be written without waiting. A pipe says yes when 4,096 bytes are free (POSIX)."""
        try:
            descriptor = sys.stderr.fileno()
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return True
            return bool(select.select([], [descriptor], [], 0)[1])
        except (OSError, ValueError, AttributeError):
            # Not a file at all (a test that captures): it cannot block.
            return True


SCREEN = _Screen()


def give_up(stream: TextIO) -> None:
    """Throw away what is written to `stream` from now on, because nobody reads it any more.

    What could not be written stays in Python's buffer. A flush that fails when Python ends would make the exit code
    120, whatever it should be (`Py_FinalizeEx`).
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_what_is_closed() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that the program was started without (`2>&-`).

    Otherwise the next file that is opened becomes file 2, and what libraries write to stderr would go into it: perhaps
    into the ledger.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # `os.open` takes the lowest number that is free, which is this one.
            os.open(os.devnull, os.O_WRONLY if descriptor else os.O_RDONLY)
        if getattr(sys, name) is None:
            stream = open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


#: Tokens that were typed or found. They need not look like tokens.
_SECRETS: set[str] = set()

#: Groups: colours, which are ours; ASCII controls but tab and line ends; other controls and marks of text direction.
_STEERING = re.compile(
    "(\x1b\\[[0-9;]*m)|([\x00-\x08\x0b\x0c\x0e-\x1f])|([\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069])"
)


def keep_secret(token: str | None) -> None:
    """Blank this text out from now on, wherever it would be shown or recorded."""
    if token and len(token) >= 8:
        _SECRETS.add(token)


def redacted(text: str) -> str:
    """`text` with Hub tokens blanked out."""
    for token in (*_SECRETS, os.environ.get("HF_TOKEN", "")):
        if len(token) >= 8:
            text = text.replace(token, "***")
    # Tokens have 34 letters behind `hf_`; names of programs (hf_subparsers) have fewer.
    return re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", text)


def harmless(text: str, hidden_too: bool = True) -> str:
    """`text` with its control characters shown as pictures, such as ␛; colours stay. `hidden_too`: also show those
    beyond ASCII, and marks that change the direction of the text."""

    def shown(match: re.Match[str]) -> str:
        colour, control, other = match.groups()
        if colour or (other and not hidden_too):
            return match[0]
        return chr(0x2400 + ord(control)) if control else f"‹U+{ord(other):04X}›"

    return _STEERING.sub(shown, text)


class Gate:
    """Standard output without control characters and Hub tokens. If it is not a terminal, characters beyond ASCII stay:
    they are data."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(harmless(redacted(text), hidden_too=self._stream.isatty()))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def gated() -> Iterator[None]:
    """Make standard output a `Gate` while entered."""
    before = sys.stdout
    sys.stdout = Gate(before)
    try:
        yield
    finally:
        sys.stdout = before


def say(line: str) -> None:
    """Write one line to stderr, above the progress bar if there is one."""
    # A carriage return would go back to the beginning of the line and hide what stands there.
    line = line.replace("\r", "␍")
    if SCREEN.in_place:
        clear_line()
    if SCREEN.bar is not None:
        SCREEN.bar.write(line, file=SCREEN)
    else:
        SCREEN.write(line + "\n")


def is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (OSError, ValueError, AttributeError):
        return False


def columns() -> int:
    """Columns of the terminal, or 80 if it does not say (a `script` pty has 0)."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = os.get_terminal_size(sys.stderr.fileno()).columns
        if found > 0:
            return found
    return 80


def show_in_place(words: str, end: str = "") -> None:
    """Write over the last line of a terminal: `words`, shortened if they are too long, then `end` in full."""
    # The last column stays free: some terminals go on to the next line there.
    room = columns() - 1
    if len(words) + len(end) > room:
        words = words[: max(room - len(end) - 1, 0)] + "…"
    SCREEN.write("\r" + (words + end)[:room].ljust(room))
    SCREEN.in_place = True


def clear_line() -> None:
    """Empty the last line of a terminal; a progress bar that stood there is drawn again."""
    SCREEN.write("\r" + " " * (columns() - 1) + "\r")
    SCREEN.in_place = False
    if SCREEN.bar is not None:
        SCREEN.bar.refresh()


class Waiting:
    """Show a sign of life at least every 2 seconds while the program waits. `waiting("for what")` changes the words.

    In a terminal one line counts the seconds in place; elsewhere a line appears every 2 seconds.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._done = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="waiting", daemon=True)
        self._terminal = is_terminal()
        self._shown = False

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __call__(self, what: str) -> None:
        self.what = what

    def _beat(self) -> None:
        period = 0.2 if self._terminal else 1.9
        while not self._done.wait(period):
            elapsed = time.monotonic() - self._start
            if self._terminal:
                frame = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(elapsed * 5) % 10]
                show_in_place(f"{frame} {self.what}", f" ({format_time(elapsed)})")
                self._shown = True
            else:
                say(f"… {self.what} ({format_time(elapsed)})")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._shown:
            clear_line()


def format_bytes(size: int) -> str:
    """`1.9 GB`, `84 MB` (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def quiet_libraries() -> None:
    """Silence the messages and bars of libraries, which would tear our progress bar. Their errors are still shown."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
