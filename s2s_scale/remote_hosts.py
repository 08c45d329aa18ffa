"""Checks of the hosts that a run is about to use: all of them at once, before anything starts."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from s2s_scale.errors import UserError, raise_problems
from s2s_scale.utils import remove_if_empty

PACKAGES = ("s2s-scale", "torch", "transformers", "accelerate", "datasets", "deepspeed")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "PasswordAuthentication=no", "-o", "ConnectTimeout=10")
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Found:
    """What a host says of itself."""

    address: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    sees_folder: bool = False


def check_hosts(hosts: Sequence[str], output_dir: Path | None) -> str:
    """Check every host, and return the address of the first, as it says itself.

    Each must answer over ssh without a password, have this Python with the same packages and the
    same code of ours, and see ``output_dir``.

    Raises:
        UserError: with all problems of all hosts, each with what was found and expected.
    """
    token = None if output_dir is None else _put_token(output_dir)
    try:
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            answers = list(pool.map(lambda host: _ask(host, token), hosts))
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    here = Found(versions=versions(), code=code_hash(), sees_folder=True)
    problems = []
    for host, answer in zip(hosts, answers, strict=True):
        if isinstance(answer, str):
            problems.append(f"host '{host}': {answer}")
        else:
            problems += [f"host '{host}': {line}" for line in _differences(here, answer, token)]
    if problems and token is not None:
        remove_if_empty(token.parent)
    raise_problems(problems)
    first = answers[0]
    assert isinstance(first, Found)
    return first.address


def _put_token(output_dir: Path) -> Path:
    token = output_dir / f".shared-{uuid.uuid4().hex}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise UserError(
            f"output_dir={output_dir}: cannot be written to ({error.strerror}); give a folder that "
            "you may write to"
        ) from error
    return token.resolve()


def versions() -> dict[str, str]:
    """Package -> version on this host; "not installed" where it is missing."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_hash() -> str:
    """A digest of this package's source files, the same on two hosts with the same code."""
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def answer(token: str) -> str:
    """What this host says when it is asked: one line of JSON."""
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


def answering(hosts: Sequence[str]) -> list[str]:
    """The hosts that answer over ssh now."""
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        answers = list(pool.map(_answers, hosts))
    return [host for host, answer in zip(hosts, answers, strict=True) if answer]


def _answers(host: str) -> bool:
    try:
        done = subprocess.run(
            [*SSH, host, "true"],
            capture_output=True,
            timeout=ANSWER_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _ask(host: str, token: Path | None) -> Found | str:
    """What ``host`` says, or what is wrong with it."""
    call = f"from s2s_scale.remote_hosts import answer; print(answer({str(token or '')!r}))"
    there = f"cd {shlex.quote(os.getcwd())} && {shlex.quote(sys.executable)} -c {shlex.quote(call)}"
    try:
        done = subprocess.run(
            [*SSH, host, there],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError:
        return "no 'ssh' on PATH; install an ssh client (Debian: openssh-client)"
    except subprocess.TimeoutExpired:
        return f"gave no answer over ssh within {ANSWER_SECONDS:.0f} s; is it up and reachable?"
    said = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
    if done.returncode == 255:
        return f"not reachable over ssh without a password: {said}; try: ssh {host} true"
    if done.returncode:
        return (
            f"{sys.executable} with s2s_scale does not run there: {said}; expected the same "
            "environment under the same path"
        )
    return Found(**json.loads(done.stdout.strip().splitlines()[-1]))


def _differences(here: Found, there: Found, token: Path | None) -> list[str]:
    lines = [
        f"{name} is {there.versions.get(name, 'not installed')}, but {expected} on this host; "
        "install the same version"
        for name, expected in here.versions.items()
        if there.versions.get(name) != expected
    ]
    if there.code != here.code:
        lines.append(
            f"the code of s2s_scale differs ({there.code}, here {here.code}); bring both to the "
            "same state"
        )
    if not there.sees_folder and token is not None:
        lines.append(
            f"does not see the output folder {token.parent}; expected a folder that all hosts share"
        )
    if not there.address:
        lines.append("has no address by 'hostname -I'; give --master_addr")
    return lines
