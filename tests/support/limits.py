"""Limits that the system sets on this process, for tests."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limited(what: int, size: int) -> Iterator[None]:
    """Let ``what``, such as ``resource.RLIMIT_AS``, be at most ``size`` bytes for the block."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)
