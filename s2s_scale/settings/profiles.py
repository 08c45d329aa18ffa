"""Launcher profiles: which backend a run uses, how it is started, and its default settings.

A profile is a YAML file, found by name in ``./launchers/profiles``, the user's configuration
folder and the profiles that ship with the package, in that order, or given by its path.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2s_scale.config import DataArguments, ModelArguments, setting
from s2s_scale.errors import UserError, did_you_mean, raise_problems, unknown_name
from s2s_scale.settings.options import Option, options_of, training_options
from s2s_scale.settings.parsing import (
    Entry,
    convert_entries,
    mapping_entries,
    read_entries,
)

BACKEND_NAMES = ("local", "fairscale_oss", "torch_fsdp", "deepspeed", "xla")
LAUNCHERS = ("none", "torchrun", "deepspeed")
DEVICES = ("cpu", "cuda", "tpu")
NVIDIA_DEVICE = Path("/dev/nvidiactl")
WSL_DEVICE = Path("/dev/dxg")
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
# The first up to TPU v4, the second from v5 on.
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")

# Backend or launcher -> package that it needs, and the extra that installs it.
PACKAGES = {
    "fairscale_oss": ("fairscale", "oss"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "xla": ("torch-xla", "tpu"),
}
OWN_TORCH = "it is built for one exact torch (2.9.1), so in an environment of its own: "
AUTO = "auto"
PRECISIONS = (AUTO, "fp32")


@dataclass(frozen=True)
class LauncherProfile:
    """A resolved profile: its parents' values are merged in.

    ``processes`` is a number per node or "auto". ``origins`` maps each field, and each entry of a
    mapping as ``arguments.bf16``, to the ``file:line`` that set it, or to "default".
    """

    name: str
    path: Path
    description: str = setting("", "profile", "What the profile is for.")
    backend: str = setting("local", "profile", "Backend adapter.", choices=BACKEND_NAMES)
    launcher: str = setting("none", "profile", "What starts the ranks.", choices=LAUNCHERS)
    device: str = setting("cpu", "profile", "Kind of device.", choices=DEVICES)
    processes: int | str = setting(AUTO, "profile", "Processes per node, or auto.")
    precision: str = setting(
        "fp32",
        "profile",
        "Precision of training unless a flag sets it: auto is bf16 if the device supports it.",
        choices=PRECISIONS,
    )
    deepspeed_config: str | None = setting(None, "profile", "Name or path.")
    mesh: dict[str, int] = setting({}, "profile", "Axis and number of devices.")
    environment: dict[str, str] = setting({}, "profile", "Variable and text.")
    arguments: dict[str, Any] = setting({}, "profile", "Training setting and default.")
    origins: dict[str, str] = field(default_factory=dict)

    def unusable(self) -> list[str]:
        """Why the profile cannot run on this machine, one problem each; empty if it can."""
        problems = [
            f"profile '{self.name}': the package {package} is not installed; "
            + (OWN_TORCH if package == "torch-xla" else "")
            + f"pip install 's2s-scale[{extra}]', or pip install {package}"
            for package, extra in missing_packages(self)
        ]
        if self.device == "cuda" and not cuda_is_here():
            problems.append(
                f"profile '{self.name}': is for device cuda, and no usable CUDA device is here; "
                "use a cpu profile, such as --profile cpu, or install torch with CUDA"
            )
        if self.device == "tpu" and not tpu_chips():
            problems.append(
                f"profile '{self.name}': is for device tpu, and no TPU is here "
                f"({' or '.join(TPU_DEVICES)}); run it on a TPU VM, or use --profile cpu-xla"
            )
        return problems


def tpu_chips() -> list[Path]:
    """The device files of this host's TPU chips."""
    found = (sorted(Path("/").glob(pattern.lstrip("/"))) for pattern in TPU_DEVICES)
    return next((files for files in found if files), [])


def needed_packages(profile: LauncherProfile) -> dict[str, str]:
    """Package that the profile needs -> our extra that installs it."""
    return dict(PACKAGES[name] for name in (profile.backend, profile.launcher) if name in PACKAGES)


