"""Register of the private parts of other libraries that this package relies on.

A function that uses a private name of another library, or replaces one of its functions, stands in
a file named ``patches.py`` or ``compat.py`` of the folder concerned and is decorated with
``relies_on``. ``s2s-scale doctor`` checks the whole register: an installed version outside the
range that was checked is a warning, a name that is gone or a changed signature is an error.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from s2s_scale.utils import package_version

F = TypeVar("F", bound=Callable[..., Any])

MODULES = (
    "s2s_scale.backends.compat",
    "s2s_scale.backends.deepspeed.patches",
    "s2s_scale.backends.fairscale_oss.patches",
    "s2s_scale.backends.torch_fsdp.patches",
    "s2s_scale.backends.xla.patches",
    "s2s_scale.doctor.compat",
    "s2s_scale.evaluation.compat",
    "s2s_scale.generation.compat",
    "s2s_scale.trainer.compat",
    "s2s_scale.resilience.compat",
    "s2s_scale.checkpoint.compat",
    "s2s_scale.cpu.compat",
    "s2s_scale.data.compat",
    "s2s_scale.models.compat",
)
"""The files that hold registered functions; each imports the library concerned when called."""

REGISTER: list[Reliance] = []


@dataclass(frozen=True)
class Reliance:
    """One function of ours and the private names of one library that it relies on.

    ``function``: its qualified name. ``reason``: why no public name will do, one sentence.
    ``checked``: first and last version of the library that it was tested with, such as
    ``("5.17", "5.23")``. ``uses``: dotted name -> names of the parameters that it must have, in
    order and without ``self``; None where it is no function, or its parameters do not matter.
    """

    function: str
    library: str
    reason: str
    checked: tuple[str, str]
    uses: Mapping[str, Sequence[str] | None]


def relies_on(
    library: str,
    *,
    checked: tuple[str, str],
    reason: str,
    uses: Mapping[str, Sequence[str] | None],
) -> Callable[[F], F]:
    """Register the decorated function or class; see ``Reliance`` for the arguments."""

    def register(function: F) -> F:
        name = f"{function.__module__}.{function.__qualname__}"
        REGISTER.append(Reliance(name, library, reason, checked, uses))
        return function

    return register


@dataclass(frozen=True)
class Verdict:
    """How one entry of the register fares with the installed library.

    ``installed``: the library's version, None where it is not installed. ``warning``: a version
    outside the checked range; ``error``: a name that is gone or has another signature.
    """

    reliance: Reliance
    installed: str | None
    warning: str | None = None
    error: str | None = None


def check_register(
    modules: Iterable[str] = MODULES, *, libraries: Container[str] | None = None
) -> list[Verdict]:
    """Check the entries of ``libraries``, by default all, against what is installed.

    Libraries that are installed are imported.
    """
    for module in modules:
        importlib.import_module(module)
    return [
        _verdict(reliance)
        for reliance in REGISTER
        if libraries is None or reliance.library in libraries
    ]


def _verdict(reliance: Reliance) -> Verdict:
    installed = package_version(reliance.library)
    if installed is None:
        return Verdict(reliance, None)
    first, last = reliance.checked
    warning = None
    if not _minor(first) <= _minor(installed) <= _minor(last):
        warning = f"{reliance.library} {installed}: was checked with {first} to {last} only"
    for name, parameters in reliance.uses.items():
        problem = _problem(name, parameters)
        if problem:
            return Verdict(
                reliance, installed, warning, f"{reliance.library} {installed}: {problem}"
            )
    return Verdict(reliance, installed, warning)


def _minor(text: str) -> tuple[int, int]:
    """Major and minor version; ``5.23.0.dev1`` gives (5, 23)."""
    major, minor, *_ = [int(number) for number in re.findall(r"\d+", text)] + [0, 0]
    return major, minor


def _problem(name: str, parameters: Sequence[str] | None) -> str | None:
    """What is wrong with a dotted name, if anything."""
    parts = name.split(".")
    found: Any = None
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for attribute in parts[count:]:
            if not hasattr(found, attribute):
                return f"{name} is gone"
            found = getattr(found, attribute)
        break
    else:
        return f"{name} is gone"
    if parameters is None:
        return None
    actual = [p for p in inspect.signature(found).parameters if p != "self"]
    if actual == list(parameters):
        return None
    return f"{name} takes ({', '.join(actual)}), expected ({', '.join(parameters)})"
