"""A profile and a command line become the command and environment that start a run.

Launch flags that a profile's launcher has no use for are errors.

A launch without a launcher: one process, or one rank of a launcher that runs already.

The words for torchrun, which is started on each host by itself.
"""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from s2s_scale.errors import UserError, raise_problems
from s2s_scale.launch.deepspeed import deepspeed
from s2s_scale.launch.hosts import choose, read_hostfile
from s2s_scale.launch.spec import (
    ALONE,
    Launch,
    LaunchOptions,
    Rank,
    device_of,
    local_devices,
    rank_environment,
    rendezvous_port,
    without_flags,
)
from s2s_scale.settings.profiles import LauncherProfile


def worker(profile: LauncherProfile, words: tuple[str, ...], environ: Mapping[str, str]) -> Launch:
    """One rank of a launcher: it has set the rank's variables, so only the profile's are added."""
    local = environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local}" if profile.device == "cuda" else _devices_of_one(profile)
    return Launch(
        command=(sys.executable, "-m", "s2s_scale", *words),
        environment=dict(profile.environment),
        ranks=(Rank(rank=int(environ["RANK"]), host=socket.gethostname(), device=device),),
        in_process=True,
    )


def none(
    profile: LauncherProfile,
    words: tuple[str, ...],
    environ: Mapping[str, str],
    options: LaunchOptions,
) -> Launch:
    """No launcher: one process, which is this one unless it may be started again.

    It sees one CUDA device only, the first of those it may use: given several, transformers would
    wrap the model in ``DataParallel``.
    """
    environment = dict(profile.environment)
    device = _devices_of_one(profile)
    if profile.device == "cuda":
        allowed = {**environ, **environment}.get("CUDA_VISIBLE_DEVICES", "0")
        first = allowed.split(",")[0].strip()
        environment["CUDA_VISIBLE_DEVICES"] = first
        device = f"cuda:{first}"
    apart = bool(options.max_restarts) and ALONE not in environ
    return Launch(
        command=(sys.executable, "-m", "s2s_scale", *words),
        environment={**environment, ALONE: "1"} if apart else environment,
        ranks=(Rank(rank=0, host=socket.gethostname(), device=device),),
        in_process=not apart,
    )


def _devices_of_one(profile: LauncherProfile) -> str:
    """What one process drives: the CPU, or all devices of its host in the profile's mesh."""
    if not profile.mesh:
        return profile.device
    axes = ", ".join(f"{axis} {n if n > 0 else 'all'}" for axis, n in profile.mesh.items())
    if profile.device == "tpu":
        return f"all TPU chips of the host, mesh {axes}"
    return f"{profile.environment.get('CPU_NUM_DEVICES', '1')} virtual XLA devices, mesh {axes}"


TORCHRUN_PORT = 29500


def torchrun(
    profile: LauncherProfile,
    words: tuple[str, ...],
    environ: Mapping[str, str],
    options: LaunchOptions,
) -> Launch:
    """torchrun on this host; with ``--num_nodes`` as one of the hosts on which it is started."""
    nodes, node = options.num_nodes or 1, options.node_rank or 0
    _check_node(options)
    places = local_devices(profile, environ, options)
    notes: tuple[str, ...] = ()
    rendezvous = ["--standalone"]
    if nodes > 1 or options.master_port or options.master_addr:
        port = options.master_port or TORCHRUN_PORT
        if nodes == 1:
            port, notes = rendezvous_port(options)
        address = options.master_addr or "127.0.0.1"
        rendezvous = [f"--nnodes={nodes}", f"--node-rank={node}"]
        rendezvous += [f"--master-addr={address}", f"--master-port={port}"]
    program = (sys.executable, "-m", "s2s_scale.resilience.torchrun")
    flags = (*rendezvous, f"--nproc-per-node={len(places)}", "-m", "s2s_scale")
    host = socket.gethostname()
    return Launch(
        command=(*program, *flags, *words),
        environment=rank_environment(profile, environ, len(places)),
        ranks=tuple(
            Rank(rank=node * len(places) + number, host=host, device=device_of(profile, name))
            for number, name in enumerate(places)
        ),
        in_process=False,
        notes=notes,
    )


