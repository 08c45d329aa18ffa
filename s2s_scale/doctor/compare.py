"""How far two sets of figures are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2s_scale.doctor.figures import Figures


@dataclass(frozen=True)
class Deviation:
    """The largest differences of a run from its reference; NaN where they cannot be compared.

    ``loss`` and ``grad_norm`` are relative, ``weights`` absolute; ``step`` (from 1) is where the
    loss differs most.
    """

    loss: float
    grad_norm: float
    weights: float
    step: int

    def within(self, bound: float) -> bool:
        """Whether loss, gradient norm and weights are all closer than ``bound``."""
        return all(value <= bound for value in (self.loss, self.grad_norm, self.weights))


def compare(found: Figures, reference: Figures) -> Deviation:
    """The largest deviations of ``found``; figures that are missing count as infinite."""
    losses = _relative(found.loss, reference.loss)
    norms = _relative(found.grad_norm, reference.grad_norm)
    worst = max(range(len(losses)), key=lambda step: losses[step]) if losses else 0
    return Deviation(
        loss=max(losses, default=math.inf),
        grad_norm=max(norms, default=math.inf),
        weights=_weights(found, reference),
        step=worst + 1,
    )


def _relative(found: list[float], reference: list[float]) -> list[float]:
    if not reference or len(found) != len(reference):
        return [math.inf]
    return [
        _finite(abs(one - other) / max(abs(other), 1e-12))
        for one, other in zip(found, reference, strict=True)
    ]


def _weights(found: Figures, reference: Figures) -> float:
    if not reference.weights or found.weights.keys() != reference.weights.keys():
        return math.inf
    return max(
        _finite(float((found.weights[name].double() - weight.double()).abs().max()))
        for name, weight in reference.weights.items()
    )


def _finite(value: float) -> float:
    """NaN compares as false with everything: make it the largest deviation there is."""
    return math.inf if math.isnan(value) else value
