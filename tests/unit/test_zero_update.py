"""ZeRO's update, put off: the norm of groups of which one is not finite."""

from __future__ import annotations

import pytest
import torch

from s2s_scale.backends.deepspeed.patches import _joined


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_group_that_is_not_finite_is_no_norm_of_one(bad):
    assert float(_joined([torch.tensor(3.0), torch.tensor(bad)])) == float("inf")


def test_norms_of_groups_are_joined():
    assert float(_joined([torch.tensor(3.0), torch.tensor(4.0)])) == 5.0
