"""What a check of a run returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

from slimpajama_hf.lookback.run import Row

# ---- what a check says ----


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    ok: bool
    words: str
    problems: tuple[str, ...] = ()
    """The first of them, at most `Problems.KEPT`."""


class Problems:
    """Collects what is wrong, in order; the first is what is shown."""

    KEPT = 20

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, words: str) -> None:
        self.count += 1
        if len(self.first) < self.KEPT:
            self.first.append(words)

    def finding(self, words_if_none: str) -> Finding:
        """All is well with these words, or it failed with what was collected."""
        if not self.count:
            return Finding(True, words_if_none)
        more = f"; and {self.count - 1:,} more" if self.count > 1 else ""
        return Finding(False, self.first[0] + more, tuple(self.first))


#: A check that sees the rows: it is sent each one, then None.
Watch = Generator[None, Row | None, Finding]
