"""Turns a profile and a command line into the command, environment and ranks that start a run.

One function per launcher; ``plan_launch`` chooses. DeepSpeed's launcher is in ``deepspeed``.
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

TORCHRUN_PORT = 29500
USED_OPTIONS = {
    "none": {"num_processes"},
    "torchrun": {
        *("num_processes", "num_nodes", "node_rank", "master_addr", "master_port"),
        *("max_restarts", "min_processes"),
    },
    "deepspeed": {*vars(LaunchOptions())},
}
"""Launcher -> the launch options that have an effect with it."""
NEEDS_HOSTFILE = ("num_nodes", "node_rank", "launcher_runner")
RESTARTABLE = {"train", "evaluate"}
"""Commands whose only process may be restarted; on TPUs it may be one of several hosts'."""


def plan_launch(
    profile: LauncherProfile,
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    options: LaunchOptions | None = None,
) -> Launch:
    """How ``s2s-scale ARGV…`` is started under ``profile``; ``argv`` begins with the command.

    Inside a launcher (``RANK`` is set) this process is one of its ranks and runs here. Contacts no
    other host.

    Raises:
        UserError: more processes than devices, unknown hosts, or an option that has no effect with
            this profile's launcher.
    """
    if environ.get("RANK"):
        return worker(profile, tuple(argv), environ)
    options = options or LaunchOptions()
    check_unused_options(profile, options, tuple(argv))
    return LAUNCHERS[profile.launcher](profile, tuple(argv), environ, options)


def worker(profile: LauncherProfile, argv: tuple[str, ...], environ: Mapping[str, str]) -> Launch:
    """One rank of a launcher, which has set the rank's variables: only the profile's are added."""
    local = environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local}" if profile.device == "cuda" else _single_process_device(profile)
    return Launch(
        command=(sys.executable, "-m", "s2s_scale", *argv),
        environment=dict(profile.environment),
        ranks=(Rank(rank=int(environ["RANK"]), host=socket.gethostname(), device=device),),
        in_process=True,
    )


def none(
    profile: LauncherProfile,
    argv: tuple[str, ...],
    environ: Mapping[str, str],
    options: LaunchOptions,
) -> Launch:
    """No launcher: one process, which is this one unless it may be restarted.

    Only one CUDA device is visible to it, the first of those that are visible here: with several,
    transformers would wrap the model in ``DataParallel``.
    """
    environment = dict(profile.environment)
    device = _single_process_device(profile)
    if profile.device == "cuda":
        visible = {**environ, **environment}.get("CUDA_VISIBLE_DEVICES", "0")
        first = visible.split(",")[0].strip()
        environment["CUDA_VISIBLE_DEVICES"] = first
        device = f"cuda:{first}"
    restartable = bool(options.max_restarts) and ALONE not in environ
    return Launch(
        command=(sys.executable, "-m", "s2s_scale", *argv),
        environment={**environment, ALONE: "1"} if restartable else environment,
        ranks=(Rank(rank=0, host=socket.gethostname(), device=device),),
        in_process=not restartable,
    )


def _single_process_device(profile: LauncherProfile) -> str:
    """What one process drives: the CPU, or all devices of its host in the profile's mesh."""
    if not profile.mesh:
        return profile.device
    axes = ", ".join(f"{axis} {n if n > 0 else 'all'}" for axis, n in profile.mesh.items())
    if profile.device == "tpu":
        return f"all TPU chips of the host, mesh {axes}"
    return f"{profile.environment.get('CPU_NUM_DEVICES', '1')} virtual XLA devices, mesh {axes}"


