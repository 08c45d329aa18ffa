"""The verb ``doctor``: checks, then figures if they are asked for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from s2s_scale.launch.description import describe
from s2s_scale.launch.plan import plan_launch
from s2s_scale.launch.wishes import wishes_of
from s2s_scale.settings import Settings

EXIT_PROBLEM = 2


def doctor(settings: Settings, words: list[str]) -> int:
    """Examine this machine for a profile; returns 0 where all is well, else 2."""
    own, profile = settings.verb_values, settings.profile
    assert profile is not None
    if own["parity_folder"]:
        return _rank(settings)
    from s2s_scale.doctor.checks import Patient, examine

    hostfile = Path(own["hostfile"]) if own["hostfile"] else None
    if own["dry_run"]:
        launch = plan_launch(profile, words, environ=os.environ, wishes=wishes_of(own))
        print(describe(launch, environ=os.environ), end="")
        return 0
    from s2s_scale.doctor.report import print_findings

    findings = examine(Patient(profile, hostfile=hostfile, output_dir=Path(own["output_dir"])))
    good = print_findings(findings, title=f"profile {profile.name}")
    if own["parity"] and good:
        good = _parity(settings, words)
    return 0 if good else EXIT_PROBLEM


def _parity(settings: Settings, words: list[str]) -> bool:
    from s2s_scale.doctor import parity
    from s2s_scale.doctor.report import print_deviations

    own, profile = settings.verb_values, settings.profile
    assert profile is not None
    # Every host must see it, as the output folder of a run.
    with tempfile.TemporaryDirectory(prefix=".s2s-scale-parity-", dir=own["output_dir"]) as folder:
        launch = plan_launch(
            profile,
            [*words, "--parity_folder", str(Path(folder).resolve())],
            environ=os.environ,
            wishes=wishes_of(own),
        )
        job = parity.job_for(
            profile, families=tuple(own["families"]), ranks=max(1, len(launch.ranks))
        )
        deviations = parity.run(launch, job, Path(folder))
    title = f"{parity.STEPS} steps on {len(launch.ranks)} ranks against one process"
    return print_deviations(deviations, bound=parity.BOUNDS[profile.device], title=title)


def _rank(settings: Settings) -> int:
    assert settings.profile is not None
    os.environ.update(settings.profile.environment)
    from s2s_scale.doctor.parity import work

    work(settings.profile, Path(settings.verb_values["parity_folder"]))
    return 0
