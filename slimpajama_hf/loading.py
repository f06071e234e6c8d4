"""How torch and transformers are imported: without Python's garbage collector, which finds nothing there.

They make 700,000 objects that stay until the process ends. Walking over them again and again took a third of the time
to the first step: 5.2 s instead of 3.3 (a small model, 2 cores of an Intel Xeon).
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
