"""The gradient noise scale: how noisy the gradient of one document is, measured during training.

The noise scale B = tr(S) / |G|^2 is the batch size at which noise and signal of the gradient are equal (McCandlish et
al. 2018, arXiv 1812.06162, section 2.2). Far below it, twice the batch is worth twice the steps. Two documents'
gradients at the same weights separate signal from noise: their product is |G|^2 on average, the square of one is
|G|^2 + tr(S). So every `STEPS_BETWEEN` steps the gradients of the next documents are also computed at the weights of
the step, and thrown away.

Averages over steps, such as AdamW's first moment, cannot replace this. At a constant rate successive steps undo each
other's noise, so such an average is shorter than one of independent gradients (measured here: 1 to 2 % below 1/19 of a
single gradient's square, where the signal alone adds 42 %).

Squares and products are sums over parameters, so they are known for each layer. This shows where in the model documents
agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

#: Steps between measurements, and documents in each: the step's own and the next ones. About 1 % of the run's time.
STEPS_BETWEEN, DOCUMENTS = 500, 8
#: How many measurements an estimate uses, at most and at least.
WINDOW, FEWEST = 20, 3


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """A number of documents, with bounds from two standard errors of the signal; `high` None: unbounded."""

    value: float
    low: float
    high: float | None


def _scale(own: float, signal: float) -> float:
    return max(own - signal, 0.0) / signal


def estimate(squares: np.ndarray, agreements: np.ndarray) -> NoiseScale | None:
    """The noise scale from columns `grad_square` and `grad_agreement` of a ledger, (steps,), NaN if not measured.

    None if there are too few measurements, or if they show no significant signal.
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
    """Mean square, mean product, and the standard error of the mean product."""
    error = float(agreements.std(ddof=1)) / len(agreements) ** 0.5
    return float(squares.mean()), float(agreements.mean()), error


# ---- layer by layer ----


def layer_of(parameter: str) -> str:
    """The layer of a parameter by its name in `GPT2LMHeadModel`: `wte`, `wpe`, `h.0.attn`, `h.0.mlp`, ..., `ln_f`.

    A block's norms belong to the layer that they feed. A tied head is part of `wte`.
    """
    first, *rest = parameter.removeprefix("transformer.").split(".")
    if first != "h":
        return first
    return f"h.{rest[0]}.{'attn' if rest[1] in ('ln_1', 'attn') else 'mlp'}"


def of_layers(layers: Sequence[str], squares: np.ndarray, products: np.ndarray) -> dict[str, list[float]]:
    """[mean square, mean product] of each layer, to five digits, from those of its parameters, (parameters,) each.

    `layers`: the layer of each parameter. Empty if nothing was measured.
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
    """The noise of one layer's part of the gradient."""

    layer: str
    share: float
    """Share of the mean square of the whole gradient."""
    scale: NoiseScale | None
    """None: this layer shows no significant signal."""
    at_least: float | None
    """If so, a lower bound of the noise scale, by two standard errors of the signal; None: unknown."""


def by_layer(measured: Iterable[Mapping[str, Sequence[float]]]) -> list[LayerNoise]:
    """From `grad_layers` of rows, oldest first: layers in the order of the model; empty if there are too few rows.

    Among many layers some pass two standard errors by chance: of those without signal one in 33 after twenty
    measurements, one in 11 after three (Student's t).
    """
    latest = list(measured)[-WINDOW:]
    if len(latest) < FEWEST:
        return []
    # Our models have the same layers in every measurement; others are ignored.
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
    """The meaning of a noise scale for a run with one document per step, in a sentence."""
    # To learn as much, steps of b documents need 1 + b / B times as many of them (McCandlish et al. 2018, eq. 2.11).
    more = (1 + batch / found.value) / (1 + 1 / found.value) - 1
    bound = "noise-bound" if found.value > 3 else "signal-bound" if found.value < 1 / 3 else "in between"
    high = _number(found.high) if found.high is not None else "any number"
    return (
        f"{_number(found.value)} documents ({_number(found.low)} to {high}; {bound}): steps of {batch} would need "
        f"about {more:.0%} more documents to learn as much, in {(1 + more) / batch:.2g} of the steps"
    )
