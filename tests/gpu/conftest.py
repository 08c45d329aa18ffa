"""Tests of GPUs use those that their caller may use."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def the_callers_devices(pytestconfig, same_surroundings):
    name = "CUDA_VISIBLE_DEVICES"
    if name in pytestconfig.callers_environment:
        os.environ[name] = pytestconfig.callers_environment[name]
