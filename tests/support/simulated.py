"""A backend that says it is one of several processes, and computes like a plain one."""

from __future__ import annotations

from s2s_scale.backends.base import Backend
from s2s_scale.backends.collectives import Collectives


class SimulatedCollectives(Collectives):
    """One of several ranks, which keeps its values to itself."""

    rank = 0
    world_size = 1

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size  # type: ignore[misc]


class SimulatedBackend(Backend):
    """Process ``rank`` of ``world_size``, each with ``devices`` that share its batches."""

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, devices: int = 1, static: bool = True
    ) -> None:
        super().__init__("cpu")
        self.rows_multiple, self.static_shapes = devices, static
        self.simulated = SimulatedCollectives(rank, world_size)

    @property
    def collectives(self) -> Collectives:
        return self.simulated
