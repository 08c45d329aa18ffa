"""The checks of ``s2s-scale doctor``: each examines one thing and suggests a remedy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from s2s_scale.compat import check_register
from s2s_scale.errors import UserError
from s2s_scale.launch.hosts import check_hosts, read_hostfile
from s2s_scale.settings.deepspeed_config import offloads_optimizer, read_config
from s2s_scale.settings.profiles import (
    LauncherProfile,
    cuda_devices,
    cuda_is_here,
    deepspeed_config_path,
    missing_packages,
    needed_packages,
    tpu_chips,
)
from s2s_scale.utils import package_version, processes_holding

NEEDED: dict[str, tuple[int, ...]] = {
    "torch": (2, 9),
    "transformers": (5, 17),
    "accelerate": (1, 10),
    "datasets": (4, 0),
}
BACKEND_NEEDS: dict[str, tuple[int, ...]] = {
    "deepspeed": (0, 18),
    "fairscale": (0, 4, 13),
    "torch-xla": (2, 9),
}
SHARED_MEMORY_MIB = 64
FREE_DISK_GIB = 2.0
XLA_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """Result of a check; ``remedy`` is empty if there is no problem. A ``warning`` is not one."""

    what: str
    found: str
    remedy: str = ""
    warning: bool = False

    @property
    def ok(self) -> bool:
        return self.warning or not self.remedy


@dataclass(frozen=True)
class DoctorContext:
    """What to check: this machine for ``profile``, and the hosts listed in ``hostfile``."""

    profile: LauncherProfile
    hostfile: Path | None = None
    output_dir: Path = Path()


Check = Callable[[DoctorContext], "Iterator[Finding]"]


def run_checks(context: DoctorContext) -> list[Finding]:
    """The findings of all checks, in the order of ``CHECKS``."""
    return [finding for check in CHECKS for finding in check(context)]


def versions(context: DoctorContext) -> Iterator[Finding]:
    """Versions of Python, of the required packages, and of those of the profile's backend."""
    python = sys.version_info[:2]
    yield Finding(
        "Python",
        ".".join(map(str, sys.version_info[:3])),
        "" if (3, 10) <= python < (3, 14) else "use Python 3.10 to 3.13",
    )
    for package, least in NEEDED.items():
        yield _package(package, least)
    missing = dict(missing_packages(context.profile))
    for package, least in BACKEND_NEEDS.items():
        if package in missing:
            remedy = f"pip install 's2s-scale[{missing[package]}]', or pip install {package}"
            yield Finding(package, "not installed", remedy)
        elif package in needed_packages(context.profile):
            yield _package(package, least)


def _package(package: str, least: tuple[int, ...]) -> Finding:
    wanted = ".".join(map(str, least))
    found = package_version(package)
    if found is None:
        return Finding(package, "not installed", f"pip install '{package}>={wanted}'")
    numbers = tuple(int(word) for word in found.split("+")[0].split(".") if word.isdigit())
    return Finding(package, found, "" if numbers >= least else f"pip install '{package}>={wanted}'")


def devices(context: DoctorContext) -> Iterator[Finding]:
    """The profile's kind of device, and whether there are enough devices."""
    profile = context.profile
    if profile.device == "cpu":
        cores = len(os.sched_getaffinity(0))
        wanted = profile.processes if isinstance(profile.processes, int) else 1
        remedy = "" if cores >= wanted else f"slow: {wanted} processes share the cores"
        yield Finding("CPU cores", str(cores), remedy)
        return
    if profile.device == "tpu":
        yield from _tpu()
        return
    names = cuda_devices({**os.environ, **profile.environment})
    if not cuda_is_here():
        remedy = "install a CUDA build of torch and the NVIDIA driver, or use a cpu profile"
        yield Finding("CUDA devices", "no usable device", remedy)
        return
    wanted = profile.processes if isinstance(profile.processes, int) else 1
    yield Finding(
        "CUDA devices",
        ", ".join(names) or "none visible",
        "" if len(names) >= wanted else f"the profile starts {wanted} processes; use fewer",
    )


def _tpu() -> Iterator[Finding]:
    """The host's TPU chips, and the processes holding them: only one process can at a time."""
    chips = tpu_chips()
    if not chips:
        yield Finding("TPU chips", "none", "run on a TPU VM, or use --profile cpu-xla")
        return
    yield Finding("TPU chips", f"{len(chips)}: {', '.join(map(str, chips))}")
    others = processes_holding(chips)
    yield Finding(
        "TPU in use by",
        ", ".join(f"process {pid} ({name})" for pid, name in others) or "no process",
        f"stop it first: kill {others[0][0]}" if others else "",
    )


def xla_parts(context: DoctorContext) -> Iterator[Finding]:
    """Whether torch, torch-xla and libtpu are compatible, and the devices respond."""
    profile = context.profile
    if profile.backend != "xla" or not find_spec("torch_xla"):
        return
    ours, theirs = package_version("torch") or "", package_version("torch_xla") or ""
    same = ours.split(".")[:2] == theirs.split(".")[:2]
    yield Finding(
        "torch and torch-xla",
        f"{ours} and {theirs}",
        "" if same else "they must have the same version: pip install 's2s-scale[tpu]'",
    )
    if profile.device == "tpu":
        found = package_version("libtpu")
        remedy = "" if found else "pip install 's2s-scale[tpu]'"
        yield Finding("libtpu", found or "not installed", remedy)
    yield _xla_devices(profile)


