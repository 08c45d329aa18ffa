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

from s2s_scale.errors import UserError, did_you_mean, raise_problems, unknown_name
from s2s_scale.settings.options import Option, data_options, model_options, training_options
from s2s_scale.settings.parsing import (
    Entry,
    from_node,
    is_null,
    mapping_entries,
    plain,
    read_entries,
)

BACKENDS = ("local", "fairscale_oss", "torch_fsdp", "deepspeed", "xla")
LAUNCHERS = ("none", "torchrun", "deepspeed")
DEVICES = ("cpu", "cuda", "tpu")
NVIDIA_DEVICE = Path("/dev/nvidiactl")
WSL_DEVICE = Path("/dev/dxg")
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
# The first up to TPU v4, the second from v5 on.
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")

# Backend or launcher -> package that it needs, and the extra that brings it.
PACKAGES = {
    "fairscale_oss": ("fairscale", "oss"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "xla": ("torch-xla", "tpu"),
}
OWN_TORCH = "it is built for one exact torch (2.9.1), so in an environment of its own: "
AUTO = "auto"
PRECISIONS = (AUTO, "fp32")
# Values that are merged with the parent's name by name; all others replace the parent's.
MAPPINGS = ("mesh", "environment", "arguments")
FIELDS = {
    entry.name: entry
    for entry in (
        Option("description", "str", "", "What the profile is for.", "profile"),
        Option("extends", "str", None, "The profile it builds on.", "profile"),
        Option("backend", "str", "local", "Backend adapter.", "profile", choices=BACKENDS),
        Option("launcher", "str", "none", "What starts it.", "profile", choices=LAUNCHERS),
        Option("device", "str", "cpu", "Kind of device.", "profile", choices=DEVICES),
        Option("processes", "str", AUTO, "Processes per node, or auto.", "profile"),
        Option(
            "precision",
            "str",
            "fp32",
            "Of training where no flag says: auto is bf16 where the device has it.",
            "profile",
            choices=PRECISIONS,
        ),
        Option("deepspeed_config", "str", None, "Name or path.", "profile", optional=True),
        *(Option(name, "dict", {}, "Names and values.", "profile") for name in MAPPINGS),
    )
}


@dataclass(frozen=True)
class LauncherProfile:
    """A resolved profile: its parents' values are merged in.

    ``processes`` is a number per node or "auto". ``origins`` maps each field, and each entry of a
    mapping as ``arguments.bf16``, to the ``file:line`` that set it, or to "default".
    """

    name: str
    path: Path
    description: str = ""
    backend: str = "local"
    launcher: str = "none"
    device: str = "cpu"
    processes: int | str = AUTO
    precision: str = "fp32"
    deepspeed_config: str | None = None
    mesh: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def unusable(self) -> list[str]:
        """Why the profile cannot run on this machine, one problem each; empty where it can."""
        problems = [
            f"profile '{self.name}': the package {package} is not installed; "
            + (OWN_TORCH if package == "torch-xla" else "")
            + f"pip install 's2s-scale[{extra}]', or pip install {package}"
            for package, extra in missing_packages(self)
        ]
        if self.device == "cuda" and not cuda_is_here():
            problems.append(
                f"profile '{self.name}': is for device cuda, and no usable CUDA device is here; "
                "take a cpu profile, such as --profile cpu, or install torch with CUDA"
            )
        if self.device == "tpu" and not tpu_chips():
            problems.append(
                f"profile '{self.name}': is for device tpu, and no TPU is here "
                f"({' or '.join(TPU_DEVICES)}); run it on a TPU VM, or take --profile cpu-xla"
            )
        return problems


def tpu_chips() -> list[Path]:
    """The device files of this host's TPU chips."""
    found = (sorted(Path("/").glob(pattern.lstrip("/"))) for pattern in TPU_DEVICES)
    return next((files for files in found if files), [])


def needed_packages(profile: LauncherProfile) -> dict[str, str]:
    """Package that the profile needs -> our extra that brings it."""
    return dict(PACKAGES[name] for name in (profile.backend, profile.launcher) if name in PACKAGES)


def missing_packages(profile: LauncherProfile) -> list[tuple[str, str]]:
    """(package, our extra that brings it) for what the profile needs and is not installed."""
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
    """The profile of a run that names none: ``gpu`` where a CUDA device is usable, or ``cpu``."""
    return "gpu" if cuda_is_here() else "cpu"


def shipped_folder(kind: str) -> Path:
    """The shipped folder ``launchers`` or ``ds_configs``: in a wheel inside the package, in a
    checkout or editable install at the top of the repository.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "_shipped" / kind
    return inside if inside.is_dir() else package.parent / kind


def search_path() -> list[Path]:
    """Folders in which a profile's name is looked up, first found first taken."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    folders = (
        Path("launchers", "profiles"),
        Path(config_home) / "s2s_scale" / "profiles",
        shipped_folder("launchers") / "profiles",
    )
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def available() -> dict[str, Path]:
    """All profiles by name with the file that the name stands for, sorted by name."""
    found: dict[str, Path] = {}
    for folder in search_path():
        for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def resolve(name_or_path: str) -> LauncherProfile:
    """The profile of that name, or in that file, with its parents merged in.

    Raises:
        UserError: no such profile (with the nearest names), or problems in its file or a
            parent's, each with file and line.
    """
    path = _find(name_or_path, skip=(), where="")
    chain = _chain(path)
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for entries in reversed(chain):
        for entry in entries:
            problems += _merge(entry, values, origins)
    raise_problems(problems)
    values.pop("extends", None)
    profile = LauncherProfile(
        name=path.stem,
        path=path,
        **values,
        origins={name: origins.get(name, "default") for name in FIELDS if name != "extends"}
        | origins,
    )
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


