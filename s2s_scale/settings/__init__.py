"""What a command was asked to do, and where each setting came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2s_scale.settings.commands import LaunchOptions
    from s2s_scale.settings.profiles import LauncherProfile


@dataclass(frozen=True)
class Settings:
    """What a command was asked to do.

    ``values`` holds the model, data and training settings that were given, typed; what is absent
    has its dataclass's default. ``origins`` says where each setting came from: "command line",
    "conf.yaml:7" or "profile gpu". ``options`` are the command's own options, an instance of its
    dataclass in ``settings.commands``. ``profile`` and ``launch`` are None for commands that no
    profile starts.
    """

    command: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    options: Any = None
    profile: LauncherProfile | None = None
    launch: LaunchOptions | None = None
    dry_run: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a setting that was given, or of an own option, or ``default``."""
        return self.values.get(name, getattr(self.options, name, default))


def split_settings(values: Mapping[str, Any], *classes: type) -> tuple[dict[str, Any], ...]:
    """The part of ``values`` that each dataclass takes, in the order of ``classes``.

    Raises:
        KeyError: no class has a field of that name; an error in the program, since names from
            the user are checked before.
    """
    names = [{entry.name for entry in dataclasses.fields(cls) if entry.init} for cls in classes]
    homeless = set(values) - set().union(*names)
    if homeless:
        raise KeyError(f"no settings class has {sorted(homeless)}")
    return tuple({k: v for k, v in values.items() if k in known} for known in names)