def _check_node(options: LaunchOptions) -> None:
    """``--num_nodes`` with torchrun needs to know which of them this is, and where the first is."""
    if (options.num_nodes or 1) == 1:
        return
    missing = [name for name in ("node_rank", "master_addr") if getattr(options, name) is None]
    if missing:
        raise UserError(
            f"--num_nodes {options.num_nodes}: torchrun is started on each host and also needs "
            + " and ".join(f"--{name}" for name in missing)
        )
    if not 0 <= int(options.node_rank or 0) < int(options.num_nodes or 1):
        raise UserError(
            f"--node_rank {options.node_rank}: expected 0 to {int(options.num_nodes or 1) - 1}"
        )


# Launcher -> the flags that it has a use for.
USES = {
    "none": {"num_processes"},
    "torchrun": {
        *("num_processes", "num_nodes", "node_rank", "master_addr", "master_port"),
        *("max_restarts", "min_processes"),
    },
    "deepspeed": {*vars(LaunchOptions())},
}
RESTARTED = {"train", "evaluate"}
"""Verbs whose only process may be started again; on TPUs it may be one of several hosts'."""
ONLY_WITH_HOSTFILE = ("num_nodes", "node_rank", "launcher_runner")


def refuse_without_effect(
    profile: LauncherProfile, options: LaunchOptions, words: Sequence[str]
) -> None:
    """A flag that would do nothing is an error.

    Raises:
        UserError: with every such flag.
    """
    if profile.launcher == "none" and options.num_processes not in (None, 1):
        raise UserError(
            f"--num_processes {options.num_processes}: profile '{profile.name}' starts one "
            "process; choose a profile with a launcher, such as cpu-ddp or gpu-ddp"
        )
    if profile.launcher == "torchrun" and options.hostfile:
        raise UserError(_on_each_host(profile, options, words))
    uses = USES[profile.launcher]
    if profile.launcher == "none" and profile.device != "tpu" and {*words[:1]} & RESTARTED:
        uses = uses | {"max_restarts"}
    useless = [name for name in options.given() if name not in uses]
    if profile.launcher == "deepspeed" and not options.hostfile:
        useless += [name for name in options.given() if name in ONLY_WITH_HOSTFILE]
        why = "without --hostfile"
    else:
        why = f"with profile '{profile.name}' (launcher {profile.launcher})"
    problems = [f"--{name}: has no effect {why}; leave it out" for name in useless]
    if options.min_processes and not options.max_restarts and "min_processes" not in useless:
        problems.append("--min_processes: has no effect without --max_restarts; add it")
    raise_problems(problems)


def _on_each_host(profile: LauncherProfile, options: LaunchOptions, words: Sequence[str]) -> str:
    """torchrun is started on each host by itself: the commands to type."""
    hosts = choose(
        read_hostfile(Path(str(options.hostfile))),
        num_nodes=options.num_nodes,
        num_processes=options.num_processes,
        include=options.include,
        exclude=options.exclude,
    )
    first = options.master_addr or next(iter(hosts))
    port = options.master_port or TORCHRUN_PORT
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


Planner = Callable[[LauncherProfile, tuple[str, ...], Mapping[str, str], LaunchOptions], Launch]

# One entry per launcher that a profile may name: what it makes of a profile and a command line.
LAUNCHERS: dict[str, Planner] = {"none": none, "torchrun": torchrun, "deepspeed": deepspeed}


def plan_launch(
    profile: LauncherProfile,
    words: Sequence[str],
    *,
    environ: Mapping[str, str],
    options: LaunchOptions | None = None,
) -> Launch:
    """How ``s2s-scale WORDS…`` is started under ``profile``; ``words`` begin with the verb.

    Inside a launcher (``RANK`` set) this process is one of its ranks and runs here. Touches no
    other host.

    Raises:
        UserError: more processes than devices, hosts that are not there, or a flag that this
            profile's launcher has no use for.
    """
    if environ.get("RANK"):
        return worker(profile, tuple(words), environ)
    options = options or LaunchOptions()
    refuse_without_effect(profile, options, tuple(words))
    return LAUNCHERS[profile.launcher](profile, tuple(words), environ, options)
