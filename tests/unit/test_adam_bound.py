"""The bound on what Adam makes of rounding errors: it holds, and it is not far above the worst."""

from __future__ import annotations

import pytest
import torch

from tests.support.adam import ADAM_EPSILON, GRADIENT_ERROR, adam_bound, assert_same_weights

RATE, STEPS = 1e-2, 12


def trained(gradients, *, epsilon):
    """Weights in float64 after a step of Adam with each of the gradients [steps, weights]."""
    weights = torch.zeros(gradients.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=RATE, eps=epsilon)
    for gradient in gradients:
        weights.grad = gradient.clone()
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize("epsilon", [1e-6, ADAM_EPSILON])
def test_gradients_of_any_size_with_errors_of_any_sign_stay_below_it(epsilon):
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS, 20_000)
    sizes = 10 ** torch.empty(shape[1:], dtype=torch.float64).uniform_(-9, 0, generator=generator)
    gradients = torch.randn(shape, dtype=torch.float64, generator=generator) * sizes
    gradients[:, ::5] = 0  # of these, nothing but the error is left
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    signs[:, ::2] = 1  # the errors of every step add up
    errors = GRADIENT_ERROR * signs
    bound = adam_bound(STEPS, largest=0.0, learning_rate=RATE, epsilon=epsilon)
    off = trained(gradients + errors, epsilon=epsilon) - trained(gradients, epsilon=epsilon)
    worst = float(off.abs().max())
    assert bound / 8 < worst <= bound, (worst, bound)


def test_weights_that_are_further_off_are_found():
    expected = torch.linspace(-1, 1, 100)
    bound = adam_bound(7, largest=1.0, grad_norm=0.5)
    assert 1e-6 < bound < 2e-5
    assert_same_weights((expected + 0.9 * bound).tolist(), expected, steps=7, grad_norm=0.5)
    other = expected.double()
    other[3] += 1.1 * bound
    with pytest.raises(AssertionError, match="Mismatched elements: 1 / 100"):
        assert_same_weights(other, expected, steps=7, grad_norm=0.5)
    with pytest.raises(AssertionError):
        assert_same_weights([], [], steps=1)
