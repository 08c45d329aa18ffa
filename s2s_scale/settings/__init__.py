"""What a run was asked to do, and where each setting came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2s_scale.settings.profiles import LauncherProfile


@dataclass(frozen=True)
class Settings:
    """What a verb was asked to do.

    ``values`` holds the model, data and training settings that were given, typed; what is absent
    has its dataclass's default. ``origins`` says where each of them came from: "command line",
    "conf.yaml:7" or "profile gpu". ``verb_values`` holds the verb's own options, defaults included.
    ``profile`` is None for verbs that start nothing.
    """

    verb: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    profile: LauncherProfile | None = None
    verb_values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a setting or of the verb's own option, or ``default``."""
        return self.verb_values.get(name, self.values.get(name, default))


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