def missing_packages(profile: LauncherProfile) -> list[tuple[str, str]]:
    """(package, our extra that installs it) for what the profile needs and is missing."""
    return sorted(
        (package, extra)
        for package, extra in needed_packages(profile).items()
        if importlib.machinery.PathFinder.find_spec(package.replace("-", "_")) is None
    )


def cuda_is_here() -> bool:
    """Whether a CUDA device and a torch built for CUDA are here, found without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    spec = importlib.machinery.PathFinder.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    built = Path(next(iter(spec.submodule_search_locations)), "lib", "libtorch_cuda.so").exists()
    return built and (NVIDIA_DEVICE.exists() or WSL_DEVICE.exists())


def cuda_devices(environ: Mapping[str, str]) -> list[str]:
    """Names of the CUDA devices that may be used, such as ["0", "1"], without importing torch.

    Those of CUDA_VISIBLE_DEVICES, else one per GPU that the NVIDIA driver lists.
    """
    allowed = environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name.strip() for name in allowed.split(",") if name.strip() not in ("", "-1")]
    listed = list(NVIDIA_GPUS.iterdir()) if NVIDIA_GPUS.is_dir() else []
    return [str(number) for number in range(len(listed))]


def default_profile_name() -> str:
    """The profile of a run that names none: ``gpu`` if a CUDA device is usable, else ``cpu``."""
    return "gpu" if cuda_is_here() else "cpu"


def shipped_folder(kind: str) -> Path:
    """The shipped folder ``launchers`` or ``ds_configs``: in a wheel inside the package, in a
    checkout or editable install at the top of the repository.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "_shipped" / kind
    return inside if inside.is_dir() else package.parent / kind


