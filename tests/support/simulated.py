"""A backend that says it is one of several processes, and computes like a plain one."""

from __future__ import annotations

from s2s_scale.backends.local import LocalBackend


class SimulatedBackend(LocalBackend):
    """Process ``rank`` of ``world_size``, each with ``devices`` that share its batches."""

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, devices: int = 1, static: bool = True
    ) -> None:
        super().__init__("cpu")
        self.rank, self.processes, self.devices, self.static = rank, world_size, devices, static

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def data_world_size(self) -> int:
        return self.processes

    @property
    def static_shapes(self) -> bool:
        return self.static

    @property
    def rows_multiple(self) -> int:
        return self.devices
