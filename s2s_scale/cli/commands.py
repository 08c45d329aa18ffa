"""``s2s-scale checkpoint list|verify|show|convert FOLDER``.

The verb ``doctor``: checks, then figures if they are asked for.

The table of ``s2s-scale profiles``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from s2s_scale.errors import UserError, did_you_mean, raise_problems
from s2s_scale.launch.launchers import plan_launch
from s2s_scale.launch.spec import describe, launch_options_of
from s2s_scale.settings import Settings
from s2s_scale.settings.command_line import parse_line
from s2s_scale.settings.commands import CHECKPOINT_ACTIONS, Verb
from s2s_scale.settings.profiles import available, resolve
from s2s_scale.utils import table_console

DAMAGED = 2


def checkpoint(verb: Verb, words: Sequence[str]) -> int:
    """Run one action; returns the exit code: 0, or 2 where something is damaged."""
    expected = f"expected one of: {', '.join(CHECKPOINT_ACTIONS)}"
    if not words or words[0].startswith("-"):
        raise UserError(f"checkpoint: no action is given; {expected}")
    action = words[0]
    if action not in CHECKPOINT_ACTIONS:
        raise UserError(
            f"checkpoint: unknown action '{action}'{did_you_mean(action, CHECKPOINT_ACTIONS)}; "
            f"{expected}"
        )
    line = parse_line(verb, words[1:])
    problems = list(line.problems)
    if line.positional is None:
        problems.append(f"checkpoint {action}: no FOLDER is given; expected a checkpoint or a run")
    if action != "convert":
        problems += [f"--{name}: has no effect on '{action}'; leave it out" for name in line.values]
    elif line.positional is not None:
        problems += [
            f"--{name}: missing; expected {what}"
            for name, what in (("to", "portable or native"), ("output_dir", "a new folder"))
            if not line.values.get(name)
        ]
    raise_problems(problems)
    folder = Path(str(line.positional))
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; expected a checkpoint or the folder of a run")
    if action == "convert":
        return _convert(_one(folder), Path(line.values["output_dir"]), line.values["to"])
    return {"list": _list, "verify": _verify, "show": _show}[action](folder)


def _found(folder: Path) -> list[Path]:
    """The checkpoint that ``folder`` is, or those in it, oldest first."""
    from s2s_scale.checkpoint import STATE_FILE, checkpoints, is_ours

    inside = checkpoints(folder)
    if inside:
        return inside
    if is_ours(folder) or ((folder / STATE_FILE).is_file() and (folder / "config.json").is_file()):
        return [folder]
    raise UserError(f"{folder}: not a checkpoint and none in it; expected a checkpoint-N folder")


def _one(folder: Path) -> Path:
    found = _found(folder)
    if found != [folder]:
        raise UserError(
            f"{folder}: holds {len(found)} checkpoints; name one of them, such as {found[-1]}"
        )
    return folder


def _list(folder: Path) -> int:
    """A table of the checkpoints, each verified; 0 if all are whole."""
    from rich.table import Table

    from s2s_scale.utils import table_console

    table = Table(title=f"Checkpoints in {folder}", title_justify="left")
    for heading in ("name", "step", "format", "size", "state"):
        table.add_column(heading, overflow="fold")
    sound = []
    for path in _found(folder):
        problem = _problem_of(path)
        kind, step = _kind_and_step(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        table.add_row(path.name, step, kind, _mebibytes(size), problem or _state(path))
        sound.append(problem is None)
    table_console().print(table)
    return 0 if all(sound) else DAMAGED


def _verify(folder: Path) -> int:
    """Read every byte of every checkpoint; a line each."""
    problems = []
    for path in _found(folder):
        problem = _problem_of(path)
        if problem is None:
            print(f"{path}: {_state(path)}")
        else:
            problems.append(problem)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return DAMAGED if problems else 0


def _show(folder: Path) -> int:
    """What a checkpoint holds and where its run stood."""
    from s2s_scale.checkpoint import TRAINING_STATE, read_manifest
    from s2s_scale.checkpoint.portable import SETTINGS, read_json

    path = _one(folder)
    kind, step = _kind_and_step(path)
    print(f"{path}: {kind}, step {step}, {_problem_of(path) or _state(path)}")
    if not (path / TRAINING_STATE).is_file():
        return 0
    training = read_json(path / TRAINING_STATE)
    _print_values("position", {"epoch": training.get("epoch"), **(training.get("plan") or {})})
    for change, values in (training.get("run") or {}).items():
        _print_values(change, values)
    _print_values("written by", training.get("shape") or {})
    if (path / SETTINGS).is_file():
        saved = read_json(path / SETTINGS)
        _print_values("versions", saved["versions"])
        _print_values(
            "settings", {k: f"{v['value']}  ({v['origin']})" for k, v in saved["settings"].items()}
        )
    files = {name: _mebibytes(entry.size) for name, entry in read_manifest(path).files.items()}
    _print_values("files", files)
    return 0


def _convert(source: Path, target: Path) -> int:
    from s2s_scale.checkpoint.huggingface import convert

    convert(source, target)
    print(f"{target}: portable, from {source}")
    return 0


def _print_values(title: str, values: dict[str, Any]) -> None:
    if values:
        print(title)
        for name, value in values.items():
            print(f"  {name}: {value}")


def _problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    from s2s_scale.checkpoint import DamagedCheckpoint, check_whole

    try:
        check_whole(path)
        return None
    except DamagedCheckpoint as error:
        return str(error)


def _state(path: Path) -> str:
    from s2s_scale.checkpoint import is_ours

    return "whole" if is_ours(path) else "transformers' own: no checksums to verify"


def _kind_and_step(path: Path) -> tuple[str, str]:
    """Format and step as far as they can be told of a folder that may be damaged."""
    from s2s_scale.checkpoint import DamagedCheckpoint, is_ours, read_manifest

    if not is_ours(path):
        return "transformers", path.name.rpartition("-")[2]
    try:
        manifest = read_manifest(path)
    except DamagedCheckpoint:
        return "?", path.name.rpartition("-")[2]
    return manifest.kind, str(manifest.step)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


EXIT_PROBLEM = 2


def doctor(settings: Settings, words: list[str]) -> int:
    """Examine this machine for a profile; returns 0 where all is well, else 2."""
    own, profile = settings.verb_values, settings.profile
    assert profile is not None
    if own["parity_folder"]:
        return _rank(settings)
    from s2s_scale.doctor.checks import DoctorContext, run_checks

    hostfile = Path(own["hostfile"]) if own["hostfile"] else None
    if own["dry_run"]:
        launch = plan_launch(profile, words, environ=os.environ, options=launch_options_of(own))
        print(describe(launch, environ=os.environ), end="")
        return 0
    from s2s_scale.doctor.report import print_findings

    findings = run_checks(
        DoctorContext(profile, hostfile=hostfile, output_dir=Path(own["output_dir"]))
    )
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
            options=launch_options_of(own),
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


def print_table() -> int:
    """Print every profile that is found and whether it is usable here. Returns the exit code.

    A profile with a mistake has its row too; the mistakes follow on stderr, and the code is 2.
    """
    table = Table(title="Launcher profiles", title_justify="left")
    for heading in ("name", "backend", "launcher", "device", "what for", "usable here"):
        table.add_column(heading, overflow="fold")
    mistakes: list[str] = []
    for name, path in available().items():
        try:
            profile = resolve(str(path))
        except UserError as error:
            mistakes += error.problems
            table.add_row(name, "-", "-", "-", "-", "no: the file has mistakes, see below")
            continue
        reasons = [problem.partition(": ")[2] for problem in profile.unusable()]
        table.add_row(
            name,
            profile.backend,
            profile.launcher,
            profile.device,
            profile.description,
            f"no: {'; '.join(reasons)}" if reasons else "yes",
        )
    table_console().print(table)
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    return 2 if mistakes else 0
