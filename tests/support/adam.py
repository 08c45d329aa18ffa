"""How far apart two runs' weights may be after Adam's steps, if only the order of sums differs.

Sums in fp32 depend on their order, and the order on the batch's layout, the number of ranks and the
processor's kernels. Gradients then differ by a few roundings of the largest terms in them, and Adam
may make any difference of that: a step changes a weight by

    u = m / (sqrt(v) + epsilon)

times the learning rate, whatever the gradient's size. Where the exact gradient is 0 (biases of
attention keys, which softmax does not see) or happens to be tiny (a ReLU that is almost never
active), m and sqrt(v) are rounding errors themselves, and with a usual epsilon of 1e-8 or 1e-6 such
a weight moves by a share of the learning rate, in other directions on another processor. No
tolerance between that and a mistake in the code can be told from experience with one machine.

An upper bound follows from the formula. If gradients differ by d at most, so do m, a weighted mean
of gradients, and sqrt(v), a weighted norm of them. With r = max |m| / sqrt(v), which for the steps
so far is a matter of beta1 and beta2 alone (Cauchy and Schwarz; 1 at the first step),

    |u - u'| <= d / (sqrt(v) + epsilon) * (1 + r) <= d / epsilon * (1 + r)

The bound is of use where epsilon is well above d. So tests train with ``ADAM_EPSILON``: still below
most gradients of the tiny models (their norm is up to 1 over some 7,000 weights, about 1e-2 each),
so that Adam remains Adam, and ten thousand times their rounding errors. Seven steps at 1e-2 then
have a bound of 2e-5, and a mistake, such as a row that is left out, moves weights by 1e-3 and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ADAM_EPSILON = 1e-3
LEARNING_RATE = 1e-2
"""Of ``tests.support.training.settings``."""
ROUNDING = 2.0**-24
"""Relative, of one operation in fp32."""
GRADIENT_ERROR = 4 * ROUNDING
"""Largest difference of a gradient's elements, relative to the norm of all gradients.

An element is a sum of some hundred terms, most of them far below the norm. Measured with T5 and
BART, packed and not, under kernels for AVX-512, AVX2 and none of both: up to two roundings.
"""


def adam_bound(
    steps: int,
    *,
    largest: float,
    learning_rate: float = LEARNING_RATE,
    grad_norm: float = 1.0,
    epsilon: float = ADAM_EPSILON,
    betas: tuple[float, float] = (0.9, 0.999),
) -> float:
    """The largest difference of a weight between two runs of so many steps of Adam or AdamW.

    Args:
        steps: how many; where they were taken apart, since the runs were equal to the bit.
        largest: the largest weight, absolute: its own rounding comes with each step.
        learning_rate: the highest of the schedule.
        grad_norm: of all gradients after clipping, at most; 0 if both have the same gradients.
        epsilon, betas: Adam's.
    """
    error = GRADIENT_ERROR * grad_norm / epsilon
    amplified = sum(error * (1 + _largest_ratio(step, *betas)) for step in range(1, steps + 1))
    # The sum is rounded, and so are a handful of operations that make the update, r at most.
    rounded = sum(
        ROUNDING * (largest + 8 * learning_rate * _largest_ratio(step, *betas))
        for step in range(1, steps + 1)
    )
    return learning_rate * amplified + rounded


def _largest_ratio(step: int, beta1: float, beta2: float) -> float:
    """Of |m| to sqrt(v) after so many steps, both without bias, whatever the gradients were."""
    ages = torch.arange(step, dtype=torch.float64)
    first, second = (beta**ages * (1 - beta) / (1 - beta**step) for beta in (beta1, beta2))
    return float((first.square() / second).sum().sqrt())


def assert_same_weights(
    found: Tensor | Sequence[float], expected: Tensor | Sequence[float], *, steps: int, **of: Any
) -> None:
    """All weights, in any shape, are as near as ``adam_bound(steps, ...)`` says (``of``: its rest).

    Losses and gradient norms have no such bound: compare these relative to themselves.
    """
    one, other = (torch.as_tensor(side).detach().double() for side in (found, expected))
    assert one.shape == other.shape and one.numel() > 0
    bound = adam_bound(steps, largest=float(other.abs().max()), **of)
    torch.testing.assert_close(one, other, rtol=0, atol=bound)
