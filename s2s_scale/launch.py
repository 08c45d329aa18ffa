"""A profile and a command line become the command and environment that start a run."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from s2s_scale.errors import UserError
from s2s_scale.profiles import AUTO, LauncherProfile, cuda_devices

ERROR_FOLDER = "S2S_SCALE_ERROR_FOLDER"
"""Environment variable: where a rank leaves what went wrong, for the process that started it."""


@dataclass(frozen=True)
class Rank:
    """Where one process runs: ``device`` is such as ``cpu`` or ``cuda:0``."""

    rank: int
    host: str
    device: str


@dataclass(frozen=True)
class Launch:
    """How a run is started. ``in_process``: here, and ``command`` is what would do the same."""

    command: tuple[str, ...]
    environment: dict[str, str]
    ranks: tuple[Rank, ...]
    in_process: bool


def plan_launch(
    profile: LauncherProfile,
    words: Sequence[str],
    *,
    environ: Mapping[str, str],
    processes: int | None = None,
) -> Launch:
    """How ``s2s-scale WORDS…`` is started under ``profile``; ``words`` begin with the verb.

    Inside a launcher (``RANK`` set) this process is one of its ranks and runs here. ``processes``
    overrides the profile's number per node.

    Raises:
        UserError: more processes than devices, or a number for a profile that starts only one.
    """
    if environ.get("RANK"):
        return _worker(profile, tuple(words), environ)
    if profile.launcher == "none" and processes not in (None, 1):
        raise UserError(
            f"--num_processes {processes}: profile '{profile.name}' starts one process; choose a "
            "profile with a launcher, such as cpu-ddp or gpu-ddp"
        )
    return LAUNCHERS[profile.launcher](profile, tuple(words), environ, processes)


def start(launch: Launch, *, environ: Mapping[str, str]) -> int:
    """Run the command to its end and return its exit code.

    The first rank that failed is named, with its host and the cause, in one line on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="s2s-scale-") as folder:
        environment = {**environ, **launch.environment, ERROR_FOLDER: folder}
        process = subprocess.Popen(launch.command, env=environment)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal has interrupted the ranks too: they say what was saved, and end.
            code = process.wait()
        for line in _first_failure(Path(folder)):
            print(f"error: {line}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def report_failure(problems: Sequence[str], *, rank: int) -> bool:
    """Leave a rank's ``problems`` for the process that started it; False if there is none.

    What the rank has said of itself stays: it knows more than whoever saw it end.
    """
    folder = os.environ.get(ERROR_FOLDER)
    if not folder:
        return False
    path = Path(folder, f"rank-{rank}.json")
    if not path.exists():
        where = f"rank {rank} on {socket.gethostname()}"
        text = json.dumps({"where": where, "problems": list(problems)})
        path.write_text(text, encoding="utf-8")
    return True


def _first_failure(folder: Path) -> list[str]:
    """Lines for the rank that failed first; ranks that met the same problem are not repeated."""
    files = sorted(folder.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return []
    failure = json.loads(files[0].read_text(encoding="utf-8"))
    return [f"{failure['where']}: {problem}" for problem in failure["problems"]]


def _worker(profile: LauncherProfile, words: tuple[str, ...], environ: Mapping[str, str]) -> Launch:
    """One rank of a launcher: it has set the rank's variables, so only the profile's are added."""
    local = environ.get("LOCAL_RANK", "0")
    device = f"cuda:{local}" if profile.device == "cuda" else "cpu"
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
    processes: int | None,
) -> Launch:
    """No launcher: one process, which is this one.

    It sees one CUDA device only, the first of those it may use: given several, transformers would
    wrap the model in ``DataParallel``.
    """
    environment = dict(profile.environment)
    device = "cpu"
    if profile.device == "cuda":
        allowed = {**environ, **environment}.get("CUDA_VISIBLE_DEVICES", "0")
        first = allowed.split(",")[0].strip()
        environment["CUDA_VISIBLE_DEVICES"] = first
        device = f"cuda:{first}"
    return Launch(
        command=(sys.executable, "-m", "s2s_scale", *words),
        environment=environment,
        ranks=(Rank(rank=0, host=socket.gethostname(), device=device),),
        in_process=True,
    )


def _torchrun(
    profile: LauncherProfile,
    words: tuple[str, ...],
    environ: Mapping[str, str],
    processes: int | None,
) -> Launch:
    """torchrun on this host, with a free port of its own choice.

    The cores are divided among the ranks unless OMP_NUM_THREADS says otherwise: torch would take
    all of them in every rank, and torchrun alone gives each rank one.
    """
    wanted = processes or profile.processes
    devices = cuda_devices(environ) if profile.device == "cuda" else None
    if devices is not None and wanted != AUTO and int(wanted) > len(devices):
        raise UserError(
            f"{wanted} processes, but {len(devices)} CUDA device(s) may be used; give "
            f"--num_processes {max(1, len(devices))} or fewer"
        )
    count = int(wanted) if wanted != AUTO else len(devices) if devices else 2
    environment = dict(profile.environment)
    if "OMP_NUM_THREADS" not in {**environ, **environment}:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    program = (sys.executable, "-m", "s2s_scale.torchrun")
    flags = ("--standalone", f"--nproc-per-node={count}", "-m", "s2s_scale")
    host = socket.gethostname()
    return Launch(
        command=(*program, *flags, *words),
        environment=environment,
        ranks=tuple(
            Rank(rank=rank, host=host, device=f"cuda:{devices[rank]}" if devices else "cpu")
            for rank in range(count)
        ),
        in_process=False,
    )


Planner = Callable[[LauncherProfile, tuple[str, ...], Mapping[str, str], "int | None"], Launch]

# One entry per launcher that a profile may name: what it makes of a profile and a command line.
LAUNCHERS: dict[str, Planner] = {"none": _none, "torchrun": _torchrun}


def describe(launch: Launch, *, environ: Mapping[str, str]) -> str:
    """The text of ``--dry_run``: command, environment and rank-to-device map."""
    lines = ["command:", f"  {shlex.join(launch.command)}", "environment:"]
    for name, value in sorted(launch.environment.items()):
        shell = environ.get(name)
        replaces = f"   (replaces {shell!r} of the shell)" if shell not in (None, value) else ""
        lines.append(f"  {name}={shlex.quote(value)}{replaces}")
    if not launch.environment:
        lines.append("  nothing is changed")
    lines.append("ranks:")
    lines += [f"  rank {place.rank}: {place.host}, {place.device}" for place in launch.ranks]
    return "\n".join(lines) + "\n"
