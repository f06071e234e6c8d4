"""What a check of a run returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

from slimpajama_hf.lookback.run import Row


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check."""

    ok: bool
    words: str
    problems: tuple[str, ...] = ()
    """The first problems, at most `Problems.KEPT`."""


class Problems:
    """Collects problems in order; the first one is shown."""

    KEPT = 20

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, words: str) -> None:
        self.count += 1
        if len(self.first) < self.KEPT:
            self.first.append(words)

    def finding(self, words_if_none: str) -> Finding:
        """Success with these words, or a failure with the collected problems."""
        if not self.count:
            return Finding(True, words_if_none)
        more = f"; and {self.count - 1:,} more" if self.count > 1 else ""
        return Finding(False, self.first[0] + more, tuple(self.first))


#: A check that needs the rows: it is sent each row, then None.
Watch = Generator[None, Row | None, Finding]
