"""Which documents teach: what the update of one document does to its own loss, and to that of one not yet learned.

Every `STEPS_BETWEEN` steps two losses are computed that a step does not need: that of the step's document after its
update, and before the update that of the document which comes next. The other halves of both pairs are in the ledger
anyway, for every document is scored before it is learned: its own loss before, and the next one's after. Two forwards
thus give two changes, by the arithmetic of the steps themselves, so that nothing but the update is between them.

Why the next document of the stream: it is held out at that moment, every corpus has one, it is of the run's own
mixture, and a resume reads the same one again; held-out documents of another file would have to be there, and would
cost a forward more for each change. Why one and not several: by how much one document helps another is mostly noise,
which only numbers lessen, and a forward spent on another update lessens it more than one on the same: of the two
variances, between updates and between the documents that they are tried on, it divides both. So a single change means
little, and `by_domain` says how much the means mean.

Not looked at: what autograd or several processes compute (as with `noise.py`), and packed blocks, which are of several
domains. Not held out, and left out: a later part of the same document, and after the first pass all that it taught.
The steps are fixed, so that a run that was interrupted has the same numbers: about 0.5 % of the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns


#: Prime: a corpus whose domains take turns shall not show the same one each time.
STEPS_BETWEEN = 127
#: Measurements of a domain without which it takes no part in what is said about domains.
FEWEST = 8


@dataclasses.dataclass(frozen=True)
class Fall:
    """By how much a loss fell, nats per token: mean over documents, and its standard error."""

    count: int
    mean: float | None
    error: float | None

    @property
    def stands_out(self) -> bool:
        """Whether the mean is more than two standard errors from zero."""
        return self.count >= FEWEST and abs(self.mean or 0.0) > 2 * (self.error or math.inf)


@dataclasses.dataclass(frozen=True)
class Taught:
    """What the documents of a domain taught: by how much the update of each lowered a loss."""

    domain: str
    own: Fall
    """Its own."""
    same: Fall
    """That of the next document, not learned yet, where it was of the same domain."""
    other: Fall
    """Likewise where it was of another."""


def _fall(values: np.ndarray) -> Fall:
    values = values[np.isfinite(values)]
    count = len(values)
    error = float(values.std(ddof=1)) / count**0.5 if count > 1 else None
    return Fall(count, float(values.mean()) if count else None, error)


def falls(
    loss: np.ndarray, loss_after: np.ndarray, next_loss: np.ndarray, learning_rate: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By how much each update lowered the loss of its own document and that of the next, nats per token, (steps,) each;
    NaN where it was not measured, and where it does not count. The arguments are columns of the ledger, (steps,).

    Steps at the rate of the last one alone count: in warm-up each teaches another amount than the one before.
    """
    alike = learning_rate == learning_rate[-1:]
    own = np.where(alike, loss - loss_after, np.nan)
    return own, np.where(alike, next_loss - np.append(loss, np.nan)[1:], np.nan)


def by_domain(
    loss: np.ndarray,
    loss_after: np.ndarray,
    next_loss: np.ndarray,
    learning_rate: np.ndarray,
    domain: np.ndarray,
    names: Sequence[str],
) -> tuple[Taught, list[Taught]]:
    """What all documents taught, and those of each domain: the means of `falls`, `domain` are indices into `names`."""
    own, following = falls(loss, loss_after, next_loss, learning_rate)
    akin = np.append(domain, -1)[1:] == domain

    def taught(name: str, mine: np.ndarray) -> Taught:
        return Taught(name, _fall(own[mine]), _fall(following[mine & akin]), _fall(following[mine & ~akin]))

    return taught("all", np.ones(len(loss), bool)), [taught(name, domain == k) for k, name in enumerate(names)]


def of_columns(columns: Columns) -> tuple[Taught, list[Taught]]:
    """`by_domain` of a ledger."""
    return by_domain(
        columns.loss, columns.loss_after, columns.next_loss, columns.learning_rate, columns.domain, columns.domains
    )


def differ(falls: Sequence[Fall]) -> bool | None:
    """Whether the means of domains differ by more than their errors explain; None while fewer than two can be compared.

    Cochran's Q against two standard deviations of its distribution (chi-squared) without any difference.
    """
    pairs = [(fall.mean, fall.error) for fall in falls if fall.count >= FEWEST and fall.mean is not None and fall.error]
    if len(pairs) < 2:
        return None
    means, weights = np.array([mean for mean, _ in pairs]), np.array([error**-2 for _, error in pairs])
    middle = float((weights * means).sum() / weights.sum())
    freedom = len(pairs) - 1
    return float((weights * (means - middle) ** 2).sum()) > freedom + 2 * math.sqrt(2 * freedom)


# ---- in words ----


def _change(fall: Fall) -> str:
    if fall.count < FEWEST or fall.mean is None or fall.error is None:
        return "too few measurements to say"
    return f"{-fall.mean:+.4f} ± {fall.error:.4f}{'' if fall.stands_out else ' (within noise)'}"


def in_words(whole: Taught, domains: Sequence[Taught]) -> str | None:
    """What updates teach, in a sentence, ± one standard error; None while too little is measured."""
    if whole.own.count < FEWEST:
        return None
    return (
        f"an update changes the loss of its own document by {_change(whole.own)} nats per token; of the next document, "
        f"not learned yet, where it has the same domain: {_change(whole.same)}, another: {_change(whole.other)} "
        f"({whole.own.count:,} measured); {verdict(domains)}"
    )


def verdict(domains: Sequence[Taught]) -> str:
    """Whether what a document teaches others depends on its domain, in a sentence."""
    found = [differ([getattr(each, name) for each in domains]) for name in ("same", "other")]
    if all(each is None for each in found):
        return "too few to tell domains apart"
    if not any(found):
        return "domains do not differ in what they teach others, beyond noise"
    return "domains differ in what they teach others"
