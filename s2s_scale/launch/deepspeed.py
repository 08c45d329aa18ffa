"""Arguments and environment for DeepSpeed's launcher, which starts ranks here or on other hosts."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s_scale.errors import UserError
from s2s_scale.launch.hosts import choose, read_hostfile
from s2s_scale.launch.spec import (
    RANK_VARIABLES,
    STARTED_BY,
    Launch,
    LaunchOptions,
    Rank,
    all_local_devices,
    device_of,
    local_devices,
    rank_environment,
    rendezvous_port,
)
from s2s_scale.settings.profiles import LauncherProfile

RUNNERS = ("pdsh", "openmpi", "mpich", "mvapich", "slurm", "impi")
SELECTION = {
    "num_nodes": "--num_nodes",
    "num_processes": "--num_accelerators",
    "include": "--include",
    "exclude": "--exclude",
}
"""Our options that choose among the hosts of a file -> the same for DeepSpeed's launcher."""


def deepspeed(
    profile: LauncherProfile,
    argv: tuple[str, ...],
    environ: Mapping[str, str],
    options: LaunchOptions,
) -> Launch:
    """DeepSpeed's launcher: on this host or, with a host file, on others.

    With ``--node_rank`` it is started on each host by itself, as by Slurm, and starts the ranks of
    that host alone.
    """
    hosts = _choose_hosts(profile, environ, options)
    remote = options.hostfile is not None and options.node_rank is None
    runner = options.launcher_runner or RUNNERS[0]
    port, notes = rendezvous_port(options)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error"]
    command += _placement(profile, options, hosts, runner)
    command += ["--master_addr", options.master_addr] if options.master_addr else []
    command += ["--master_port", str(port), "--no_local_rank"]
    if options.launcher_runner == "slurm":  # it can start a file, but no module
        command.append(str(Path(__file__).parents[1] / "__main__.py"))
    else:
        command += ["--module", "s2s_scale"]
    command += map(for_remote_shell, argv) if remote else argv
    environment = rank_environment(profile, environ, max(map(len, hosts.values())))
    environment["DS_ACCELERATOR"] = profile.device
    if remote and runner in RANK_VARIABLES:  # MPI and Slurm do not set these for the ranks
        environment |= {STARTED_BY: runner, "MASTER_PORT": str(port)}
        environment |= {"MASTER_ADDR": options.master_addr} if options.master_addr else {}
    here = socket.gethostname()
    devices = [(host, name) for host, names in hosts.items() for name in names]
    ranks = [
        Rank(rank, here if host == "localhost" else host, device_of(profile, name), name)
        for rank, (host, name) in enumerate(devices)
    ]
    if options.node_rank is not None:
        own = list(hosts)[options.node_rank]
        ranks = [place for place in ranks if place.host == own]
    return Launch(
        command=tuple(command),
        environment=environment,
        ranks=tuple(ranks),
        in_process=False,
        remote=remote,
        notes=notes,
    )


def _choose_hosts(
    profile: LauncherProfile, environ: Mapping[str, str], options: LaunchOptions
) -> dict[str, list[str]]:
    """Host -> names of the devices on it that get one process each."""
    selection: dict[str, Any] = {name: getattr(options, name) for name in SELECTION}
    if options.hostfile is not None:
        slots = choose(read_hostfile(Path(options.hostfile)), **selection)
        if options.node_rank is not None:
            _check_node(options, list(slots))
        return {host: [str(slot) for slot in numbers] for host, numbers in slots.items()}
    if options.include or options.exclude:
        here = {"localhost": list(range(len(all_local_devices(profile, environ, options))))}
        return {"localhost": [str(slot) for slot in choose(here, **selection)["localhost"]]}
    return {"localhost": local_devices(profile, environ, options)}


def _check_node(options: LaunchOptions, hosts: Sequence[str]) -> None:
    missing = [name for name in ("master_addr", "master_port") if getattr(options, name) is None]
    if missing:
        raise UserError(
            f"--node_rank {options.node_rank}: each host is started by itself and needs the same "
            + " and ".join(f"--{name}" for name in missing)
        )
    if not 0 <= int(options.node_rank or 0) < len(hosts):
        raise UserError(
            f"--node_rank {options.node_rank}: expected 0 to {len(hosts) - 1} ({', '.join(hosts)})"
        )


def _placement(
    profile: LauncherProfile,
    options: LaunchOptions,
    hosts: Mapping[str, Sequence[str]],
    runner: str,
) -> list[str]:
    """The flags that tell DeepSpeed's launcher which hosts and devices to use."""
    if options.hostfile is None:
        devices = hosts["localhost"]
        if profile.device == "cpu":
            chosen = ["--num_accelerators", str(len(devices))]
        else:
            chosen = ["--include", f"localhost:{','.join(devices)}"]
        return ["--hostfile", os.devnull, *chosen]
    flags = ["--hostfile", options.hostfile]
    for name, flag in SELECTION.items():
        if getattr(options, name) is not None:
            flags += [flag, str(getattr(options, name))]
    if options.node_rank is not None:
        return [*flags, "--no_ssh", "--node_rank", str(options.node_rank)]
    # --force_multi: the only host in the file may be another one than this.
    return [*flags, "--force_multi", "--no_ssh_check", "--launcher", runner]


def for_remote_shell(argument: str) -> str:
    """Quote an argument so that a shell on another host reads it back from DeepSpeed's launcher.

    The launcher puts double quotes around an argument with a space, and nothing around any other.
    """
    if " " in argument:
        return re.sub(r"([$`\\])", r"\\\1", argument)
    return shlex.quote(argument)
