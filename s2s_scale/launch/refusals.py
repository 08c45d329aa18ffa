"""Launch flags that a profile's launcher has no use for are errors."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from s2s_scale.errors import UserError, raise_problems
from s2s_scale.hostfile import choose, read_hostfile
from s2s_scale.launch.torchrun import TORCHRUN_PORT
from s2s_scale.launch.wishes import Wishes, without_flags
from s2s_scale.profiles import LauncherProfile

# Launcher -> the flags that it has a use for.
USES = {
    "none": {"num_processes"},
    "torchrun": {
        *("num_processes", "num_nodes", "node_rank", "master_addr", "master_port"),
        *("max_restarts", "min_processes"),
    },
    "deepspeed": {*vars(Wishes())},
}
RESTARTED = {"train", "evaluate"}
"""Verbs whose only process may be started again; on TPUs it may be one of several hosts'."""
ONLY_WITH_HOSTFILE = ("num_nodes", "node_rank", "launcher_runner")


def refuse_without_effect(profile: LauncherProfile, wishes: Wishes, words: Sequence[str]) -> None:
    """A flag that would do nothing is an error.

    Raises:
        UserError: with every such flag.
    """
    if profile.launcher == "none" and wishes.num_processes not in (None, 1):
        raise UserError(
            f"--num_processes {wishes.num_processes}: profile '{profile.name}' starts one process; "
            "choose a profile with a launcher, such as cpu-ddp or gpu-ddp"
        )
    if profile.launcher == "torchrun" and wishes.hostfile:
        raise UserError(_on_each_host(profile, wishes, words))
    uses = USES[profile.launcher]
    if profile.launcher == "none" and profile.device != "tpu" and {*words[:1]} & RESTARTED:
        uses = uses | {"max_restarts"}
    useless = [name for name in wishes.given() if name not in uses]
    if profile.launcher == "deepspeed" and not wishes.hostfile:
        useless += [name for name in wishes.given() if name in ONLY_WITH_HOSTFILE]
        why = "without --hostfile"
    else:
        why = f"with profile '{profile.name}' (launcher {profile.launcher})"
    problems = [f"--{name}: has no effect {why}; leave it out" for name in useless]
    if wishes.min_processes and not wishes.max_restarts and "min_processes" not in useless:
        problems.append("--min_processes: has no effect without --max_restarts; add it")
    raise_problems(problems)


def _on_each_host(profile: LauncherProfile, wishes: Wishes, words: Sequence[str]) -> str:
    """torchrun is started on each host by itself: the commands to type."""
    hosts = choose(
        read_hostfile(Path(str(wishes.hostfile))),
        num_nodes=wishes.num_nodes,
        num_processes=wishes.num_processes,
        include=wishes.include,
        exclude=wishes.exclude,
    )
    first = wishes.master_addr or next(iter(hosts))
    port = wishes.master_port or TORCHRUN_PORT
    kept = shlex.join(without_flags(words, {"hostfile", "include", "exclude", *USES["torchrun"]}))
    commands = [
        f"on {host}: s2s-scale {kept} --num_nodes {len(hosts)} --node_rank {number} "
        f"--num_processes {len(slots)} --master_addr {first} --master_port {port}"
        for number, (host, slots) in enumerate(hosts.items())
    ]
    return (
        f"--hostfile: profile '{profile.name}' is started by torchrun, which is started on each "
        f"host by itself; take a profile with launcher deepspeed, or type {'; '.join(commands)}"
    )
