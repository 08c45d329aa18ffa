"""What this host gives to a launch: its devices, a share of its cores, a port."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from s2s_scale.errors import UserError
from s2s_scale.launch.wishes import Wishes
from s2s_scale.profiles import AUTO, LauncherProfile, cuda_devices

PROCESSES_ON_A_CPU = 2


def local_devices(
    profile: LauncherProfile, environ: Mapping[str, str], wishes: Wishes
) -> list[str]:
    """Names of the devices on this host that take a process each; "cpu" for each on a CPU."""
    everything = all_local_devices(profile, environ, wishes)
    wanted = wishes.num_processes or profile.processes
    return everything if wanted == AUTO else everything[: int(wanted)]


def all_local_devices(
    profile: LauncherProfile, environ: Mapping[str, str], wishes: Wishes
) -> list[str]:
    """Likewise, of which ``local_devices`` takes the first so many; on a CPU as many as wanted.

    Raises:
        UserError: more processes than CUDA devices.
    """
    wanted = wishes.num_processes or profile.processes
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


def rendezvous_port(wishes: Wishes) -> tuple[int, tuple[str, ...]]:
    """The port on which the ranks find each other, and what there is to say of it."""
    wanted = wishes.master_port
    if wanted is not None and (_is_free(wanted) or wishes.master_addr):
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
