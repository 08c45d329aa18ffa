"""A backend that says it is one of several processes, and computes like a plain one."""

from __future__ import annotations

from s2s_scale.backends.collectives import Collectives
from s2s_scale.backends.local import LocalBackend


class SimulatedCollectives(Collectives):
    """One of several ranks, which keeps its values to itself."""

    rank = 0
    world_size = 1

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size  # type: ignore[misc]


class SimulatedBackend(LocalBackend):
    """Process ``rank`` of ``world_size``, each with ``devices`` that share its batches."""

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, devices: int = 1, static: bool = True
    ) -> None:
        super().__init__("cpu")
        self.devices, self.static = devices, static
        self.simulated = SimulatedCollectives(rank, world_size)

    @property
    def collectives(self) -> Collectives:
        return self.simulated

    @property
    def static_shapes(self) -> bool:
        return self.static

    @property
    def rows_multiple(self) -> int:
        return self.devices
