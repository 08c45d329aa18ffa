"""Host files in DeepSpeed's syntax, and checks of the hosts that a run is about to use."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from s2s_scale.errors import UserError, did_you_mean, raise_problems
from s2s_scale.utils import package_versions, remove_if_empty

Slots = dict[str, list[int]]
"""Host -> the slots (device numbers) on it that get one process each, in the file's order."""

PACKAGES = ("s2s-scale", "torch", "transformers", "accelerate", "datasets", "deepspeed")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "PasswordAuthentication=no", "-o", "ConnectTimeout=10")
ANSWER_SECONDS = 60.0


def read_hostfile(path: Path) -> Slots:
    """The hosts of a file with lines such as ``worker-1 slots=4``.

    Raises:
        UserError: the file is unreadable, empty or has mistakes; each with file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"--hostfile {path}: {error.strerror}; expected lines such as 'worker-1 slots=4'"
        ) from error
    hosts: Slots = {}
    first: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        host, slots = fields[0], fields[1:]
        problem = _slots_problem(host, slots)
        if problem is None and host in first:
            problem = f"host '{host}' is given twice (first in line {first[host]}); keep one"
        if problem is not None:
            problems.append(f"{path}:{number}: {problem}")
            continue
        first[host] = number
        hosts[host] = list(range(int(slots[0].partition("=")[2])))
    if not hosts and not problems:
        problems.append(f"{path}: names no host; expected lines such as 'worker-1 slots=4'")
    raise_problems(problems)
    return hosts


def _slots_problem(host: str, slots: list[str]) -> str | None:
    """What is wrong with the fields after a host's name, if anything."""
    expected = "expected a line such as 'worker-1 slots=4'"
    if not slots:
        return f"host '{host}' has no slots; {expected}"
    if len(slots) > 1:
        twice = all(text.startswith("slots=") for text in slots)
        found = "slots are given twice" if twice else f"'{' '.join(slots)}'"
        return f"host '{host}': {found}; {expected}"
    match = re.fullmatch(r"slots=(\d+)", slots[0])
    if match is None:
        return f"host '{host}': '{slots[0]}'; {expected}"
    if int(match[1]) == 0:
        return f"host '{host}' has 0 slots; expected at least 1, or remove the line"
    return None


def choose(
    hosts: Slots,
    *,
    num_nodes: int | None = None,
    num_processes: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Slots:
    """The hosts and slots to use.

    ``num_nodes`` takes the first hosts, ``num_processes`` the first slots of each; ``include`` and
    ``exclude`` are such as ``worker-1@worker-2:0,2``.

    Raises:
        UserError: unknown hosts or slots, or options that exclude each other.
    """
    if include and exclude:
        raise UserError("--include and --exclude: only one of them can be given; leave one out")
    if (include or exclude) and (num_nodes or num_processes):
        unused = "--num_nodes" if num_nodes else "--num_processes"
        raise UserError(
            f"{unused}: has no effect beside --{'include' if include else 'exclude'}, which names "
            "hosts and slots; leave one out"
        )
    if include:
        return _parse_selection("--include", include, hosts)
    if exclude:
        excluded = _parse_selection("--exclude", exclude, hosts)
        left = {
            host: [slot for slot in slots if slot not in excluded.get(host, [])]
            for host, slots in hosts.items()
        }
        left = {host: slots for host, slots in left.items() if slots}
        if not left:
            raise UserError(f"--exclude {exclude}: leaves no host; exclude less")
        return left
    if num_nodes and num_nodes > len(hosts):
        raise UserError(
            f"--num_nodes {num_nodes}: the host file names {len(hosts)} ({', '.join(hosts)}); "
            "add hosts to it, or ask for fewer"
        )
    chosen = list(hosts)[:num_nodes] if num_nodes else list(hosts)
    raise_problems(
        [
            f"--num_processes {num_processes}: host '{host}' has {len(hosts[host])} slots; raise "
            "the number in the host file, or ask for fewer"
            for host in chosen
            if num_processes and num_processes > len(hosts[host])
        ]
    )
    return {host: hosts[host][:num_processes] for host in chosen}


def _parse_selection(flag: str, text: str, hosts: Slots) -> Slots:
    """The hosts and slots that a text such as ``worker-1@worker-2:0,2`` names."""
    named: Slots = {}
    problems = []
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in hosts:
            problems.append(
                f"{flag} {text}: no host '{host}'{did_you_mean(host, hosts)}; expected one of: "
                f"{', '.join(hosts)}"
            )
            continue
        if not colon:
            named[host] = hosts[host]
            continue
        if not all(number.isdigit() for number in numbers.split(",")):
            problems.append(f"{flag} {text}: '{numbers}'; expected slots such as {host}:0,2")
            continue
        named[host] = [int(number) for number in numbers.split(",")]
        missing = [slot for slot in named[host] if slot not in hosts[host]]
        if missing:
            problems.append(
                f"{flag} {text}: host '{host}' has no slot {missing[0]}; expected 0 to "
                f"{len(hosts[host]) - 1}"
            )
    raise_problems(problems)
    return named


@dataclass(frozen=True)
class HostInfo:
    """What a host says about itself. ``code``: see ``code_hash``."""

    address: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    sees_folder: bool = False


def check_hosts(hosts: Sequence[str], output_dir: Path | None) -> str:
    """Check every host, and return the address of the first, as it reports it.

    Each must answer over ssh without a password, have this Python with the same packages and the
    same code of s2s_scale, and see ``output_dir``.

    Raises:
        UserError: with all problems of all hosts, each with what was found and expected.
    """
    token = None if output_dir is None else _write_token(output_dir)
    try:
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            answers = list(pool.map(lambda host: _query(host, token), hosts))
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    here = HostInfo(versions=versions(), code=code_hash(), sees_folder=True)
    problems = []
    for host, answer in zip(hosts, answers, strict=True):
        lines = [answer] if isinstance(answer, str) else _differences(here, answer, token)
        problems += [f"host '{host}': {line}" for line in lines]
    if problems and token is not None:
        remove_if_empty(token.parent)
    raise_problems(problems)
    first = answers[0]
    assert isinstance(first, HostInfo)
    return first.address


def _write_token(output_dir: Path) -> Path:
    """A file in the output folder, by which the other hosts show that they see the folder."""
    token = output_dir / f".shared-{uuid.uuid4().hex}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise UserError(
            f"output_dir={output_dir}: cannot be written to ({error.strerror}); choose a folder "
            "that you may write to"
        ) from error
    return token.resolve()


