"""What one forward pass gets, and all that is known about it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Cursor, Document


@dataclasses.dataclass
class Sample:
    """One training example and all that is known about it. `after` is where reading goes on."""

    input_ids: list[int]
    """Empty if another process learns the sample: only that process tokenizes it."""
    document: Document
    """The document (in `pack`: the one that the sample begins with)."""
    after: Cursor
    text_bytes: int
    """UTF-8 bytes that the tokens cover."""
    part: int = 0
    tokens_cut: int = 0
    tokens_cut_exact: bool = True
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reason -> number of unusable records since the sample before."""
    gaps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Shards that were skipped since the sample before: {"shard", "row", "reason"}."""
    documents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """In `pack`, the parts of the block: {"shard", "row", "text_sha1", "first_token", "tokens"}, EOS counted."""
    together: list[Sample] = dataclasses.field(default_factory=list)
    """If a step has several samples, from several processes or accumulated: all of them, with this one, without their
    texts. Only the first process has them, because it writes the ledger; the list is empty in the others."""
    only_fills: bool = False
    """Whether it stands for no document and has no weight. Either the stream has ended, or the document already had its
    place when its process found that it has fewer than 2 tokens."""
    tokens: int = 0
    """Length of `input_ids`; for a sample of another process, what that process reported."""
    rank: int = 0
    """The process that learns the sample."""

    def __post_init__(self) -> None:
        self.tokens = len(self.input_ids) or self.tokens

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted: all but the first."""
        return self.tokens - 1
