"""One process on a CPU or a single GPU: the null object among the backends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from s2s_scale.backends.base import Backend


class LocalBackend(Backend):
    """Adds nothing to what torch does in one process."""

    def problems(self) -> Sequence[str]:
        ranks = os.environ.get("WORLD_SIZE", "1")
        if ranks != "1":
            return [
                f"WORLD_SIZE={ranks}: this backend runs one process; start it without a launcher, "
                "or unset WORLD_SIZE and RANK"
            ]
        return []

    def prepare_process(self) -> None:
        # An installed torch-xla would pull transformers and accelerate onto XLA code paths even
        # for a CPU or GPU run.
        os.environ.setdefault("USE_TORCH_XLA", "0")

    @property
    def data_rank(self) -> int:
        return 0

    @property
    def data_world_size(self) -> int:
        return 1

    def build_optimizer(
        self,
        optimizer_class: type[Optimizer],
        groups: list[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> Optimizer:
        return optimizer_class(groups, **options)

    def generation(self, model: nn.Module) -> AbstractContextManager[Mapping[str, Any]]:
        return _no_extra_keywords()

    def close(self) -> None:
        return None


@contextmanager
def _no_extra_keywords() -> Iterator[Mapping[str, Any]]:
    yield {}
