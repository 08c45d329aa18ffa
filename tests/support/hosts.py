"""Two hosts on one machine: network namespaces joined by a cable, each with an ssh server.

Needs root, Linux network namespaces, and Debian's iproute2, openssh-server and pdsh.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "eth0"
TOOLS = ("ip", "ssh", "ssh-keygen", "pdsh")
SSHD = "/usr/sbin/sshd"


def missing() -> str | None:
    """Why two hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in TOOLS if not shutil.which(tool)]
    if not Path(SSHD).exists():
        lacking.append("sshd")
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: iproute2 openssh-server pdsh)"
    name = f"s2s-{uuid.uuid4().hex[:6]}"
    made = _run("ip", "netns", "add", name, check=False)
    _run("ip", "netns", "del", name, check=False)
    return None if made.returncode == 0 else f"no network namespaces: {made.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """One of the two: ``name`` is its network namespace, ``address`` what the other calls it."""

    name: str
    address: str

    def cut_off(self) -> None:
        """Pull the cable."""
        _run("ip", "-n", self.name, "link", "set", INTERFACE, "down")

    def connect(self) -> None:
        """Put the cable back."""
        _run("ip", "-n", self.name, "link", "set", INTERFACE, "up")

    def command(self, words: Sequence[object]) -> list[str]:
        """The words, run on this host."""
        return ["ip", "netns", "exec", self.name, *map(str, words)]


@dataclass(frozen=True)
class Hosts:
    """Both hosts, and the environment in which ``ssh`` and ``pdsh`` reach them by address."""

    both: tuple[Host, Host]
    environment: Mapping[str, str]
    hostfile: Path


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make the hosts, and take all of it away again. ``folder`` holds keys and settings."""
    mark = uuid.uuid4().hex[:6]
    both = tuple(Host(f"s2s-{mark}-{n}", address) for n, address in enumerate(ADDRESSES, start=1))
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for host in both:
            _run("ip", "netns", "add", host.name)
        first, second = both
        cable = ("type", "veth", "peer", "name", INTERFACE, "netns", second.name)
        _run("ip", "link", "add", INTERFACE, "netns", first.name, *cable)
        for host in both:
            _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            _run("ip", "-n", host.name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", host.name, "link", "set", "lo", "up")
        environment = _ssh_settings(folder)
        servers += [_sshd(host, folder) for host in both]
        hostfile = folder / "hosts"
        hostfile.write_text("".join(f"{host.address} slots=1\n" for host in both))
        yield Hosts((first, second), environment, hostfile)
    finally:
        for server in servers:
            server.terminate()
            server.wait(10)
        for host in both:
            _end_all(host)
            _run("ip", "netns", "del", host.name, check=False)


def _ssh_settings(folder: Path) -> dict[str, str]:
    """Keys for client and servers, and an ``ssh`` first on PATH that uses them."""
    for name in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  LogLevel ERROR\n",
        encoding="utf-8",
    )
    tools = folder / "bin"
    tools.mkdir()
    (tools / "ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n', encoding="utf-8"
    )
    (tools / "ssh").chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}


def _sshd(host: Host, folder: Path) -> subprocess.Popen[bytes]:
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "ListenAddress": host.address,
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    server = subprocess.Popen(
        host.command([SSHD, "-D", "-e", "-f", "/dev/null", *flags]),
        stderr=(folder / f"{host.name}.log").open("wb"),
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        listening = _run("ip", "netns", "exec", host.name, "ss", "-ltn").stdout
        if f"{host.address}:22" in listening:
            return server
        time.sleep(0.1)
    raise AssertionError((folder / f"{host.name}.log").read_text(encoding="utf-8"))


def _end_all(host: Host) -> None:
    """End what a run has left on the host."""
    for pid in _run("ip", "netns", "pids", host.name, check=False).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 9)


def _run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done
