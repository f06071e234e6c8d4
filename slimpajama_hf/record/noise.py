"""How noisy the gradient of one document is: the gradient noise scale, measured as training goes.

The noise scale B = tr(S) / |G|^2 is the batch at which noise and signal of the gradient are equal (McCandlish et al.
2018, arXiv 1812.06162, section 2.2): far below it, twice the batch is worth twice the steps. Two documents' gradients
at the same weights tell signal from noise: their product is |G|^2 on average, the square of one is |G|^2 + tr(S). So
every `STEPS_BETWEEN` steps the gradients of the next documents are taken too, at the weights of the step, and thrown
away.

Averages over the steps of the run, as AdamW's first moment is one, are no substitute: at a constant rate successive
steps undo each other's noise, and such an average is shorter than as many independent gradients would make it
(measured here: 1 to 2 % below 1/19 of a single one's square where the signal alone adds 42 %).

Squares and products are sums over parameters, so each layer has its own: the same measurement says where in the model
the documents agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

#: A measurement every so many steps, of so many documents: the step's own and the next. About 1 % of the run.
STEPS_BETWEEN, DOCUMENTS = 500, 8
#: Measurements that an estimate is made of, at most and at least.
WINDOW, FEWEST = 20, 3


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """In documents, with the bounds that two standard errors of the signal leave; `high` None: not bounded."""

    value: float
    low: float
    high: float | None


def _scale(own: float, signal: float) -> float:
    return max(own - signal, 0.0) / signal


def estimate(squares: np.ndarray, agreements: np.ndarray) -> NoiseScale | None:
    """From the columns `grad_square` and `grad_agreement` of a ledger, (steps,), NaN where nothing was measured.

    None while there are too few measurements, or no signal stands out of them.
    """
    measured = np.isfinite(squares) & np.isfinite(agreements)
    squares, agreements = squares[measured][-WINDOW:], agreements[measured][-WINDOW:]
    if len(squares) < FEWEST:
        return None
    own, signal, error = _means(squares, agreements)
    if signal <= 2 * error or signal >= own:
        return None
    return NoiseScale(_scale(own, signal), _scale(own, signal + 2 * error), _scale(own, signal - 2 * error))


def _means(squares: np.ndarray, agreements: np.ndarray) -> tuple[float, float, float]:
    """Mean square, mean product, standard error of the latter."""
    error = float(agreements.std(ddof=1)) / len(agreements) ** 0.5
    return float(squares.mean()), float(agreements.mean()), error


# ---- layer by layer ----


def layer_of(parameter: str) -> str:
    """The layer of a parameter by its name in `GPT2LMHeadModel`: `wte`, `wpe`, `h.0.attn`, `h.0.mlp`, ..., `ln_f`.

    A block's norms count with what they feed. Tied, the head is part of `wte`.
    """
    first, *rest = parameter.removeprefix("transformer.").split(".")
    if first != "h":
        return first
    return f"h.{rest[0]}.{'attn' if rest[1] in ('ln_1', 'attn') else 'mlp'}"


def of_layers(layers: Sequence[str], squares: np.ndarray, products: np.ndarray) -> dict[str, list[float]]:
    """[mean square, mean product] of each layer, to five digits, from those of its parameters, (parameters,) each.

    `layers`: that of each parameter. Nothing where nothing was measured.
    """
    found: dict[str, list[float]] = {}
    if not len(squares):
        return found
    for layer, *values in zip(layers, squares.tolist(), products.tolist(), strict=True):
        sums = found.setdefault(layer, [0.0, 0.0])
        for place, value in enumerate(values):
            sums[place] += value
    return {layer: [float(f"{value:.5g}") for value in sums] for layer, sums in found.items()}


@dataclasses.dataclass(frozen=True)
class LayerNoise:
    """What is known of one layer's part of the gradient."""

    layer: str
    share: float
    """Of the mean square of the whole gradient."""
    scale: NoiseScale | None
    """None: no signal stands out of the noise here."""
    at_least: float | None
    """Then the noise scale is above this, by two standard errors of the signal; None: nothing is known of it."""


def by_layer(measured: Iterable[Mapping[str, Sequence[float]]]) -> list[LayerNoise]:
    """From the fields `grad_layers` of a ledger, oldest first, in the order of the model; empty while they are too few.

    Among many layers two standard errors are passed by chance: of those without signal by one in 33 after twenty
    measurements, by one in 11 after three (Student's t).
    """
    latest = list(measured)[-WINDOW:]
    if len(latest) < FEWEST:
        return []
    # Layers that not every measurement has are of no model of ours.
    layers = [layer for layer in latest[0] if all(len(each.get(layer, ())) == 2 for each in latest)]
    values = np.array([[each[layer] for layer in layers] for each in latest], np.float64)  # (measurements, layers, 2)
    values = values.reshape(len(latest), len(layers), 2)
    whole = float(values[:, :, 0].sum()) or math.nan
    found = []
    for place, layer in enumerate(layers):
        squares, agreements = values[:, place].T
        own, signal, error = _means(squares, agreements)
        scale = estimate(squares, agreements)
        highest = signal + 2 * error
        at_least = _scale(own, highest) if scale is None and highest > 0 else None
        found.append(LayerNoise(layer, float(squares.sum()) / whole, scale, at_least))
    return found


# ---- in words ----


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def in_words(found: NoiseScale, batch: int = 8) -> str:
    """What a noise scale means for a run of one document a step, in a sentence."""
    # To learn as much, steps of b documents need in proportion 1 + b / B of them (McCandlish et al. 2018, eq. 2.11).
    more = (1 + batch / found.value) / (1 + 1 / found.value) - 1
    bound = "noise-bound" if found.value > 3 else "signal-bound" if found.value < 1 / 3 else "in between"
    high = _number(found.high) if found.high is not None else "any number"
    return (
        f"{_number(found.value)} documents ({_number(found.low)} to {high}; {bound}): steps of {batch} would need "
        f"about {more:.0%} more documents to learn as much, in {(1 + more) / batch:.2g} of the steps"
    )
