"""Starts what was planned, and runs it to its end."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from s2s_scale.config import DEFAULT_GRACE_SECONDS
from s2s_scale.launch.spec import Launch
from s2s_scale.supervision import Ended, supervise

DEEPSPEED_ENVIRONMENT = "DS_ENV_FILE"


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
