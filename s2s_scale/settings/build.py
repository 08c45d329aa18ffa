"""Settings of one command: flags over file over profile over defaults, each with its origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s_scale.config import DataArguments
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.settings import Settings
from s2s_scale.settings.command_line import find_option, parse_line
from s2s_scale.settings.commands import Command, LaunchOptions
from s2s_scale.settings.deepspeed_config import contradictions, read_config
from s2s_scale.settings.options import options_of
from s2s_scale.settings.parsing import COMMAND_LINE, convert_entries, expected, read_entries
from s2s_scale.settings.profiles import (
    LauncherProfile,
    deepspeed_config_path,
    default_profile_name,
    resolve,
)


def build_settings(command: Command, argv: Sequence[str]) -> Settings:
    """Parse what follows the command's name, read the file and profile it names, and check all.

    Raises:
        UserError: with every problem of the command line, the file and the profile.
    """
    line = parse_line(command, argv)
    problems = list(line.problems)
    merged: dict[str, tuple[Any, str]] = {}
    if command.positional == "FILE" and line.positional is not None:
        try:
            entries, repeated = read_entries(Path(line.positional))
            merged, wrong = convert_entries(entries, lambda entry: find_option(command, entry))
            problems += repeated + wrong
        except UserError as error:
            problems += error.problems
    merged |= {name: (value, COMMAND_LINE) for name, value in line.values.items()}
    profile = _find_profile(command, merged, problems) if command.launched else None
    if profile is not None:
        known = {option.name for option in command.options()}
        origin = f"profile {profile.name}"
        merged = {k: (v, origin) for k, v in profile.arguments.items() if k in known} | merged
        problems += _check_deepspeed(profile, {name: value for name, (value, _) in merged.items()})
    given = {name: value for name, (value, _) in merged.items()}
    problems += _check_values(command, given, problems)
    raise_problems(list(dict.fromkeys(problems)))

    def build(cls: type | None) -> Any:
        """The dataclass of options with the values given; they leave ``given``."""
        names = [option.name for option in options_of(cls)] if cls is not None else []
        own = {name: given.pop(name) for name in names if name in given}
        return None if cls is None else cls(**own)

    given.pop("profile", None)
    return Settings(
        command=command.name,
        options=build(command.own),
        launch=build(LaunchOptions if command.launched else None),
        dry_run=given.pop("dry_run", False),
        values=given,
        origins={name: origin for name, (_, origin) in merged.items() if name != "profile"},
        profile=profile,
    )


def _find_profile(
    command: Command, merged: Mapping[str, tuple[Any, str]], problems: list[str]
) -> LauncherProfile | None:
    """The profile that is named or this machine's default; its problems go to ``problems``."""
    name, origin = merged.get("profile", (None, COMMAND_LINE))
    if name is None:
        use_cpu = merged.get("use_cpu", (False, ""))[0]
        name = "cpu" if use_cpu else default_profile_name()
    try:
        profile = resolve(name)
    except UserError as error:
        where = "" if origin == COMMAND_LINE else f"{origin}: "
        problems.extend(f"{where}{problem}" for problem in error.problems)
        return None
    # doctor shows them in its table, with whatever else there is.
    if not merged.get("dry_run", (False, ""))[0] and command.name != "doctor":
        problems.extend(profile.unusable())
    return profile


def _check_deepspeed(profile: LauncherProfile, given: Mapping[str, Any]) -> list[str]:
    """Problems of the DeepSpeed configuration that the profile or ``--deepspeed`` names."""
    flag = given.get("deepspeed")
    if profile.backend != "deepspeed":
        if not flag:
            return []
        return [
            f"--deepspeed {flag}: has no effect with profile '{profile.name}' (backend "
            f"{profile.backend}); use a profile for DeepSpeed, such as cpu-zero2 or gpu-zero2"
        ]
    if not flag and not profile.deepspeed_config:
        return [f"profile '{profile.name}': no deepspeed_config; set it there or by --deepspeed"]
    try:
        if flag:
            path = deepspeed_config_path(flag)
        else:
            path = deepspeed_config_path(str(profile.deepspeed_config), profile)
        return [f"{path}: {line}" for line in contradictions(read_config(path), given)]
    except UserError as error:
        return list(error.problems)


def _check_values(command: Command, given: Mapping[str, Any], so_far: Sequence[str]) -> list[str]:
    """Missing options, values out of range, and combinations that cannot be.

    An option that was written with a wrong value is in ``so_far`` already and not missing.
    """
    own = command.own_options()
    with_defaults = {option.name: option.default for option in own} | dict(given)
    problems = [
        f"--{option.name}: missing; expected {expected(option)}. {option.help}"
        for option in command.options()
        if option.required and not with_defaults.get(option.name)
        if not any(f"{option.name}: " in problem for problem in so_far)
    ]
    if command.check is not None:
        problems += command.check(with_defaults)
    problems += [
        f"--{option.name}: expected a whole number of at least {option.least}, got {value}"
        for option in own
        if option.least is not None
        if (value := given.get(option.name)) is not None and value < option.least
    ]
    port = given.get("master_port")
    if port is not None and not 1 <= port <= 65535:
        problems.append(f"--master_port: expected a port from 1 to 65535, got {port}")
    data_names = {entry.name for entry in dataclasses.fields(DataArguments)}
    try:
        DataArguments(**{k: v for k, v in given.items() if k in data_names}).validate()
    except UserError as error:
        problems += error.problems
    return problems