def _query(host: str, token: Path | None) -> HostInfo | str:
    """What ``host`` says about itself, or what is wrong with it."""
    call = f"from s2s_scale.launch.hosts import answer; print(answer({str(token or '')!r}))"
    python = f"{shlex.quote(sys.executable)} -c {shlex.quote(call)}"
    try:
        done = _ssh(host, f"cd {shlex.quote(os.getcwd())} && {python}")
    except FileNotFoundError:
        return "no 'ssh' on PATH; install an ssh client (Debian: openssh-client)"
    except subprocess.TimeoutExpired:
        return f"no answer over ssh within {ANSWER_SECONDS:.0f} s; is it up and reachable?"
    reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
    if done.returncode == 255:
        return f"not reachable over ssh without a password: {reason}; try: ssh {host} true"
    if done.returncode:
        return (
            f"{sys.executable} cannot run s2s_scale there: {reason}; expected the same environment "
            "under the same path"
        )
    return HostInfo(**json.loads(done.stdout.strip().splitlines()[-1]))


def answer(token: str) -> str:
    """What this host says about itself when another one runs this over ssh: one line of JSON."""
    addresses = subprocess.run(
        ["hostname", "-I"], capture_output=True, text=True, check=False, timeout=10
    ).stdout.split()
    return json.dumps(
        {
            "address": addresses[0] if addresses else "",
            "versions": versions(),
            "code": code_hash(),
            "sees_folder": not token or os.path.exists(token),
        }
    )


def versions() -> dict[str, str]:
    """Package -> version on this host; "not installed" where it is missing."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **package_versions(PACKAGES)}


def code_hash() -> str:
    """A digest of this package's source files, the same on two hosts with the same code."""
    folder = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _differences(here: HostInfo, there: HostInfo, token: Path | None) -> list[str]:
    """What keeps another host from taking part in a run that this one starts."""
    lines = [
        f"{name} is {there.versions.get(name, 'not installed')}, but {expected} on this host; "
        "install the same version"
        for name, expected in here.versions.items()
        if there.versions.get(name) != expected
    ]
    if there.code != here.code:
        lines.append(
            f"the code of s2s_scale differs ({there.code}, here {here.code}); install the same "
            "code on both"
        )
    if not there.sees_folder and token is not None:
        lines.append(
            f"does not see the output folder {token.parent}; expected a folder that all hosts share"
        )
    if not there.address:
        lines.append("has no address by 'hostname -I'; give --master_addr")
    return lines


def reachable_hosts(hosts: Sequence[str]) -> list[str]:
    """The hosts that answer over ssh now."""

    def answers(host: str) -> bool:
        try:
            return _ssh(host, "true").returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False

    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        reached = list(pool.map(answers, hosts))
    return [host for host, reachable in zip(hosts, reached, strict=True) if reachable]


def _ssh(host: str, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on another host, without ever asking for a password."""
    return subprocess.run(
        [*SSH, host, command],
        capture_output=True,
        text=True,
        timeout=ANSWER_SECONDS,
        stdin=subprocess.DEVNULL,
        check=False,
    )
