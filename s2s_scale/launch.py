"""A profile and a command line become the command and environment that start a run."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2s_scale.config import DEFAULT_GRACE_SECONDS
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.hostfile import choose, read_hostfile
from s2s_scale.profiles import AUTO, LauncherProfile, cuda_devices
from s2s_scale.rank_variables import ALONE, NAMES, STARTED_BY
from s2s_scale.supervision import Ended, supervise


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


@dataclass(frozen=True)
class Wishes:
    """What the command line says of hosts and processes; None where it says nothing."""

    num_processes: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    launcher_runner: str | None = None
    max_restarts: int | None = None
    min_processes: int | None = None

    def given(self) -> list[str]:
        """The names of those that are given."""
        return [name for name, value in vars(self).items() if value is not None]


def wishes_of(options: Mapping[str, Any]) -> Wishes:
    """The launch flags among a verb's own options."""
    return Wishes(**{name: options[name] for name in vars(Wishes())})


def plan_launch(
    profile: LauncherProfile,
    words: Sequence[str],
    *,
    environ: Mapping[str, str],
    wishes: Wishes | None = None,
) -> Launch:
    """How ``s2s-scale WORDS…`` is started under ``profile``; ``words`` begin with the verb.

    Inside a launcher (``RANK`` set) this process is one of its ranks and runs here. Touches no
    other host.

    Raises:
        UserError: more processes than devices, hosts that are not there, or a flag that this
            profile's launcher has no use for.
    """
    if environ.get("RANK"):
        return _worker(profile, tuple(words), environ)
    wishes = wishes or Wishes()
    _refuse_without_effect(profile, wishes, tuple(words))
    return LAUNCHERS[profile.launcher](profile, tuple(words), environ, wishes)


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


def _refuse_without_effect(profile: LauncherProfile, wishes: Wishes, words: Sequence[str]) -> None:
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


def start(
    launch: Launch, *, environ: Mapping[str, str], grace_seconds: float = DEFAULT_GRACE_SECONDS
) -> Ended:
    """Run the command to its end, and return how it ended.

    The rank that failed is named, with its host and the cause, in one line on standard error.
    """
    environment = {**environ, **launch.environment}
    hosts = {place.rank: place.host for place in launch.ranks}
    if not launch.remote:
        return supervise(
            launch.command, environment=environment, hosts=hosts, grace_seconds=grace_seconds
        )
    with tempfile.TemporaryDirectory(prefix="s2s-scale-") as folder:
        file = Path(folder, "environment")

        def share(variables: Mapping[str, str]) -> None:
            own = {**launch.environment, **variables}
            file.write_text(_deepspeed_environment(own), encoding="utf-8")

        return supervise(
            launch.command,
            environment={**environment, DEEPSPEED_ENVIRONMENT: str(file)},
            hosts=hosts,
            address=_address_towards(launch.hosts[0]),
            grace_seconds=grace_seconds,
            share=share,
        )


def _deepspeed_environment(variables: Mapping[str, str]) -> str:
    """What DeepSpeed's launcher exports on every host: the user's own files, then ``variables``."""
    own = (Path("~/.deepspeed_env").expanduser(), Path(".deepspeed_env"))
    lines = [line for path in own if path.is_file() for line in path.read_text().splitlines()]
    return "\n".join([*lines, *(f"{name}={value}" for name, value in variables.items()), ""])