def search_path() -> list[Path]:
    """Folders in which a profile is looked up by name; the first match is used."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    folders = (
        Path("launchers", "profiles"),
        Path(config_home) / "s2s_scale" / "profiles",
        shipped_folder("launchers") / "profiles",
    )
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def available() -> dict[str, Path]:
    """The file of each profile by name, sorted by name."""
    found: dict[str, Path] = {}
    for folder in search_path():
        for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


EXTENDS = Option("extends", "str", None, "The profile it builds on.", "profile", optional=True)
FIELDS = {"extends": EXTENDS} | {entry.name: entry for entry in options_of(LauncherProfile)}
# Merged with the parent's value, name by name; all other values replace the parent's.
MAPPINGS = ("mesh", "environment", "arguments")


def resolve(name_or_path: str) -> LauncherProfile:
    """The profile of that name, or in that file, with its parents merged in.

    Raises:
        UserError: no such profile (with the nearest names), or problems in its file or a
            parent's, each with file and line.
    """
    path = _find(name_or_path, skip=(), where="")
    chain, problems = _read_chain(path)
    values: dict[str, Any] = {}
    origins = {name: "default" for name in FIELDS if name != "extends"}
    for entries in reversed(chain):
        problems += _merge(entries, values, origins)
    raise_problems(problems)
    profile = LauncherProfile(path.stem, path, **values, origins=origins)
    raise_problems(list(_impossible(profile)))
    return profile


def _find(name: str, *, skip: tuple[Path, ...], where: str) -> Path:
    """The file of a profile by name or path; ``where`` is put before the error."""
    written = Path(name)
    if written.suffix in (".yaml", ".yml") or os.sep in name:
        if written.is_file():
            return written
        raise UserError(f"{where}profile file '{name}' does not exist")
    for folder in search_path():
        for path in (folder / f"{name}.yaml", folder / f"{name}.yml"):
            if path.is_file() and path.resolve() not in skip:
                return path
    names = list(available())
    raise UserError(
        f"{where}unknown profile '{name}'{did_you_mean(name, names)}; expected the path of a YAML "
        f"file or one of: {', '.join(names)}"
    )


def _read_chain(path: Path) -> tuple[list[list[Entry]], list[str]]:
    """The entries of the file at ``path`` and of each file that it extends, child first.

    ``extends`` is a path relative to the child's folder, or the name of a profile. A profile may
    extend one of its own name from later in the search path, so that
    ``./launchers/profiles/gpu.yaml`` can change a few values of the shipped one.
    """
    chain: list[list[Entry]] = []
    problems: list[str] = []
    seen: list[Path] = []
    while True:
        entries, repeated = read_entries(path)
        problems += repeated
        chain.append(entries)
        seen.append(path.resolve())
        parent = next((entry for entry in entries if entry.name == "extends"), None)
        if parent is None or parent.written is None:
            return chain, problems
        where, name = f"{parent.place}: extends: ", parent.written
        if not isinstance(name, str):
            raise UserError(*problems, f"{where}expected the name of one profile")
        if Path(name).suffix in (".yaml", ".yml") or os.sep in name:
            path = _find(str(path.parent / name), skip=(), where=where)
        else:
            skip = (path.resolve(),) if name == path.stem else ()
            path = _find(name, skip=skip, where=where)
        if path.resolve() in seen:
            names = " -> ".join(file.stem for file in (*seen, path))
            raise UserError(*problems, f"{where}profiles extend each other: {names}")


def _merge(entries: list[Entry], values: dict[str, Any], origins: dict[str, str]) -> list[str]:
    """Put the entries of one file over what its parents gave; returns its problems."""

    def find_field(entry: Entry) -> Option:
        if entry.name in FIELDS:
            return FIELDS[entry.name]
        near = did_you_mean(entry.label, FIELDS)
        raise UserError(f"unknown key '{entry.label}'{near}; expected one of: {', '.join(FIELDS)}")

    mappings = [entry for entry in entries if entry.name in MAPPINGS]
    found, problems = convert_entries(
        [entry for entry in entries if entry.name not in MAPPINGS], find_field
    )
    found.pop("extends", None)
    count, place = found.get("processes", (AUTO, ""))
    if count != AUTO and (isinstance(count, str) or count < 1):
        problems.append(
            f"{place}: processes: expected a whole number of at least 1 or auto, got '{count}'"
        )
    for name, (value, place) in found.items():
        values[name], origins[name] = value, place
    for entry in mappings:
        origins[entry.name] = entry.place
        if entry.written is None:
            values[entry.name] = {}
            continue
        if isinstance(entry.written, (str, list)):
            problems.append(
                f"{entry.place}: {entry.name}: expected names and values, got '{entry.written}'"
            )
            continue
        file = Path(entry.place.rpartition(":")[0])
        inner, repeated = mapping_entries(entry.written, path=file)
        items, wrong = convert_entries(inner, _ITEMS[entry.name], within=f"{entry.name}: ")
        problems += repeated + wrong
        merged = values.setdefault(entry.name, {})
        for name, (value, place) in items.items():
            if entry.name == "mesh" and value < 1 and value != -1:
                problems.append(
                    f"{place}: mesh: {name}: expected a number of devices or -1 (all), got {value}"
                )
            merged[name], origins[f"{entry.name}.{name}"] = value, place
    return problems


def _find_argument(entry: Entry) -> Option:
    options = (*options_of(ModelArguments), *options_of(DataArguments), *training_options())
    by_name = {option.name: option for option in options}
    if entry.name not in by_name:
        near = did_you_mean(entry.label, by_name)
        raise UserError(
            f"unknown setting '{entry.label}'{near}; 's2s-scale train --help' lists them"
        )
    return by_name[entry.name]


def _find_variable(entry: Entry) -> Option:
    if not re.fullmatch(r"[A-Za-z_]\w*", entry.label):
        raise UserError(f"{entry.label}: expected the name of an environment variable")
    return Option(entry.label, "str", "", "Its text.", "profile")


def _find_axis(entry: Entry) -> Option:
    return Option(entry.name, "int", -1, "Its length; -1: all devices that are left.", "profile")


_ITEMS = {"arguments": _find_argument, "environment": _find_variable, "mesh": _find_axis}


def _impossible(profile: LauncherProfile) -> Iterator[str]:
    """Values that contradict each other, each with the line that set it."""
    at = profile.origins
    if profile.launcher == "deepspeed" and profile.backend == "fairscale_oss":
        yield (
            f"{at['launcher']}: launcher: deepspeed starts ranks for backend deepspeed or local, "
            "not fairscale_oss; use torchrun"
        )
    if profile.deepspeed_config is not None and profile.backend != "deepspeed":
        yield (
            f"{at['deepspeed_config']}: deepspeed_config: has no effect with backend "
            f"{profile.backend}; leave it out"
        )
    if profile.mesh and profile.backend != "xla":
        yield f"{at['mesh']}: mesh: has no effect with backend {profile.backend}; leave it out"
    yield from _impossible_on_xla(profile)
    if profile.launcher == "none" and profile.processes not in (AUTO, 1):
        yield (
            f"{at['processes']}: processes: launcher none starts one process, "
            f"got {profile.processes}; leave it out or choose a launcher"
        )
    if profile.device == "cuda" and profile.arguments.get("use_cpu"):
        yield (
            f"{at['arguments.use_cpu']}: arguments: use_cpu: contradicts device cuda; "
            "change one of them"
        )


def _impossible_on_xla(profile: LauncherProfile) -> Iterator[str]:
    """As ``_impossible``, for backend xla and device tpu."""
    at = profile.origins
    if profile.device == "tpu" and profile.backend != "xla":
        yield (
            f"{at['device']}: device: tpu needs backend xla, not {profile.backend}; "
            "change one of them"
        )
    if profile.backend != "xla":
        return
    if profile.device == "cuda":
        yield f"{at['device']}: device: backend xla runs on tpu or cpu, not cuda; change it"
    if profile.launcher != "none":
        yield (
            f"{at['launcher']}: launcher: with backend xla one process drives all devices of a "
            f"host, so {profile.launcher} has nothing to start; use none"
        )
    unknown = sorted(set(profile.mesh) - {"data", "fsdp"})
    if unknown:
        yield f"{at['mesh']}: mesh: unknown axis '{unknown[0]}'; expected data and fsdp"
    if not profile.mesh:
        yield (
            f"{at['backend']}: backend: xla needs a mesh; give mesh: {{data: -1}}, or "
            "{data: 1, fsdp: -1} to divide the weights too"
        )


def deepspeed_config_path(value: str, profile: LauncherProfile | None = None) -> Path:
    """The file of a DeepSpeed configuration: one of ``ds_configs/`` by name, or a path.

    A path in a profile is relative to the profile's file, one on the command line to the working
    directory.

    Raises:
        UserError: no such file; names the shipped ones.
    """
    written = Path(value)
    if written.suffix == ".json" or os.sep in value:
        place = profile.path.parent / written if profile is not None else written
        if place.is_file():
            return place
        raise UserError(f"deepspeed_config: file '{place}' does not exist")
    shipped = {path.stem: path for path in sorted(shipped_folder("ds_configs").glob("*.json"))}
    if value not in shipped:
        raise unknown_name("deepspeed_config", value, list(shipped))
    return shipped[value]


def as_yaml(profile: LauncherProfile) -> str:
    """The resolved profile as YAML, each value with its origin as a comment."""
    import yaml

    lines = [f"# profile {profile.name}, from {profile.path}"]
    for name in FIELDS:
        if name == "extends":
            continue
        value = getattr(profile, name)
        if isinstance(value, dict) and value:
            lines.append(f"{name}:")
            for key, entry in value.items():
                text = yaml.safe_dump({key: entry}).strip().replace("\n", "\n  ")
                lines.append(f"{'  ' + text:<44}  # {profile.origins[f'{name}.{key}']}")
        else:
            text = yaml.safe_dump({name: value}, width=1000, allow_unicode=True).strip()
            lines.append(f"{text:<44}  # {profile.origins[name]}")
    return "\n".join(lines) + "\n"
