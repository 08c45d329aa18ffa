"""What the command line says of hosts and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wishes:
    """What the command line says of hosts and processes; None where it says nothing."""

    num_processes: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    launcher_runner: str | None = None
    max_restarts: int | None = None
    min_processes: int | None = None

    def given(self) -> list[str]:
        """The names of those that are given."""
        return [name for name, value in vars(self).items() if value is not None]


def wishes_of(options: Mapping[str, Any]) -> Wishes:
    """The launch flags among a verb's own options."""
    return Wishes(**{name: options[name] for name in vars(Wishes())})


def without_flags(words: Sequence[str], names: set[str]) -> list[str]:
    """The words without these flags and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if skip:
            skip = False
        elif word.startswith("--") and name in names:
            skip = "=" not in word
        else:
            kept.append(word)
    return kept