def _address_towards(host: str) -> str:
    """The address of this host on the way to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _worker(profile: LauncherProfile, words: tuple[str, ...], environ: Mapping[str, str]) -> Launch:
    """One rank of a launcher: it has set the rank's variables, so only the profile's are added."""
    local = environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local}" if profile.device == "cuda" else _devices_of_one(profile)
    return Launch(
        command=(sys.executable, "-m", "s2s_scale", *words),
        environment=dict(profile.environment),
        ranks=(Rank(rank=int(environ["RANK"]), host=socket.gethostname(), device=device),),
        in_process=True,
    )


def _none(
    profile: LauncherProfile,
    words: tuple[str, ...],
    environ: Mapping[str, str],
    wishes: Wishes,
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
    apart = bool(wishes.max_restarts) and ALONE not in environ
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


def _torchrun(
    profile: LauncherProfile,
    words: tuple[str, ...],
    environ: Mapping[str, str],
    wishes: Wishes,
) -> Launch:
    """torchrun on this host; with ``--num_nodes`` as one of the hosts on which it is started."""
    nodes, node = wishes.num_nodes or 1, wishes.node_rank or 0
    _check_node(wishes)
    places = _places(profile, environ, wishes)
    notes: tuple[str, ...] = ()
    rendezvous = ["--standalone"]
    if nodes > 1 or wishes.master_port or wishes.master_addr:
        port = wishes.master_port or TORCHRUN_PORT
        if nodes == 1:
            port, notes = _port(wishes)
        address = wishes.master_addr or "127.0.0.1"
        rendezvous = [f"--nnodes={nodes}", f"--node-rank={node}"]
        rendezvous += [f"--master-addr={address}", f"--master-port={port}"]
    program = (sys.executable, "-m", "s2s_scale.torchrun")
    flags = (*rendezvous, f"--nproc-per-node={len(places)}", "-m", "s2s_scale")
    host = socket.gethostname()
    return Launch(
        command=(*program, *flags, *words),
        environment=_environment(profile, environ, len(places)),
        ranks=tuple(
            Rank(rank=node * len(places) + number, host=host, device=_device(profile, name))
            for number, name in enumerate(places)
        ),
        in_process=False,
        notes=notes,
    )


def _check_node(wishes: Wishes) -> None:
    """``--num_nodes`` with torchrun needs to know which of them this is, and where the first is."""
    if (wishes.num_nodes or 1) == 1:
        return
    missing = [name for name in ("node_rank", "master_addr") if getattr(wishes, name) is None]
    if missing:
        raise UserError(
            f"--num_nodes {wishes.num_nodes}: torchrun is started on each host and also needs "
            + " and ".join(f"--{name}" for name in missing)
        )
    if not 0 <= int(wishes.node_rank or 0) < int(wishes.num_nodes or 1):
        raise UserError(
            f"--node_rank {wishes.node_rank}: expected 0 to {int(wishes.num_nodes or 1) - 1}"
        )


def _deepspeed(
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
    port, notes = _port(wishes)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error"]
    command += _where(profile, wishes, hosts)
    command += ["--master_addr", wishes.master_addr] if wishes.master_addr else []
    command += ["--master_port", str(port), "--no_local_rank", *_script(wishes)]
    command += map(for_remote_shell, words) if many and not alone else words
    environment = _environment(profile, environ, max(map(len, hosts.values())))
    environment |= {"DS_ACCELERATOR": profile.device} | _for_runner(wishes, port)
    this = socket.gethostname()
    places = [(host, name) for host, names in hosts.items() for name in names]
    ranks = [
        Rank(rank, this if host == "localhost" else host, _device(profile, name), name)
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
        here = {"localhost": list(range(len(_all_places(profile, environ, wishes))))}
        return {"localhost": [str(slot) for slot in choose(here, **_choice(wishes))["localhost"]]}
    return {"localhost": _places(profile, environ, wishes)}


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
        return (str(Path(__file__).with_name("__main__.py")),)
    return ("--module", "s2s_scale")


def for_remote_shell(word: str) -> str:
    """A word as DeepSpeed's launcher must be given it for a shell on another host to read it back.

    The launcher puts double quotes around a word with a space, and nothing around any other.
    """
    if " " in word:
        return re.sub(r"([$`\\])", r"\\\1", word)
    return shlex.quote(word)


def _places(profile: LauncherProfile, environ: Mapping[str, str], wishes: Wishes) -> list[str]:
    """Names of the devices on this host that take a process each; "cpu" for each on a CPU."""
    everything = _all_places(profile, environ, wishes)
    wanted = wishes.num_processes or profile.processes
    return everything if wanted == AUTO else everything[: int(wanted)]


def _all_places(profile: LauncherProfile, environ: Mapping[str, str], wishes: Wishes) -> list[str]:
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


def _device(profile: LauncherProfile, name: str) -> str:
    return "cpu" if profile.device == "cpu" else f"{profile.device}:{name}"


def _environment(
    profile: LauncherProfile, environ: Mapping[str, str], per_host: int
) -> dict[str, str]:
    """The profile's variables; the cores are divided among a host's ranks unless something says so.

    torch would take all of them in every rank, and torchrun alone gives each rank one.
    """
    environment = dict(profile.environment)
    if "OMP_NUM_THREADS" not in {**environ, **environment}:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // max(1, per_host)))
    return environment


def _port(wishes: Wishes) -> tuple[int, tuple[str, ...]]:
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


DEEPSPEED_ENVIRONMENT = "DS_ENV_FILE"
TORCHRUN_PORT = 29500
PROCESSES_ON_A_CPU = 2
RUNNERS = ("pdsh", "openmpi", "mpich", "mvapich", "slurm", "impi")
Planner = Callable[[LauncherProfile, tuple[str, ...], Mapping[str, str], Wishes], Launch]

# One entry per launcher that a profile may name: what it makes of a profile and a command line.
LAUNCHERS: dict[str, Planner] = {"none": _none, "torchrun": _torchrun, "deepspeed": _deepspeed}


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
