"""What each command does: it is started by a profile, runs here, or prints tables."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2s_scale.config import DEFAULT_FAULT_SECONDS, DEFAULT_GRACE_SECONDS
from s2s_scale.errors import UserError, did_you_mean, raise_problems
from s2s_scale.settings import Settings
from s2s_scale.settings.build import build_settings
from s2s_scale.settings.command_line import parse_line
from s2s_scale.settings.commands import CHECKPOINT_ACTIONS, Command
from s2s_scale.settings.parsing import BOOLS
from s2s_scale.settings.profiles import as_yaml, available, default_profile_name, resolve

if TYPE_CHECKING:
    from s2s_scale.launch.spec import Launch
    from s2s_scale.resilience.supervisor import Ended
    from s2s_scale.settings.commands import LaunchOptions

EXIT_PROBLEM = 2


def run(command: Command, argv: list[str]) -> int:
    """Run the command that ``argv`` begins with; returns the exit code."""
    return _ACTIONS[command.name](command, argv)


# ---- Commands that a profile starts ----


def _launch(command: Command, argv: list[str]) -> int:
    """Start the ranks of a profile, or work here as one of them."""
    from s2s_scale.launch.hosts import check_hosts
    from s2s_scale.launch.launchers import plan_launch
    from s2s_scale.launch.spec import describe
    from s2s_scale.resilience.gcp_maintenance import MaintenanceWatcher
    from s2s_scale.resilience.preemption import handle_preemption

    settings = build_settings(command, argv[1:])
    profile, options = settings.profile, settings.launch
    assert profile is not None and options is not None  # every command that comes here has both
    bare = _without_dry_run(argv)
    launch = plan_launch(profile, bare, environ=os.environ, options=options)
    if command.name == "generate" and not launch.in_process:
        raise UserError(
            f"--profile {profile.name}: 'generate' runs in one process; use a profile without a "
            "launcher, such as --profile cpu"
        )
    if settings.dry_run:
        print(describe(launch, environ=os.environ), end="")
        return 0
    grace_seconds = float(settings.get("grace_seconds", DEFAULT_GRACE_SECONDS))
    if not launch.in_process:
        if launch.remote:
            folder = settings.get("output_dir")
            address = check_hosts(launch.hosts, Path(folder) if folder else None)
            options = dataclasses.replace(options, master_addr=options.master_addr or address)
            launch = plan_launch(profile, bare, environ=os.environ, options=options)
        return _start_ranks(settings, launch, tuple(bare), options, grace_seconds)
    with handle_preemption(grace_seconds) as guard:
        if guard is None or profile.device != "tpu":
            return _work(settings, launch.environment)
        watcher = MaintenanceWatcher(guard.ask)  # one process drives all chips of its host
        watcher.start()
        try:
            return _work(settings, launch.environment)
        finally:
            watcher.stop()


def _without_dry_run(argv: list[str]) -> list[str]:
    """The arguments without ``--dry_run``, however that is written."""
    kept: list[str] = []
    after_flag = False
    for word in argv:
        is_flag = word.partition("=")[0].replace("-", "_") == "__dry_run"
        if not is_flag and not (after_flag and BOOLS.get(word.lower())):
            kept.append(word)
        after_flag = is_flag and "=" not in word
    return kept


def _start_ranks(
    settings: Settings,
    launch: Launch,
    argv: tuple[str, ...],
    options: LaunchOptions,
    grace_seconds: float,
) -> int:
    """Start the ranks, and again after a fault where that is wanted."""
    from s2s_scale.launch.launchers import plan_launch
    from s2s_scale.resilience import supervisor

    profile = settings.profile
    assert profile is not None

    def plan(argv: tuple[str, ...], options: LaunchOptions) -> Launch:
        return plan_launch(profile, argv, environ=os.environ, options=options)

    def start(launch: Launch) -> Ended:
        for note in launch.notes:
            print(f"note: {note}", file=sys.stderr)
        return supervisor.start(launch, environ=os.environ, grace_seconds=grace_seconds)

    return supervisor.run_with_restarts(
        launch,
        supervisor.Command(argv, options, settings.values),
        plan=plan,
        start=start,
        fault_seconds=float(settings.get("fault_timeout_seconds", DEFAULT_FAULT_SECONDS)),
    )


def _work(settings: Settings, environment: Mapping[str, str]) -> int:
    """What a rank does, or the only process."""
    assert settings.profile is not None
    # Before the import below, which brings in torch: it reads the environment once.
    os.environ.update(environment)
    _name_accelerator(settings.profile.device)
    if settings.command == "generate":
        from s2s_scale.runner.generate import generate

        return generate(settings)
    from s2s_scale.runner.train import evaluate, train

    return train(settings) if settings.command == "train" else evaluate(settings)


def _name_accelerator(device: str) -> None:
    """Tell DeepSpeed its device: transformers imports it wherever it is installed.

    Left alone it looks for a device itself, and warns on every run on a CPU that it found no other.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device == "cuda" else "cpu")


