"""The command line ``s2s-scale``. Imports neither torch nor transformers before work begins."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2s_scale import __version__
from s2s_scale.config import DEFAULT_FAULT_SECONDS, DEFAULT_GRACE_SECONDS
from s2s_scale.errors import EXIT_RESUME, EXIT_USER_ERROR, UserError, did_you_mean
from s2s_scale.launch.spec import reporting_rank, set_rank_env
from s2s_scale.resilience.gcp_maintenance import MaintenanceWatcher
from s2s_scale.resilience.preemption import Stopped, handle_preemption
from s2s_scale.settings import Settings
from s2s_scale.settings.commands import Verb, verbs
from s2s_scale.settings.parsing import TRUE_WORDS

if TYPE_CHECKING:
    from s2s_scale.launch.spec import Launch, LaunchOptions
    from s2s_scale.resilience.supervisor import Command, Ended

HELP_WORDS = ("-h", "--help")
VERSIONS_SHOWN = ("torch", "transformers", "datasets")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2s-scale`` with these words (default: the process's own). Returns the exit code.

    0: done; 2: the user gave something wrong, printed line by line; 85: asked to stop, and to be
    started again; 130: interrupted; 141: what read the output went away. An error in the program
    itself keeps its traceback.
    """
    set_rank_env(os.environ)
    words = _without_local_rank(list(sys.argv[1:] if argv is None else argv))
    try:
        code = _run(words)
        sys.stdout.flush()  # here, so that a closed pipe is met inside this try
        _tell_done(code)
        return code
    except UserError as error:
        if not _told_launcher(error):
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        _tell_done(EXIT_RESUME)
        return EXIT_RESUME
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _without_local_rank(words: list[str]) -> list[str]:
    """A rank's words without what DeepSpeed's launcher puts first; the variables say the same."""
    started = "RANK" in os.environ and words and words[0].startswith("--local_rank=")
    return words[1:] if started else words


def _told_launcher(error: UserError) -> bool:
    """Whether this is a rank whose problems the process that started it prints, once for all."""
    rank = os.environ.get("RANK", "")
    if not rank.isdigit():
        return False
    from s2s_scale.resilience.reports import report_error

    return report_error(error, rank=int(rank))


def _tell_done(code: int) -> None:
    """A rank says that it has come to an orderly end: 0, or interrupted."""
    rank = reporting_rank(os.environ)
    if rank is not None:
        from s2s_scale.resilience.reports import report_done

        report_done(rank=rank, code=code)


def _run(words: list[str]) -> int:
    if not words:
        from s2s_scale.cli.help import overview

        print(overview(), end="", file=sys.stderr)
        return EXIT_USER_ERROR
    if words[0] in HELP_WORDS:
        from s2s_scale.cli.help import overview

        print(overview(), end="")
        return 0
    if words[0] == "--version":
        print(version_line())
        return 0
    verb = _verb(words[0])
    if any(word in HELP_WORDS for word in words[1:]):
        from s2s_scale.cli.help import verb_help

        print(verb_help(verb), end="")
        return 0
    return _ACTIONS[verb.name](verb, words)


def _verb(word: str) -> Verb:
    table = verbs()
    if word not in table and word.replace("_", "-") not in table:
        expected = f"expected one of: {', '.join(table)}"
        if word.startswith("-"):
            raise UserError(f"'{word}' stands before the verb; {expected}")
        raise UserError(f"unknown verb '{word}'{did_you_mean(word, table)}; {expected}")
    return table[word.replace("_", "-")]


def version_line() -> str:
    """``s2s-scale 0.1.0 (Python 3.11.4, torch 2.13.0, …)``, read from the installed packages."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    python = ".".join(str(part) for part in sys.version_info[:3])
    built_on = ", ".join(f"{name} {of(name)}" for name in VERSIONS_SHOWN)
    return f"s2s-scale {__version__} (Python {python}, {built_on})"


def _launched(verb: Verb, words: list[str]) -> int:
    """A verb that a profile starts: the launcher's environment first, then the runner."""
    from s2s_scale.launch.hosts import check_hosts
    from s2s_scale.launch.launchers import plan_launch
    from s2s_scale.launch.spec import describe, launch_options_of
    from s2s_scale.resilience.supervisor import Command
    from s2s_scale.settings.build import build_settings

    settings = build_settings(verb, words[1:])
    assert settings.profile is not None  # every verb that comes here has --profile
    options = launch_options_of(settings.verb_values)
    bare = _without_dry_run(words)
    launch = plan_launch(settings.profile, bare, environ=os.environ, options=options)
    if verb.name == "generate" and not launch.in_process:
        raise UserError(
            f"--profile {settings.profile.name}: 'generate' runs in one process; take a profile "
            "without a launcher, such as --profile cpu"
        )
    if settings.verb_values["dry_run"]:
        print(describe(launch, environ=os.environ), end="")
        return 0
    if not launch.in_process:
        if launch.remote:
            folder = settings.get("output_dir")
            address = check_hosts(launch.hosts, Path(folder) if folder else None)
            options = dataclasses.replace(options, master_addr=options.master_addr or address)
            launch = plan_launch(settings.profile, bare, environ=os.environ, options=options)
        return _start(settings, launch, Command(tuple(bare), options, settings.values))
    with handle_preemption(float(settings.get("grace_seconds", DEFAULT_GRACE_SECONDS))) as guard:
        if guard is None or settings.profile.device != "tpu":
            return _work(verb, settings, launch.environment)
        watch = MaintenanceWatcher(guard.ask)  # one process drives all chips of its host
        watch.start()
        try:
            return _work(verb, settings, launch.environment)
        finally:
            watch.stop()


