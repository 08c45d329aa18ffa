"""A launch as data: the launch options, the command, its environment, and each rank's device.

Also what every launcher needs to know of this host (its devices, its share of the cores, a free
port), and the environment variables that give a process its rank, whichever program started it.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from s2s_scale.errors import UserError
from s2s_scale.settings.commands import LaunchOptions as LaunchOptions
from s2s_scale.settings.profiles import AUTO, LauncherProfile, cuda_devices
from s2s_scale.utils import free_port


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
    """How a run is started.

    ``environment``: the variables to set for every rank, on every host. ``in_process``: the run
    takes place in this process, and ``command`` is what would do the same. ``remote``: some ranks
    are on other hosts. ``notes``: lines for the user.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    ranks: tuple[Rank, ...]
    in_process: bool
    remote: bool = False
    notes: tuple[str, ...] = ()

    @property
    def hosts(self) -> list[str]:
        """The hosts, each once, in rank order."""
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


def without_flags(argv: Sequence[str], names: set[str]) -> list[str]:
    """The arguments without these flags and their values; ``names`` have no leading dashes."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if skip:
            skip = False
        elif argument.startswith("--") and name in names:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept


DEFAULT_CPU_PROCESSES = 2


def local_devices(
    profile: LauncherProfile, environ: Mapping[str, str], options: LaunchOptions
) -> list[str]:
    """Names of the devices on this host that get one process each, as ``all_local_devices``."""
    devices = all_local_devices(profile, environ, options)
    wanted = options.num_processes or profile.processes
    return devices if wanted == AUTO else devices[: int(wanted)]


def all_local_devices(
    profile: LauncherProfile, environ: Mapping[str, str], options: LaunchOptions
) -> list[str]:
    """Names of all devices on this host; on a CPU, "cpu" for each process that is wanted.

    Raises:
        UserError: more processes are wanted than there are CUDA devices.
    """
    wanted = options.num_processes or profile.processes
    if profile.device == "cpu":
        return ["cpu"] * (DEFAULT_CPU_PROCESSES if wanted == AUTO else int(wanted))
    devices = cuda_devices({**environ, **profile.environment})
    if wanted != AUTO and int(wanted) > len(devices):
        raise UserError(
            f"{wanted} processes, but {len(devices)} CUDA device(s) are visible; use "
            f"--num_processes {max(1, len(devices))} or fewer"
        )
    return devices


def device_of(profile: LauncherProfile, name: str) -> str:
    """The device with this name, as torch calls it."""
    return "cpu" if profile.device == "cpu" else f"{profile.device}:{name}"


def rank_environment(
    profile: LauncherProfile, environ: Mapping[str, str], per_host: int
) -> dict[str, str]:
    """The profile's variables, and OMP_NUM_THREADS unless the profile or the shell sets it.

    It divides this host's cores among the ranks of a host: torch would use all cores in every rank,
    and torchrun by itself gives each rank one.
    """
    environment = dict(profile.environment)
    if "OMP_NUM_THREADS" not in {**environ, **environment}:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // max(1, per_host)))
    return environment


def rendezvous_port(options: LaunchOptions) -> tuple[int, tuple[str, ...]]:
    """The port of the ranks' rendezvous, and notes for the user.

    ``--master_port`` if it is free here, or on another host (``--master_addr``); else a free one.
    """
    wanted = options.master_port
    if wanted is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", wanted))
                return wanted, ()
            except OSError:
                if options.master_addr:
                    return wanted, ()
    free = free_port()
    if wanted is None:
        return free, ()
    return free, (f"--master_port {wanted}: is in use; port {free} is used instead",)


STARTED_BY = "S2S_SCALE_STARTED_BY"
"""Environment variable: the runner whose variables give the rank. Without it they are ignored: a
batch script under Slurm is not a rank, but has SLURM_PROCID."""

ALONE = "S2S_SCALE_ALONE"
"""Environment variable: this is a run's only process, which its starter restarts if it dies."""

RANK_VARIABLES = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mvapich": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
}
"""Runner -> its own names for RANK, LOCAL_RANK and WORLD_SIZE."""


def set_rank_env(environ: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE from the runner's own variables, if RANK is not set."""
    names = RANK_VARIABLES.get(environ.get(STARTED_BY, ""))
    if names is None or "RANK" in environ or names[0] not in environ:
        return
    for ours, theirs in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), names, strict=True):
        if theirs in environ:
            environ[ours] = environ[theirs]


def reporting_rank(environ: Mapping[str, str]) -> int | None:
    """The rank as which this process reports that it is done; None if nobody waits for that."""
    rank = environ.get("RANK") or ("0" if ALONE in environ else "")
    return int(rank) if rank.isdigit() else None