# ---- Commands that run here ----


def _plan(command: Command, argv: list[str]) -> int:
    settings = build_settings(command, argv[1:])
    from s2s_scale.runner.plan import plan

    return plan(settings)


def _new_model(command: Command, argv: list[str]) -> int:
    settings = build_settings(command, argv[1:])
    _name_accelerator("cuda" if default_profile_name() == "gpu" else "cpu")
    from s2s_scale.runner.plan import new_model

    return new_model(settings)


def _demo(command: Command, argv: list[str]) -> int:
    settings = build_settings(command, argv[1:])
    _name_accelerator("cpu")
    from s2s_scale import demo

    return int(demo.run(settings))


def _profiles(command: Command, argv: list[str]) -> int:
    """Print one profile, or a table of all and whether each is usable here.

    A profile with a mistake has its row too; the mistakes follow on stderr, and the code is 2.
    """
    line = parse_line(command, argv[1:])
    raise_problems(line.problems)
    if line.positional is not None:
        print(as_yaml(resolve(line.positional)), end="")
        return 0
    from rich.table import Table

    from s2s_scale.utils import table_console

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
    return EXIT_PROBLEM if mistakes else 0


# ---- doctor ----


def _doctor(command: Command, argv: list[str]) -> int:
    """Check this machine for a profile; returns 0 if all is well, else 2."""
    from s2s_scale.launch.launchers import plan_launch
    from s2s_scale.launch.spec import describe

    settings = build_settings(command, argv[1:])
    own, options, profile = settings.options, settings.launch, settings.profile
    assert profile is not None and options is not None
    if own.parity_folder:  # a rank of --parity
        os.environ.update(profile.environment)
        from s2s_scale.doctor.parity import work

        work(profile, Path(own.parity_folder))
        return 0
    if settings.dry_run:
        launch = plan_launch(profile, argv, environ=os.environ, options=options)
        print(describe(launch, environ=os.environ), end="")
        return 0
    from s2s_scale.doctor.checks import DoctorContext, run_checks
    from s2s_scale.doctor.report import print_deviations, print_findings

    hostfile = Path(options.hostfile) if options.hostfile else None
    context = DoctorContext(profile, hostfile=hostfile, output_dir=Path(own.output_dir))
    good = print_findings(run_checks(context), title=f"profile {profile.name}")
    if own.parity and good:
        from s2s_scale.doctor import parity

        # In the output folder, since every host must see it.
        with tempfile.TemporaryDirectory(prefix=".s2s-scale-parity-", dir=own.output_dir) as folder:
            rank_argv = [*argv, "--parity_folder", str(Path(folder).resolve())]
            launch = plan_launch(profile, rank_argv, environ=os.environ, options=options)
            ranks = max(1, len(launch.ranks))
            job = parity.job_for(profile, families=tuple(own.families), ranks=ranks)
            deviations = parity.run(launch, job, Path(folder))
        title = f"{parity.STEPS} steps on {len(launch.ranks)} ranks against one process"
        good = print_deviations(deviations, bound=parity.BOUNDS[profile.device], title=title)
    return 0 if good else EXIT_PROBLEM


# ---- checkpoint ----


