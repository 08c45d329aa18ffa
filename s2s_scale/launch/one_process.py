"""A launch without a launcher: one process, or one rank of a launcher that runs already."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping

from s2s_scale.launch.description import Launch, Rank
from s2s_scale.launch.wishes import Wishes
from s2s_scale.profiles import LauncherProfile
from s2s_scale.rank_variables import ALONE


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
