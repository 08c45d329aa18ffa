"""How a run is started, in data and in words: the command, its environment, each rank's place."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """Where one process runs: ``device`` is such as ``cpu`` or ``cuda:0``.

    ``slot``: its number on the host, where a host file gives one.
    """

    rank: int
    host: str
    device: str
    slot: str = ""


@dataclass(frozen=True)
class Launch:
    """How a run is started. ``in_process``: here, and ``command`` is what would do the same.

    ``environment`` is that of every rank, on every host. ``remote``: some ranks are on other hosts.
    ``notes`` are lines for the user.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    ranks: tuple[Rank, ...]
    in_process: bool
    remote: bool = False
    notes: tuple[str, ...] = ()

    @property
    def hosts(self) -> list[str]:
        """The hosts, each once, in the order of their ranks."""
        return list(dict.fromkeys(place.host for place in self.ranks))


def describe(launch: Launch, *, environ: Mapping[str, str]) -> str:
    """The text of ``--dry_run``: command, environment and rank-to-device map."""
    lines = ["command:", f"  {shlex.join(launch.command)}", "environment:"]
    for name, value in sorted(launch.environment.items()):
        shell = environ.get(name)
        replaces = f"   (replaces {shell!r} of the shell)" if shell not in (None, value) else ""
        lines.append(f"  {name}={shlex.quote(value)}{replaces}")
    if not launch.environment:
        lines.append("  nothing is changed")
    lines += [f"note: {note}" for note in launch.notes]
    lines.append("ranks:")
    lines += [f"  rank {place.rank}: {place.host}, {place.device}" for place in launch.ranks]
    return "\n".join(lines) + "\n"
