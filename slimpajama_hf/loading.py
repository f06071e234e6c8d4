"""How torch and transformers are imported: without Python's garbage collector, which finds nothing there.

They make about a million objects that stay until the process ends. To walk over them again and again took a fifth of
the import, and a second or more between the import and the first step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from slimpajama_hf import screen

#: Whether this process is the program itself. In a notebook the garbage of others has to be collected still.
_is_program = False


def in_a_process_of_its_own() -> None:
    """What is loaded from now on stays: the collector leaves it out for good."""
    global _is_program
    _is_program = True


@contextlib.contextmanager
def libraries(names: str) -> Iterator[None]:
    """Import libraries inside; the screen shows that `names` are loading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        with screen.Waiting(f"loading {names}"):
            yield
        if _is_program:
            gc.freeze()
    finally:
        if was_on:
            gc.enable()
