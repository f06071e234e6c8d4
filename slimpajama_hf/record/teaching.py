"""What documents teach: how the update of one document changes its own loss, and that of a document not yet learned.

Every `STEPS_BETWEEN` steps two additional losses are computed: that of the step's document after its update, and that
of the next document before this update. The ledger has the other half of both pairs, because every document is scored
before it is learned: its own loss before, and the next one's after. So two forwards give two changes, with the
arithmetic of the steps themselves and nothing but the update in between.

Why the next document of the stream: it is held out at that moment, every corpus has one, it is of the run's own
mixture, and a resume reads it again. Held-out documents from a file would have to exist, and would cost one more
forward per change. Why only one: how much one document helps another is mostly noise, which only more measurements
reduce. A forward for another update reduces it more than one for the same update, because it divides both variances:
between updates, and between the documents on which they are tested. So a single change means little; `by_domain` tells
the errors of the means.

Not measured: steps of autograd or of several processes (as in `noise.py`), and packed blocks, which mix domains. Later
parts of the same document, and everything after the first pass, are not held out and are left out. The steps are fixed,
so that an interrupted run has the same numbers. The cost is about 0.5 % of the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns


#: Prime, so that a corpus whose domains take turns does not always show the same one.
STEPS_BETWEEN = 127
#: Nothing is said about a domain with fewer measurements.
FEWEST = 8


@dataclasses.dataclass(frozen=True)
class Fall:
    """How much a loss fell, nats per token: mean over documents, and its standard error."""

    count: int
    mean: float | None
    error: float | None

    @property
    def stands_out(self) -> bool:
        """Whether the mean is more than two standard errors from zero."""
        return self.count >= FEWEST and abs(self.mean or 0.0) > 2 * (self.error or math.inf)


@dataclasses.dataclass(frozen=True)
class Taught:
    """What the documents of a domain taught: how much the update of each lowered a loss."""

    domain: str
    own: Fall
    """The document's own loss."""
    same: Fall
    """The loss of the next document, not learned yet, if it was of the same domain."""
    other: Fall
    """The same if it was of another domain."""


def _fall(values: np.ndarray) -> Fall:
    values = values[np.isfinite(values)]
    count = len(values)
    error = float(values.std(ddof=1)) / count**0.5 if count > 1 else None
    return Fall(count, float(values.mean()) if count else None, error)


def falls(
    loss: np.ndarray, loss_after: np.ndarray, next_loss: np.ndarray, learning_rate: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How much each update lowered the loss of its own document and of the next one, nats per token, (steps,) each.

    The arguments are columns of the ledger, (steps,). NaN where it was not measured, and at steps with another learning
    rate than the last step: in warm-up each step teaches a different amount.
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
    """What all documents taught, and those of each domain: means of `falls`. `domain`: indices into `names`."""
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
    """Whether the means of domains differ by more than their errors explain; None if fewer than two are comparable.

    Cochran's Q is compared with two standard deviations of its distribution without a difference (chi-squared).
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
    """What updates teach, in a sentence, ± one standard error; None if too little was measured."""
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