def _xla_devices(profile: LauncherProfile) -> Finding:
    """Query the devices in a subprocess: a process that does so holds the chips until it exits."""
    program = "import torch_xla; print(len(torch_xla.real_devices()), torch_xla.real_devices()[0])"
    environment = {**os.environ, **profile.environment}
    command = [sys.executable, "-c", program]
    try:
        asked = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=XLA_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "XLA devices", "no response", "another process may hold them; see 'TPU in use by'"
        )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("XLA devices", last, "fix the cause that the message names")
    return Finding("XLA devices", asked.stdout.strip().splitlines()[-1])


def op_builds(context: DoctorContext) -> Iterator[Finding]:
    """The tools and ops that DeepSpeed compiles at first use."""
    profile = context.profile
    if profile.backend != "deepspeed" or not find_spec("deepspeed"):
        return
    if profile.deepspeed_config is None:
        return
    try:
        config = read_config(deepspeed_config_path(profile.deepspeed_config, profile))
    except UserError as error:
        yield Finding("DeepSpeed configuration", "; ".join(error.problems), "correct the file")
        return
    if profile.device == "cpu" or offloads_optimizer(config):
        tools = {"g++": "Debian: apt-get install g++", "ninja": "pip install ninja"}
        beside = str(Path(sys.executable).parent)  # pip installs ninja next to this Python
        path = os.pathsep.join((beside, os.environ.get("PATH", "")))
        for tool, remedy in tools.items():
            found = shutil.which(tool, path=path)
            yield Finding(
                f"{tool} (DeepSpeed compiles)", found or "not found", "" if found else remedy
            )
    if offloads_optimizer(config):
        from s2s_scale.backends.deepspeed.backend import cpu_adam_problem

        problem = cpu_adam_problem()
        yield Finding(
            "DeepSpeed's CPU Adam",
            problem or "can be built",
            "see ds_report; not needed without offload" if problem else "",
        )


def private_parts(context: DoctorContext) -> Iterator[Finding]:
    """Private names used of the libraries that this profile needs, and the versions checked."""
    libraries = {*NEEDED, *needed_packages(context.profile)}
    for verdict in check_register(libraries=libraries):
        entry, installed = verdict.reliance, verdict.installed
        if installed is None:
            continue
        first, last = entry.checked
        remedy = ""
        if verdict.error:
            remedy = f"{verdict.error}; pip install '{entry.library}=={last}.*'"
        elif verdict.warning:
            remedy = "results may differ: verify them, or install a version in that range"
        yield Finding(
            entry.function.removeprefix("s2s_scale."),
            f"{entry.library} {installed}, checked with {first} to {last}",
            remedy,
            warning=bool(verdict.warning) and not verdict.error,
        )


def shared_memory(context: DoctorContext) -> Iterator[Finding]:
    """/dev/shm, which data-loader workers and collectives use between processes."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "no /dev/shm", "mount a tmpfs there")
        return
    free = shutil.disk_usage(folder).free / 2**20
    remedy = f"at least {SHARED_MEMORY_MIB} MiB are needed; in a container: --shm-size=1g"
    yield Finding(
        "shared memory", f"{free:,.0f} MiB free", "" if free >= SHARED_MEMORY_MIB else remedy
    )


def network(context: DoctorContext) -> Iterator[Finding]:
    """The address that this host gives to other hosts."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding("host name", f"{name} has no address", f"add '{name}' to /etc/hosts")
        return
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    known = [interface for _, interface in socket.if_nameindex()]
    if chosen and chosen not in known:
        remedy = f"set it to one of {', '.join(known)}"
        yield Finding("GLOO_SOCKET_IFNAME", f"{chosen}, which does not exist", remedy)
        return
    loopback = address.startswith("127.") and context.hostfile is not None and not chosen
    yield Finding(
        "network",
        f"{name} is {address}; interfaces {', '.join(known)}",
        "other hosts cannot reach a loopback address: set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) "
        "in the profile's environment"
        if loopback
        else "",
    )


def hosts(context: DoctorContext) -> Iterator[Finding]:
    """Every host of the host file: reachable, same packages and code, shared output folder."""
    if context.hostfile is None:
        return
    try:
        names: Sequence[str] = list(read_hostfile(context.hostfile))
        check_hosts(names, context.output_dir)
    except UserError as error:
        for problem in error.problems:
            yield Finding("hosts", problem, "see the problem found")
        return
    yield Finding("hosts", f"{', '.join(names)}: reachable, with the same packages and code")


def disk(context: DoctorContext) -> Iterator[Finding]:
    """Free space for checkpoints in the output folder."""
    folder = context.output_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    writable = os.access(folder, os.W_OK)
    remedy = "" if free >= FREE_DISK_GIB else "free some space, or give another --output_dir"
    yield Finding(
        "disk",
        f"{folder}: {free:,.1f} GiB free" + ("" if writable else ", not writable"),
        remedy if writable else "give a writable --output_dir",
    )


CHECKS: tuple[Check, ...] = (
    versions,
    devices,
    xla_parts,
    op_builds,
    private_parts,
    shared_memory,
    network,
    hosts,
    disk,
)