def _chain(path: Path) -> list[list[Entry]]:
    """The entries of the file at ``path`` and of each file that it extends, child first."""
    chain: list[list[Entry]] = []
    seen: list[Path] = []
    while True:
        entries, problems = read_entries(path)
        raise_problems(problems)
        chain.append(entries)
        seen.append(path.resolve())
        parent = next((entry for entry in entries if entry.key == "extends"), None)
        if parent is None or is_null(parent.node):
            return chain
        if not isinstance(parent.node.value, str):
            raise UserError(f"{parent.place}: extends: expected the name of one profile")
        path = _parent(parent, path)
        if path.resolve() in seen:
            names = " -> ".join(file.stem for file in (*seen, path))
            raise UserError(f"{parent.place}: extends: profiles extend each other: {names}")


def _parent(entry: Entry, child: Path) -> Path:
    """The file that ``extends`` names: a path from the child's folder, or a profile's name.

    A profile may extend one of its own name from further along the search path, so that
    ``./launchers/profiles/gpu.yaml`` can change a few values of the shipped one.
    """
    name = entry.node.value
    if Path(name).suffix in (".yaml", ".yml") or os.sep in name:
        return _find(str(child.parent / name), skip=(), where=f"{entry.place}: extends: ")
    skip = (child.resolve(),) if name == child.stem else ()
    return _find(name, skip=skip, where=f"{entry.place}: extends: ")


def _merge(entry: Entry, values: dict[str, Any], origins: dict[str, str]) -> list[str]:
    """Put one entry over what the parents gave; returns its problems."""
    option = FIELDS.get(entry.key)
    if option is None:
        near = did_you_mean(entry.key, FIELDS)
        return [
            f"{entry.place}: unknown key '{entry.key}'{near}; expected one of: {', '.join(FIELDS)}"
        ]
    if entry.key in MAPPINGS and not is_null(entry.node):
        return _merge_mapping(entry, values, origins)
    try:
        value: Any = {} if entry.key in MAPPINGS else from_node(option, entry.node)
        values[entry.key] = _processes(value) if entry.key == "processes" else value
    except UserError as error:
        return [f"{entry.place}: {entry.key}: {error}"]
    origins[entry.key] = entry.place
    return []


def _merge_mapping(entry: Entry, values: dict[str, Any], origins: dict[str, str]) -> list[str]:
    """Merge ``arguments``, ``environment`` or ``mesh`` name by name."""
    import yaml

    if not isinstance(entry.node, yaml.MappingNode):
        return [f"{entry.place}: {entry.key}: expected names and values, got '{entry.node.value}'"]
    file = Path(entry.place.rpartition(":")[0])
    entries, problems = mapping_entries(entry.node, path=file)
    merged = values.setdefault(entry.key, {})
    origins[entry.key] = entry.place
    for item in entries:
        try:
            merged[item.key] = _READERS[entry.key](item)
        except UserError as error:
            problems.append(f"{item.place}: {entry.key}: {error}")
            continue
        origins[f"{entry.key}.{item.key}"] = item.place
    return problems


def _argument(item: Entry) -> Any:
    """The typed value of a training flag's default."""
    options = [*model_options(), *data_options(), *training_options()]
    option = next((entry for entry in options if entry.name == item.key), None)
    if option is None:
        near = did_you_mean(item.key, [entry.name for entry in options])
        raise UserError(f"unknown setting '{item.key}'{near}; 's2s-scale train --help' lists them")
    try:
        return from_node(option, item.node)
    except UserError as error:
        raise UserError(f"{item.key}: {error}") from None


def _variable(item: Entry) -> str:
    """The text of an environment variable, as it is written."""
    if not isinstance(item.node.value, str) or not re.fullmatch(r"[A-Za-z_]\w*", item.key):
        raise UserError(f"{item.key}: expected NAME: text for an environment variable")
    return item.node.value


def _axis(item: Entry) -> int:
    """The length of a mesh axis; -1: all devices that are left."""
    value = plain(item.node)
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise UserError(f"{item.key}: expected a number of devices or -1 (all), got '{value}'")
    return value


_READERS = {"arguments": _argument, "environment": _variable, "mesh": _axis}


def _processes(value: str) -> int | str:
    """A number of processes per node, or "auto"."""
    if value == AUTO:
        return AUTO
    if not re.fullmatch(r"[1-9][0-9]*", value):
        raise UserError(f"expected a whole number of at least 1 or auto, got '{value}'")
    return int(value)


def _impossible(profile: LauncherProfile) -> Iterator[str]:
    """Pairs of values that cannot be together, each with the line that set it."""
    at = profile.origins
    if profile.launcher == "deepspeed" and profile.backend == "fairscale_oss":
        yield (
            f"{at['launcher']}: launcher: deepspeed starts ranks for backend deepspeed or local, "
            "not fairscale_oss; take torchrun"
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
    """As ``_impossible``, where backend xla or device tpu is concerned."""
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
            f"host, so {profile.launcher} has nothing to start; take none"
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

    A path in a profile counts from the profile's file, one on the command line from here.

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
                lines.append(_commented(f"  {text}", profile.origins[f"{name}.{key}"]))
        else:
            text = yaml.safe_dump({name: value}, width=1000, allow_unicode=True).strip()
            lines.append(_commented(text, profile.origins[name]))
    return "\n".join(lines) + "\n"


def _commented(text: str, origin: str) -> str:
    return f"{text:<44}  # {origin}"
