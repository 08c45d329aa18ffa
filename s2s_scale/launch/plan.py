"""A profile and a command line become the command and environment that start a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from s2s_scale.launch.deepspeed import deepspeed
from s2s_scale.launch.description import Launch
from s2s_scale.launch.one_process import none, worker
from s2s_scale.launch.refusals import refuse_without_effect
from s2s_scale.launch.torchrun import torchrun
from s2s_scale.launch.wishes import Wishes
from s2s_scale.profiles import LauncherProfile

Planner = Callable[[LauncherProfile, tuple[str, ...], Mapping[str, str], Wishes], Launch]

# One entry per launcher that a profile may name: what it makes of a profile and a command line.
LAUNCHERS: dict[str, Planner] = {"none": none, "torchrun": torchrun, "deepspeed": deepspeed}


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
        return worker(profile, tuple(words), environ)
    wishes = wishes or Wishes()
    refuse_without_effect(profile, wishes, tuple(words))
    return LAUNCHERS[profile.launcher](profile, tuple(words), environ, wishes)
