"""What must be set in a process before it uses XLA devices; used by ``xla`` alone."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor

CACHE_VARIABLE = "XLA_PERSISTENT_CACHE_PATH"
"""Folder of compiled graphs, read by torch-xla itself; empty: none are kept."""


def keep_compiled_graphs() -> None:
    """A restarted run finds its graphs in a folder of the cache."""
    if CACHE_VARIABLE not in os.environ:
        base = os.environ.get("S2S_SCALE_CACHE") or Path("~/.cache/s2s_scale").expanduser()
        os.environ[CACHE_VARIABLE] = str(Path(base, "xla"))
    if os.environ[CACHE_VARIABLE]:
        Path(os.environ[CACHE_VARIABLE]).mkdir(parents=True, exist_ok=True)
    else:
        del os.environ[CACHE_VARIABLE]


def masks_without_look() -> None:
    """Have transformers build attention masks without looking into them.

    It leaves a mask out where no position is a pad: for that it waits for the device at each
    forward pass, and a batch without pads is another graph. It does not look where it is traced.
    """
    masking_utils: Any = importlib.import_module("transformers.masking_utils")
    looks_unless = masking_utils.is_tracing

    def is_tracing(tensor: Any = None) -> bool:
        on_xla = isinstance(tensor, Tensor) and tensor.device.type == "xla"
        return on_xla or bool(looks_unless(tensor))

    if looks_unless.__module__ != __name__:
        masking_utils.is_tracing = is_tracing


def tell_rank(rank: int) -> None:
    """transformers lets process 0 alone write files and show progress."""
    from accelerate import PartialState

    state: Any = PartialState()
    state.process_index = rank