def _start(settings: Settings, launch: Launch, command: Command) -> int:
    """Start the ranks, and again after a fault where that is wanted."""
    from s2s_scale.launch.launchers import plan_launch
    from s2s_scale.resilience.supervisor import run_with_restarts, start

    profile = settings.profile
    assert profile is not None
    grace = float(settings.get("grace_seconds", DEFAULT_GRACE_SECONDS))

    def plan(words: tuple[str, ...], options: LaunchOptions) -> Launch:
        return plan_launch(profile, words, environ=os.environ, options=options)

    def begin(launch: Launch) -> Ended:
        for note in launch.notes:
            print(f"note: {note}", file=sys.stderr)
        return start(launch, environ=os.environ, grace_seconds=grace)

    fault = float(settings.get("fault_timeout_seconds", DEFAULT_FAULT_SECONDS))
    return run_with_restarts(launch, command, plan=plan, start=begin, fault_seconds=fault)


def _work(verb: Verb, settings: Settings, environment: Mapping[str, str]) -> int:
    """What a rank does, or the only process."""
    assert settings.profile is not None
    # Before the import below, which brings in torch: it reads the environment once.
    os.environ.update(environment)
    _name_accelerator(settings.profile.device)
    if verb.name == "generate":
        from s2s_scale.runner.generate import generate

        return generate(settings)
    from s2s_scale.runner.train import evaluate, train

    return train(settings) if verb.name == "train" else evaluate(settings)


def _name_accelerator(device: str) -> None:
    """Tell DeepSpeed its device: transformers imports it wherever it is installed.

    Left alone it looks for a device itself, and warns on every run on a CPU that it found no other.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device == "cuda" else "cpu")


def _without_dry_run(words: list[str]) -> list[str]:
    """The command line without ``--dry_run``, however that is written."""
    kept: list[str] = []
    after_flag = False
    for word in words:
        flag = word.partition("=")[0].replace("-", "_") == "__dry_run"
        if not flag and not (after_flag and word.lower() in TRUE_WORDS):
            kept.append(word)
        after_flag = flag and "=" not in word
    return kept


def _plan(verb: Verb, words: list[str]) -> int:
    from s2s_scale.settings.build import build_settings

    settings = build_settings(verb, words[1:])
    from s2s_scale.runner.plan import plan

    return plan(settings)


def _new_model(verb: Verb, words: list[str]) -> int:
    from s2s_scale.settings.build import build_settings
    from s2s_scale.settings.profiles import default_profile_name

    settings = build_settings(verb, words[1:])
    _name_accelerator("cuda" if default_profile_name() == "gpu" else "cpu")
    from s2s_scale.runner.plan import new_model

    return new_model(settings)


def _demo(verb: Verb, words: list[str]) -> int:
    from s2s_scale.settings.build import build_settings

    settings = build_settings(verb, words[1:])
    _name_accelerator("cpu")
    from s2s_scale import demo

    return int(demo.run(settings))


def _profiles(verb: Verb, words: list[str]) -> int:
    from s2s_scale.errors import raise_problems
    from s2s_scale.settings.command_line import parse_line
    from s2s_scale.settings.profiles import as_yaml, resolve

    line = parse_line(verb, words[1:])
    raise_problems(line.problems)
    if line.positional is None:
        from s2s_scale.cli.commands import print_table

        return print_table()
    print(as_yaml(resolve(line.positional)), end="")
    return 0


def _doctor(verb: Verb, words: list[str]) -> int:
    from s2s_scale.cli.commands import doctor
    from s2s_scale.settings.build import build_settings

    return doctor(build_settings(verb, words[1:]), words)


def _checkpoint(verb: Verb, words: list[str]) -> int:
    from s2s_scale.cli.commands import checkpoint

    return checkpoint(verb, words[1:])


_ACTIONS: dict[str, Callable[[Verb, list[str]], int]] = {
    "train": _launched,
    "evaluate": _launched,
    "generate": _launched,
    "plan": _plan,
    "checkpoint": _checkpoint,
    "doctor": _doctor,
    "new-model": _new_model,
    "demo": _demo,
    "profiles": _profiles,
}
