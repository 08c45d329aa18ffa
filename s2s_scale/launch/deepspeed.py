"""The words and variables for DeepSpeed's launcher, which starts ranks here or on other hosts."""

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
    NAMES,
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


def deepspeed(
    profile: LauncherProfile,
    words: tuple[str, ...],
    environ: Mapping[str, str],
    options: LaunchOptions,
) -> Launch:
    """DeepSpeed's launcher: on this host or, with a host file, on others.

    With ``--node_rank`` it is started on each host by itself, as by Slurm, and starts that host's
    ranks alone.
    """
    hosts = _hosts(profile, environ, options)
    many = options.hostfile is not None
    alone = options.node_rank is not None
    port, notes = rendezvous_port(options)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error"]
    command += _where(profile, options, hosts)
    command += ["--master_addr", options.master_addr] if options.master_addr else []
    command += ["--master_port", str(port), "--no_local_rank", *_script(options)]
    command += map(for_remote_shell, words) if many and not alone else words
    environment = rank_environment(profile, environ, max(map(len, hosts.values())))
    environment |= {"DS_ACCELERATOR": profile.device} | _for_runner(options, port)
    this = socket.gethostname()
    places = [(host, name) for host, names in hosts.items() for name in names]
    ranks = [
        Rank(rank, this if host == "localhost" else host, device_of(profile, name), name)
        for rank, (host, name) in enumerate(places)
    ]
    if options.node_rank is not None:
        own = list(hosts)[options.node_rank]
        ranks = [place for place in ranks if place.host == own]
    return Launch(
        command=tuple(command),
        environment=environment,
        ranks=tuple(ranks),
        in_process=False,
        remote=many and not alone,
        notes=notes,
    )


def _hosts(
    profile: LauncherProfile, environ: Mapping[str, str], options: LaunchOptions
) -> dict[str, list[str]]:
    """Host -> names of the devices on it that take a process each."""
    if options.hostfile is not None:
        slots = choose(read_hostfile(Path(options.hostfile)), **_choice(options))
        if options.node_rank is not None:
            _check_own_node(options, list(slots))
        return {host: [str(slot) for slot in numbers] for host, numbers in slots.items()}
    if options.include or options.exclude:
        here = {"localhost": list(range(len(all_local_devices(profile, environ, options))))}
        return {"localhost": [str(slot) for slot in choose(here, **_choice(options))["localhost"]]}
    return {"localhost": local_devices(profile, environ, options)}


def _choice(options: LaunchOptions) -> dict[str, Any]:
    names = ("num_nodes", "num_processes", "include", "exclude")
    return {name: getattr(options, name) for name in names}


def _check_own_node(options: LaunchOptions, hosts: Sequence[str]) -> None:
    missing = [name for name in ("master_addr", "master_port") if getattr(options, name) is None]
    if missing:
        raise UserError(
            f"--node_rank {options.node_rank}: the hosts are started one by one and must be told "
            "the same " + " and ".join(f"--{name}" for name in missing)
        )
    if not 0 <= int(options.node_rank or 0) < len(hosts):
        raise UserError(
            f"--node_rank {options.node_rank}: expected 0 to {len(hosts) - 1} ({', '.join(hosts)})"
        )


def _where(
    profile: LauncherProfile, options: LaunchOptions, hosts: Mapping[str, Sequence[str]]
) -> list[str]:
    """The flags that tell DeepSpeed's launcher which hosts and devices to use."""
    if options.hostfile is None:
        local = hosts["localhost"]
        if profile.device == "cpu":
            picked = ["--num_accelerators", str(len(local))]
        else:
            picked = ["--include", f"localhost:{','.join(local)}"]
        return ["--hostfile", os.devnull, *picked]
    flags = ["--hostfile", options.hostfile, *_chosen(options)]
    if options.node_rank is not None:
        return [*flags, "--no_ssh", "--node_rank", str(options.node_rank)]
    # One host in the file may be another one than this: it must be reached all the same.
    return [*flags, "--force_multi", "--no_ssh_check", "--launcher", _runner(options)]


def _runner(options: LaunchOptions) -> str:
    return options.launcher_runner or RUNNERS[0]


def _for_runner(options: LaunchOptions, port: int) -> dict[str, str]:
    """What ranks need that are started by MPI or Slurm, which leave out these variables."""
    if options.hostfile is None or options.node_rank is not None or _runner(options) not in NAMES:
        return {}
    address = {"MASTER_ADDR": options.master_addr} if options.master_addr else {}
    return {STARTED_BY: _runner(options), "MASTER_PORT": str(port), **address}


def _chosen(options: LaunchOptions) -> list[str]:
    """The flags that choose among the hosts, as DeepSpeed's launcher takes them."""
    names = {
        "num_nodes": "--num_nodes",
        "num_processes": "--num_accelerators",
        "include": "--include",
        "exclude": "--exclude",
    }
    return [
        word
        for name, flag in names.items()
        if getattr(options, name) is not None
        for word in (flag, str(getattr(options, name)))
    ]


def _script(options: LaunchOptions) -> tuple[str, ...]:
    """What each rank runs. DeepSpeed's slurm runner knows files only, no modules."""
    if options.launcher_runner == "slurm":
        return (str(Path(__file__).parents[1] / "__main__.py"),)
    return ("--module", "s2s_scale")


def for_remote_shell(word: str) -> str:
    """A word as DeepSpeed's launcher must be given it for a shell on another host to read it back.

    The launcher puts double quotes around a word with a space, and nothing around any other.
    """
    if " " in word:
        return re.sub(r"([$`\\])", r"\\\1", word)
    return shlex.quote(word)
