"""How a run is started, in data and in words: the command, its environment, each rank's place.

What the command line says of hosts and processes.

What this host gives to a launch: its devices, a share of its cores, a port.

The variables by which a rank knows itself, whichever program has started it.
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


PROCESSES_ON_A_CPU = 2


def local_devices(
    profile: LauncherProfile, environ: Mapping[str, str], options: LaunchOptions
) -> list[str]:
    """Names of the devices on this host that take a process each; "cpu" for each on a CPU."""
    everything = all_local_devices(profile, environ, options)
    wanted = options.num_processes or profile.processes
    return everything if wanted == AUTO else everything[: int(wanted)]


def all_local_devices(
    profile: LauncherProfile, environ: Mapping[str, str], options: LaunchOptions
) -> list[str]:
    """Likewise, of which ``local_devices`` takes the first so many; on a CPU as many as wanted.

    Raises:
        UserError: more processes than CUDA devices.
    """
    wanted = options.num_processes or profile.processes
    if profile.device == "cpu":
        return ["cpu"] * (PROCESSES_ON_A_CPU if wanted == AUTO else int(wanted))
    devices = cuda_devices({**environ, **profile.environment})
    if wanted != AUTO and int(wanted) > len(devices):
        raise UserError(
            f"{wanted} processes, but {len(devices)} CUDA device(s) may be used; give "
            f"--num_processes {max(1, len(devices))} or fewer"
        )
    return devices


def device_of(profile: LauncherProfile, name: str) -> str:
    """The device with this name, as torch calls it."""
    return "cpu" if profile.device == "cpu" else f"{profile.device}:{name}"


def rank_environment(
    profile: LauncherProfile, environ: Mapping[str, str], per_host: int
) -> dict[str, str]:
    """The profile's variables; the cores are divided among a host's ranks unless something says so.

    torch would take all of them in every rank, and torchrun alone gives each rank one.
    """
    environment = dict(profile.environment)
    if "OMP_NUM_THREADS" not in {**environ, **environment}:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // max(1, per_host)))
    return environment


def rendezvous_port(options: LaunchOptions) -> tuple[int, tuple[str, ...]]:
    """The port on which the ranks find each other, and what there is to say of it."""
    wanted = options.master_port
    if wanted is not None and (_is_free(wanted) or options.master_addr):
        return wanted, ()
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = int(probe.getsockname()[1])
    if wanted is None:
        return free, ()
    return free, (f"--master_port {wanted}: is in use; port {free} is taken instead",)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


STARTED_BY = "S2S_SCALE_STARTED_BY"
"""Environment variable: the runner whose variables name the rank. Without it they are left alone:
a batch script under Slurm is no rank, but has SLURM_PROCID."""

ALONE = "S2S_SCALE_ALONE"
"""Environment variable: this is a run's only process, which another one starts again if it dies."""

# Runner -> what it calls RANK, LOCAL_RANK and WORLD_SIZE.
NAMES = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mvapich": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
}


def set_rank_env(environ: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE from the runner's own names, where it did not."""
    names = NAMES.get(environ.get(STARTED_BY, ""))
    if names is None or "RANK" in environ or names[0] not in environ:
        return
    for ours, theirs in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), names, strict=True):
        if theirs in environ:
            environ[ours] = environ[theirs]


def reporting_rank(environ: Mapping[str, str]) -> int | None:
    """As which rank this process says that it is done; None where nobody waits for that."""
    rank = environ.get("RANK") or ("0" if ALONE in environ else "")
    return int(rank) if rank.isdigit() else None
