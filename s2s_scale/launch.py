"""A profile and a command line become the command and environment that start a run."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from s2s_scale.profiles import LauncherProfile


@dataclass(frozen=True)
class Rank:
    """Where one process runs: ``device`` is such as ``cpu`` or ``cuda:0``."""

    rank: int
    host: str
    device: str


@dataclass(frozen=True)
class Launch:
    """How a run is started. ``in_process``: here, and ``command`` is what would do the same."""

    command: tuple[str, ...]
    environment: dict[str, str]
    ranks: tuple[Rank, ...]
    in_process: bool


def plan_launch(
    profile: LauncherProfile, words: Sequence[str], *, environ: Mapping[str, str]
) -> Launch:
    """How ``s2s-scale WORDS…`` is started under ``profile``; ``words`` begin with the verb."""
    return LAUNCHERS[profile.launcher](profile, tuple(words), environ)


def _none(profile: LauncherProfile, words: tuple[str, ...], environ: Mapping[str, str]) -> Launch:
    """No launcher: one process, which is this one.

    It sees one CUDA device only, the first of those it may use: given several, transformers would
    wrap the model in ``DataParallel``.
    """
    environment = dict(profile.environment)
    device = "cpu"
    if profile.device == "cuda":
        allowed = {**environ, **environment}.get("CUDA_VISIBLE_DEVICES", "0")
        first = allowed.split(",")[0].strip()
        environment["CUDA_VISIBLE_DEVICES"] = first
        device = f"cuda:{first}"
    return Launch(
        command=(sys.executable, "-m", "s2s_scale", *words),
        environment=environment,
        ranks=(Rank(rank=0, host=socket.gethostname(), device=device),),
        in_process=True,
    )


# One entry per launcher that a profile may name: what it makes of a profile and a command line.
LAUNCHERS: dict[str, Callable[[LauncherProfile, tuple[str, ...], Mapping[str, str]], Launch]] = {
    "none": _none
}


def describe(launch: Launch, *, environ: Mapping[str, str]) -> str:
    """The text of ``--dry_run``: command, environment and rank-to-device map."""
    lines = ["command:", f"  {shlex.join(launch.command)}", "environment:"]
    for name, value in sorted(launch.environment.items()):
        shell = environ.get(name)
        replaces = f"   (replaces {shell!r} of the shell)" if shell not in (None, value) else ""
        lines.append(f"  {name}={shlex.quote(value)}{replaces}")
    if not launch.environment:
        lines.append("  nothing is changed")
    lines.append("ranks:")
    lines += [f"  rank {place.rank}: {place.host}, {place.device}" for place in launch.ranks]
    return "\n".join(lines) + "\n"
