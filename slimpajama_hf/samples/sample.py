"""What one forward pass sees, and all that is known about it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Cursor, Document


@dataclasses.dataclass
class Sample:
    """One training example and everything that is known about it; `after` is where reading goes on."""

    input_ids: list[int]
    document: Document
    """The document (in `pack`: the one that the sample begins with)."""
    after: Cursor
    text_bytes: int
    """UTF-8 bytes that the tokens cover."""
    part: int = 0
    tokens_cut: int = 0
    tokens_cut_exact: bool = True
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Unusable records since the sample before, by reason."""
    gaps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Shards set aside since the sample before: {"shard", "row", "reason"}."""
    documents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """In `pack`, what the block is made of: {"shard", "row", "text_sha1", "first_token", "tokens"}, EOS counted."""
    together: list[Sample] = dataclasses.field(default_factory=list)
    """Where a step has several samples, of several processes or accumulated: all of them, this one among them."""
    weight: float = 1.0
    """What its mean loss is multiplied by, so that the mean over the step's samples is that over its tokens; 0 for one
    that only fills a place at the end of the stream (it is another's, and counts there)."""

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: all but the first."""
        return len(self.input_ids) - 1
