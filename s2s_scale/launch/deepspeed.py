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
    Rank,
    Wishes,
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
    wishes: Wishes,
) -> Launch:
    """DeepSpeed's launcher: on this host or, with a host file, on others.

    With ``--node_rank`` it is started on each host by itself, as by Slurm, and starts that host's
    ranks alone.
    """
    hosts = _hosts(profile, environ, wishes)
    many = wishes.hostfile is not None
    alone = wishes.node_rank is not None
    port, notes = rendezvous_port(wishes)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error"]
    command += _where(profile, wishes, hosts)
    command += ["--master_addr", wishes.master_addr] if wishes.master_addr else []
    command += ["--master_port", str(port), "--no_local_rank", *_script(wishes)]
    command += map(for_remote_shell, words) if many and not alone else words
    environment = rank_environment(profile, environ, max(map(len, hosts.values())))
    environment |= {"DS_ACCELERATOR": profile.device} | _for_runner(wishes, port)
    this = socket.gethostname()
    places = [(host, name) for host, names in hosts.items() for name in names]
    ranks = [
        Rank(rank, this if host == "localhost" else host, device_of(profile, name), name)
        for rank, (host, name) in enumerate(places)
    ]
    if wishes.node_rank is not None:
        own = list(hosts)[wishes.node_rank]
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
    profile: LauncherProfile, environ: Mapping[str, str], wishes: Wishes
) -> dict[str, list[str]]:
    """Host -> names of the devices on it that take a process each."""
    if wishes.hostfile is not None:
        slots = choose(read_hostfile(Path(wishes.hostfile)), **_choice(wishes))
        if wishes.node_rank is not None:
            _check_own_node(wishes, list(slots))
        return {host: [str(slot) for slot in numbers] for host, numbers in slots.items()}
    if wishes.include or wishes.exclude:
        here = {"localhost": list(range(len(all_local_devices(profile, environ, wishes))))}
        return {"localhost": [str(slot) for slot in choose(here, **_choice(wishes))["localhost"]]}
    return {"localhost": local_devices(profile, environ, wishes)}


def _choice(wishes: Wishes) -> dict[str, Any]:
    names = ("num_nodes", "num_processes", "include", "exclude")
    return {name: getattr(wishes, name) for name in names}


def _check_own_node(wishes: Wishes, hosts: Sequence[str]) -> None:
    missing = [name for name in ("master_addr", "master_port") if getattr(wishes, name) is None]
    if missing:
        raise UserError(
            f"--node_rank {wishes.node_rank}: the hosts are started one by one and must be told "
            "the same " + " and ".join(f"--{name}" for name in missing)
        )
    if not 0 <= int(wishes.node_rank or 0) < len(hosts):
        raise UserError(
            f"--node_rank {wishes.node_rank}: expected 0 to {len(hosts) - 1} ({', '.join(hosts)})"
        )


def _where(
    profile: LauncherProfile, wishes: Wishes, hosts: Mapping[str, Sequence[str]]
) -> list[str]:
    """The flags that tell DeepSpeed's launcher which hosts and devices to use."""
    if wishes.hostfile is None:
        local = hosts["localhost"]
        if profile.device == "cpu":
            picked = ["--num_accelerators", str(len(local))]
        else:
            picked = ["--include", f"localhost:{','.join(local)}"]
        return ["--hostfile", os.devnull, *picked]
    flags = ["--hostfile", wishes.hostfile, *_chosen(wishes)]
    if wishes.node_rank is not None:
        return [*flags, "--no_ssh", "--node_rank", str(wishes.node_rank)]
    # One host in the file may be another one than this: it must be reached all the same.
    return [*flags, "--force_multi", "--no_ssh_check", "--launcher", _runner(wishes)]


def _runner(wishes: Wishes) -> str:
    return wishes.launcher_runner or RUNNERS[0]


def _for_runner(wishes: Wishes, port: int) -> dict[str, str]:
    """What ranks need that are started by MPI or Slurm, which leave out these variables."""
    if wishes.hostfile is None or wishes.node_rank is not None or _runner(wishes) not in NAMES:
        return {}
    address = {"MASTER_ADDR": wishes.master_addr} if wishes.master_addr else {}
    return {STARTED_BY: _runner(wishes), "MASTER_PORT": str(port), **address}


def _chosen(wishes: Wishes) -> list[str]:
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
        if getattr(wishes, name) is not None
        for word in (flag, str(getattr(wishes, name)))
    ]


def _script(wishes: Wishes) -> tuple[str, ...]:
    """What each rank runs. DeepSpeed's slurm runner knows files only, no modules."""
    if wishes.launcher_runner == "slurm":
        return (str(Path(__file__).parents[1] / "__main__.py"),)
    return ("--module", "s2s_scale")


def for_remote_shell(word: str) -> str:
    """A word as DeepSpeed's launcher must be given it for a shell on another host to read it back.

    The launcher puts double quotes around a word with a space, and nothing around any other.
    """
    if " " in word:
        return re.sub(r"([$`\\])", r"\\\1", word)
    return shlex.quote(word)
