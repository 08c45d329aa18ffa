"""Host files and the choice of hosts and slots in them, in DeepSpeed's syntax."""

from __future__ import annotations

import re
from pathlib import Path

from s2s_scale.errors import UserError, did_you_mean, raise_problems

Slots = dict[str, list[int]]
"""Host -> the slots (device numbers) on it that take a process each, in the file's order."""


def read_hostfile(path: Path) -> Slots:
    """The hosts of a file with lines such as ``worker-1 slots=4``.

    Raises:
        UserError: unreadable, empty, or with mistakes: each with file and line.
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
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, slots = words[0], words[1:]
        place = f"{path}:{number}"
        problem = _problem(host, slots)
        if problem is None and host in first:
            problem = f"host '{host}' is given twice (first in line {first[host]}); keep one"
        if problem is not None:
            problems.append(f"{place}: {problem}")
            continue
        first[host] = number
        hosts[host] = list(range(int(slots[0].partition("=")[2])))
    if not hosts and not problems:
        problems.append(f"{path}: names no host; expected lines such as 'worker-1 slots=4'")
    raise_problems(problems)
    return hosts


def _problem(host: str, slots: list[str]) -> str | None:
    expected = "expected a line such as 'worker-1 slots=4'"
    if not slots:
        return f"host '{host}' has no slots; {expected}"
    if len(slots) > 1:
        doubled = all(word.startswith("slots=") for word in slots)
        what = "slots are given twice" if doubled else f"'{' '.join(slots)}'"
        return f"host '{host}': {what}; {expected}"
    match = re.fullmatch(r"slots=(\d+)", slots[0])
    if match is None:
        return f"host '{host}': '{slots[0]}'; {expected}"
    if int(match[1]) == 0:
        return f"host '{host}' has 0 slots; expected at least 1, or the line left out"
    return None


def choose(
    hosts: Slots,
    *,
    num_nodes: int | None = None,
    num_processes: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Slots:
    """The hosts and slots that are to be used.

    ``num_nodes`` takes the first hosts, ``num_processes`` the first slots of each; ``include`` and
    ``exclude`` are such as ``worker-1@worker-2:0,2``.

    Raises:
        UserError: hosts or slots that are not there, or settings that exclude each other.
    """
    if include and exclude:
        raise UserError("--include and --exclude: only one of them can choose; leave one out")
    if (include or exclude) and (num_nodes or num_processes):
        chosen = "--num_nodes" if num_nodes else "--num_processes"
        raise UserError(
            f"{chosen}: has no effect beside --{'include' if include else 'exclude'}, which names "
            "hosts and slots; leave one out"
        )
    if include or exclude:
        return _filtered(hosts, include, exclude)
    if num_nodes and num_nodes > len(hosts):
        raise UserError(
            f"--num_nodes {num_nodes}: the host file names {len(hosts)} ({', '.join(hosts)}); "
            "name more there, or ask for fewer"
        )
    chosen_hosts = list(hosts)[:num_nodes] if num_nodes else list(hosts)
    raise_problems(
        [
            f"--num_processes {num_processes}: host '{host}' has {len(hosts[host])} slots; raise "
            "them in the host file, or ask for fewer"
            for host in chosen_hosts
            if num_processes and num_processes > len(hosts[host])
        ]
    )
    return {host: hosts[host][:num_processes] for host in chosen_hosts}


def _filtered(hosts: Slots, include: str | None, exclude: str | None) -> Slots:
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    named: Slots = {}
    problems = []
    for part in str(text).split("@"):
        host, colon, numbers = part.partition(":")
        if host not in hosts:
            problems.append(
                f"{flag} {text}: no host '{host}'{did_you_mean(host, hosts)}; expected one of: "
                f"{', '.join(hosts)}"
            )
            continue
        slots = hosts[host] if not colon else _numbers(numbers)
        missing = None if slots is None else [slot for slot in slots if slot not in hosts[host]]
        if slots is None:
            problems.append(f"{flag} {text}: '{numbers}'; expected slots such as {host}:0,2")
        elif missing:
            problems.append(
                f"{flag} {text}: host '{host}' has no slot {missing[0]}; expected 0 to "
                f"{len(hosts[host]) - 1}"
            )
        else:
            named[host] = slots
    raise_problems(problems)
    if include:
        return named
    left = {
        host: [slot for slot in slots if slot not in named.get(host, [])]
        for host, slots in hosts.items()
    }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise UserError(f"--exclude {exclude}: leaves no host; exclude less")
    return left


def _numbers(text: str) -> list[int] | None:
    words = text.split(",")
    return [int(word) for word in words] if all(word.isdigit() for word in words) else None
