"""The loss of a passage that was found, at the steps that trained it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import reread
from slimpajama_hf.lookback.reread import Rereader, quiet_encoder_of
from slimpajama_hf.record import ledger, surprisals

if TYPE_CHECKING:
    from slimpajama_hf.lookback.search_finding import Match, Read
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class Losses:
    """The loss of a step and of the TEXT in it."""

    step: int
    row: dict[str, Any]
    """The step's row of the ledger."""
    own_loss: float | None
    """Mean surprisal of the tokens of the TEXT itself, nats per token; None if it was not kept."""
    own_tokens: int


def losses_of(folder: RunFolder, matches: Iterable[Match], most: int) -> dict[int, Losses]:
    """The losses of the first `most` steps in `matches`, by step; with the TEXT's own loss if it was kept."""
    found: dict[int, tuple[Match, Read]] = {}
    for match in matches:
        for read in match.reads:
            found.setdefault(read.step, (match, read))
    wanted = dict(itertools.islice(sorted(found.items(), key=lambda item: item[0]), most))
    if not wanted:
        return {}
    record, losses = folder.read_record(), {}
    with Rereader(reread.corpus_of(record)) as rereader:
        own = _OwnLoss(folder, record, rereader)
        for row, predicted in _rows(folder, set(wanted)):
            match, read = wanted[row["step"]]
            losses[row["step"]] = Losses(row["step"], row, *own(row, predicted, match, read))
    return losses


class _OwnLoss:
    """The mean surprisal of a TEXT in a step, from `surprisals.f32`."""

    def __init__(self, folder: RunFolder, record: dict[str, Any], rereader: Rereader) -> None:
        self.folder, self.record, self.rereader = folder, record, rereader
        self._encoder: Encoder | None = None

    def __call__(self, row: dict[str, Any], predicted: int, match: Match, read: Read) -> tuple[float | None, int]:
        """(nats per token, tokens); (None, 0) if it was not kept or the document can no longer be read."""
        nats = surprisals.read(self.folder.surprisals, predicted, ledger.predicted(row))
        if not np.isfinite(nats).all():
            return None, 0
        if self._encoder is None:
            self._encoder = quiet_encoder_of(self.folder, self.record)
        mode, length = self.record["model"]["sample_mode"], self.record["model"]["max_seq_length"]
        places = reread.places(row, mode, length)
        try:
            documents = [self.rereader.read(place) for place in places]
            tokens = reread.tokens_again(self._encoder, places, documents, mode)
        except UserError:
            # The index has the text; the answer does not need the corpus.
            return None, 0
        # The first token of each sample is not predicted and has no value.
        firsts = set(itertools.accumulate((sample["tokens"] for sample in ledger.each_sample(row)), initial=0))
        valued = (token for index, token in enumerate(tokens) if index not in firsts)
        own = [
            index
            for index, token in enumerate(valued)
            if (places[token.document].shard, places[token.document].row) == (match.shard, match.row)
            and token.start < read.end and read.start < token.end
        ]  # fmt: skip
        return (float(nats[own].astype(np.float64).mean()), len(own)) if own else (None, 0)


def _rows(folder: RunFolder, steps: set[int]) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, tokens predicted before it) of some steps, in order."""
    predicted = 0
    for row in ledger.rows(folder.ledger):
        if not steps:
            return
        if row["step"] in steps:
            steps.discard(row["step"])
            yield row, predicted
        predicted += ledger.predicted(row)
