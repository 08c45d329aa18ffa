"""Settings of one run: flags over file over profile over defaults, each with its origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s_scale.config import DataArguments
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.settings import Settings
from s2s_scale.settings.command_line import parse_line, unknown_option
from s2s_scale.settings.commands import Verb
from s2s_scale.settings.deepspeed_config import contradictions, read_config
from s2s_scale.settings.parsing import expected, from_node, read_entries
from s2s_scale.settings.profiles import (
    LauncherProfile,
    deepspeed_config_path,
    default_profile_name,
    resolve,
)

COMMAND_LINE = "command line"


def build_settings(verb: Verb, words: Sequence[str]) -> Settings:
    """Parse the words after the verb, read the file and profile that they name, and check all.

    Raises:
        UserError: with every problem of the command line, the file and the profile.
    """
    line = parse_line(verb, words)
    problems = list(line.problems)
    from_file: dict[str, tuple[Any, str]] = {}
    if verb.positional == "FILE" and line.positional is not None:
        from_file = _read_file(verb, Path(line.positional), problems)
    merged = from_file | {name: (value, COMMAND_LINE) for name, value in line.values.items()}
    profile = _profile(verb, merged, problems)
    if profile is not None:
        known = {entry.name for entry in verb.options()}
        defaults = {k: v for k, v in profile.arguments.items() if k in known}
        merged = {k: (v, f"profile {profile.name}") for k, v in defaults.items()} | merged
        problems += _of_deepspeed(profile, {name: value for name, (value, _) in merged.items()})
    problems += _problems_of(verb, {name: value for name, (value, _) in merged.items()}, problems)
    raise_problems(list(dict.fromkeys(problems)))
    return _settings(verb, merged, profile)


def _settings(
    verb: Verb, merged: Mapping[str, tuple[Any, str]], profile: LauncherProfile | None
) -> Settings:
    own = {entry.name: entry.default for entry in verb.own if entry.name != "profile"}
    return Settings(
        verb=verb.name,
        values={k: v for k, (v, _) in merged.items() if k not in own and k != "profile"},
        origins={k: origin for k, (_, origin) in merged.items() if k != "profile"},
        profile=profile,
        verb_values=own | {k: v for k, (v, _) in merged.items() if k in own},
    )


def _read_file(verb: Verb, path: Path, problems: list[str]) -> dict[str, tuple[Any, str]]:
    """Typed values and places of a settings file; what is wrong with it goes into ``problems``."""
    try:
        entries, found = read_entries(path)
    except UserError as error:
        problems.extend(error.problems)
        return {}
    problems.extend(found)
    options = {name: entry for entry in verb.options() for name in (entry.name, *entry.aliases)}
    result: dict[str, tuple[Any, str]] = {}
    for key, node, place in entries:
        option = options.get(key)
        if option is None:
            problems.append(f"{place}: {unknown_option(key, verb=verb, written=key)}")
            continue
        if option.name in result:
            problems.append(f"{place}: '{option.name}' is given twice; keep one")
            continue
        try:
            result[option.name] = (from_node(option, node), place)
        except UserError as error:
            problems.append(f"{place}: {key}: {error}")
    return result


def _profile(
    verb: Verb, merged: Mapping[str, tuple[Any, str]], problems: list[str]
) -> LauncherProfile | None:
    """The profile that is named or, for a verb that starts something, this machine's default."""
    if not any(entry.name == "profile" for entry in verb.own):
        return None
    name, origin = merged.get("profile", (None, ""))
    if name is None:
        use_cpu = merged.get("use_cpu", (False, ""))[0]
        name = "cpu" if use_cpu else default_profile_name()
    try:
        profile = resolve(name)
    except UserError as error:
        where = f"{origin}: " if origin not in ("", COMMAND_LINE) else ""
        problems.extend(f"{where}{problem}" for problem in error.problems)
        return None
    # doctor shows them in its table, with whatever else there is.
    if not merged.get("dry_run", (False, ""))[0] and verb.name != "doctor":
        problems.extend(profile.unusable())
    return profile


def _of_deepspeed(profile: LauncherProfile, given: Mapping[str, Any]) -> list[str]:
    """Problems of the DeepSpeed configuration that the profile or ``--deepspeed`` names."""
    flag = given.get("deepspeed")
    if profile.backend != "deepspeed":
        if not flag:
            return []
        return [
            f"--deepspeed {flag}: has no effect with profile '{profile.name}' (backend "
            f"{profile.backend}); take a profile for DeepSpeed, such as cpu-zero2 or gpu-zero2"
        ]
    if not flag and not profile.deepspeed_config:
        return [f"profile '{profile.name}': no deepspeed_config; name one there or by --deepspeed"]
    try:
        if flag:
            path = deepspeed_config_path(flag)
        else:
            path = deepspeed_config_path(str(profile.deepspeed_config), profile)
        return [f"{path}: {line}" for line in contradictions(read_config(path), given)]
    except UserError as error:
        return list(error.problems)


def _problems_of(verb: Verb, given: Mapping[str, Any], so_far: Sequence[str]) -> list[str]:
    """Missing options, values out of range, and combinations that cannot be.

    An option that was written with a wrong value is in ``so_far`` already and not missing.
    """
    with_defaults = {entry.name: entry.default for entry in verb.own} | dict(given)
    problems = [
        f"--{entry.name}: missing; expected {expected(entry)}. {entry.help}"
        for entry in verb.options()
        if entry.required and with_defaults.get(entry.name) is None
        if not any(f"{entry.name}: " in problem for problem in so_far)
    ]
    if verb.check is not None:
        problems += verb.check(with_defaults)
    data_names = {entry.name for entry in dataclasses.fields(DataArguments)}
    try:
        DataArguments(**{k: v for k, v in given.items() if k in data_names}).validate()
    except UserError as error:
        problems += error.problems
    return problems