def torchrun(
    profile: LauncherProfile,
    argv: tuple[str, ...],
    environ: Mapping[str, str],
    options: LaunchOptions,
) -> Launch:
    """torchrun on this host; with ``--num_nodes`` it is started on each of the hosts by itself."""
    nodes, node = options.num_nodes or 1, options.node_rank or 0
    if nodes > 1:
        _check_node(options, nodes)
    devices = local_devices(profile, environ, options)
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
    flags = (*rendezvous, f"--nproc-per-node={len(devices)}", "-m", "s2s_scale")
    host = socket.gethostname()
    return Launch(
        command=(*program, *flags, *argv),
        environment=rank_environment(profile, environ, len(devices)),
        ranks=tuple(
            Rank(rank=node * len(devices) + number, host=host, device=device_of(profile, name))
            for number, name in enumerate(devices)
        ),
        in_process=False,
        notes=notes,
    )


def _check_node(options: LaunchOptions, nodes: int) -> None:
    missing = [name for name in ("node_rank", "master_addr") if getattr(options, name) is None]
    if missing:
        raise UserError(
            f"--num_nodes {nodes}: torchrun is started on each host and also needs "
            + " and ".join(f"--{name}" for name in missing)
        )
    if not 0 <= int(options.node_rank or 0) < nodes:
        raise UserError(f"--node_rank {options.node_rank}: expected 0 to {nodes - 1}")


def check_unused_options(
    profile: LauncherProfile, options: LaunchOptions, argv: Sequence[str]
) -> None:
    """Check that every launch option that is given has an effect.

    Raises:
        UserError: with every option that has none.
    """
    if profile.launcher == "none" and options.num_processes not in (None, 1):
        raise UserError(
            f"--num_processes {options.num_processes}: profile '{profile.name}' starts one "
            "process; choose a profile with a launcher, such as cpu-ddp or gpu-ddp"
        )
    if profile.launcher == "torchrun" and options.hostfile:
        raise UserError(_commands_per_host(profile, options, argv))
    used = USED_OPTIONS[profile.launcher]
    if profile.launcher == "none" and profile.device != "tpu" and {*argv[:1]} & RESTARTABLE:
        used = used | {"max_restarts"}
    unused = [name for name in options.given() if name not in used]
    if profile.launcher == "deepspeed" and not options.hostfile:
        unused += [name for name in options.given() if name in NEEDS_HOSTFILE]
        why = "without --hostfile"
    else:
        why = f"with profile '{profile.name}' (launcher {profile.launcher})"
    problems = [f"--{name}: has no effect {why}; leave it out" for name in unused]
    if options.min_processes and not options.max_restarts and "min_processes" not in unused:
        problems.append("--min_processes: has no effect without --max_restarts; add it")
    raise_problems(problems)


def _commands_per_host(
    profile: LauncherProfile, options: LaunchOptions, argv: Sequence[str]
) -> str:
    """The error for a host file with torchrun: it lists the commands to type on each host."""
    hosts = choose(
        read_hostfile(Path(str(options.hostfile))),
        num_nodes=options.num_nodes,
        num_processes=options.num_processes,
        include=options.include,
        exclude=options.exclude,
    )
    first = options.master_addr or next(iter(hosts))
    port = options.master_port or TORCHRUN_PORT
    replaced = {"hostfile", "include", "exclude", *USED_OPTIONS["torchrun"]}
    kept = shlex.join(without_flags(argv, replaced))
    commands = [
        f"on {host}: s2s-scale {kept} --num_nodes {len(hosts)} --node_rank {number} "
        f"--num_processes {len(slots)} --master_addr {first} --master_port {port}"
        for number, (host, slots) in enumerate(hosts.items())
    ]
    return (
        f"--hostfile: profile '{profile.name}' is started by torchrun, which is started on each "
        f"host by itself; use a profile with launcher deepspeed, or type {'; '.join(commands)}"
    )


Planner = Callable[[LauncherProfile, tuple[str, ...], Mapping[str, str], LaunchOptions], Launch]

LAUNCHERS: dict[str, Planner] = {"none": none, "torchrun": torchrun, "deepspeed": deepspeed}
"""One entry per launcher that a profile may name."""