def _checkpoint(command: Command, argv: list[str]) -> int:
    """Run one action; returns the exit code: 0, or 2 if a checkpoint is damaged."""
    expected = f"expected one of: {', '.join(CHECKPOINT_ACTIONS)}"
    action = argv[1] if len(argv) > 1 else "-"
    if action.startswith("-"):
        raise UserError(f"checkpoint: no action is given; {expected}")
    if action not in CHECKPOINT_ACTIONS:
        near = did_you_mean(action, CHECKPOINT_ACTIONS)
        raise UserError(f"checkpoint: unknown action '{action}'{near}; {expected}")
    line = parse_line(command, argv[2:])
    problems = list(line.problems)
    if line.positional is None:
        problems.append(f"checkpoint {action}: no FOLDER is given; expected a checkpoint or a run")
    if action != "convert":
        problems += [f"--{name}: has no effect on '{action}'; leave it out" for name in line.values]
    elif not line.values.get("output_dir"):
        problems.append("--output_dir: missing; expected a new folder")
    raise_problems(problems)
    folder = Path(str(line.positional))
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; expected a checkpoint or the folder of a run")
    found = _find_checkpoints(folder)
    if action == "list":
        return _list(folder, found)
    if action == "verify":
        return _verify(found)
    if found != [folder]:
        raise UserError(
            f"{folder}: holds {len(found)} checkpoints; name one of them, such as {found[-1]}"
        )
    if action == "show":
        return _show(folder)
    from s2s_scale.checkpoint.huggingface import convert

    convert(folder, Path(line.values["output_dir"]))
    print(f"{line.values['output_dir']}: portable, from {folder}")
    return 0


def _find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint that ``folder`` is, or those in it, oldest first."""
    from s2s_scale.checkpoint import STATE_FILE, checkpoints, is_ours

    inside = checkpoints(folder)
    if inside:
        return inside
    if is_ours(folder) or ((folder / STATE_FILE).is_file() and (folder / "config.json").is_file()):
        return [folder]
    raise UserError(
        f"{folder}: neither a checkpoint nor a folder with one; expected a checkpoint-N folder"
    )


def _list(folder: Path, found: list[Path]) -> int:
    """A table of the checkpoints, each verified; 0 if all are whole."""
    from rich.table import Table

    from s2s_scale.utils import table_console

    table = Table(title=f"Checkpoints in {folder}", title_justify="left")
    for heading in ("name", "step", "format", "size", "state"):
        table.add_column(heading, overflow="fold")
    damaged = False
    for path in found:
        problem, state = _verify_one(path)
        kind, step = _kind_and_step(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        table.add_row(path.name, step, kind, _mebibytes(size), problem or state)
        damaged = damaged or problem is not None
    table_console().print(table)
    return EXIT_PROBLEM if damaged else 0


def _verify(found: list[Path]) -> int:
    """Read every byte of every checkpoint; a line each, those of damaged ones last."""
    problems = []
    for path in found:
        problem, state = _verify_one(path)
        if problem is None:
            print(f"{path}: {state}")
        else:
            problems.append(problem)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_PROBLEM if problems else 0


def _show(path: Path) -> int:
    """Print what a checkpoint holds and where its run stood."""
    from s2s_scale.checkpoint import TRAINING_STATE, read_manifest
    from s2s_scale.checkpoint.portable import SETTINGS, read_json

    kind, step = _kind_and_step(path)
    problem, state = _verify_one(path)
    print(f"{path}: {kind}, step {step}, {problem or state}")
    if not (path / TRAINING_STATE).is_file():
        return 0
    training = read_json(path / TRAINING_STATE)
    sections: dict[str, dict[str, Any]] = {
        "position": {"epoch": training.get("epoch"), **(training.get("plan") or {})},
        **(training.get("run") or {}),
        "written by": training.get("shape") or {},
    }
    if (path / SETTINGS).is_file():
        saved = read_json(path / SETTINGS)
        sections["versions"] = saved["versions"]
        sections["settings"] = {
            name: f"{entry['value']}  ({entry['origin']})"
            for name, entry in saved["settings"].items()
        }
    files = read_manifest(path).files
    sections["files"] = {name: _mebibytes(entry.size) for name, entry in files.items()}
    for title, values in sections.items():
        if values:
            print(title)
            for name, value in values.items():
                print(f"  {name}: {value}")
    return 0


def _verify_one(path: Path) -> tuple[str | None, str]:
    """What is wrong with a checkpoint's files, None if nothing is, and its state if nothing is."""
    from s2s_scale.checkpoint import DamagedCheckpoint, check_intact, is_ours

    try:
        check_intact(path)
    except DamagedCheckpoint as error:
        return str(error), ""
    return None, "whole" if is_ours(path) else "written by transformers: no checksums to verify"


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


_ACTIONS: dict[str, Callable[[Command, list[str]], int]] = {
    "train": _launch,
    "evaluate": _launch,
    "generate": _launch,
    "plan": _plan,
    "checkpoint": _checkpoint,
    "doctor": _doctor,
    "new-model": _new_model,
    "demo": _demo,
    "profiles": _profiles,
}
