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
    """Empty where it is another process's, which alone tokenizes it."""
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
    """Where a step has several samples, of several processes or accumulated: in the first process, which has the
    ledger, all of them, this one among them, without their texts; empty in the others."""
    only_fills: bool = False
    """Whether it stands for no document and has no weight: the stream has ended, or its owner found the document to
    have fewer than 2 tokens when it had its place already."""
    tokens: int = 0
    """Those of `input_ids`; of another process's sample what that has told."""
    rank: int = 0
    """The process that learns it."""

    def __post_init__(self) -> None:
        self.tokens = len(self.input_ids) or self.tokens

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: all but the first."""
        return self.tokens - 1
