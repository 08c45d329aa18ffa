"""YAML files as entries that remember their lines, so that errors can name them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from s2s_scale.errors import UserError

if TYPE_CHECKING:
    import yaml


class Entry(NamedTuple):
    """One ``key: value`` of a YAML mapping. ``place`` is ``file:line`` of the key."""

    key: str
    node: yaml.Node
    place: str


def read_entries(path: Path) -> tuple[list[Entry], list[str]]:
    """The top-level entries of a YAML file and the problems found (repeated keys).

    An empty file has no entries.

    Raises:
        UserError: the file is missing, is a folder, is not UTF-8, is not valid YAML (with its
            line), or does not hold a mapping.
    """
    import yaml

    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path}: {found}; expected a YAML file with 'name: value' lines")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{path}: not valid YAML: {error.reason}") from None
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise UserError(f"{path}:{line}: expected 'name: value' lines, got a list or one value")
    return mapping_entries(root, path=path)


def mapping_entries(node: yaml.MappingNode, *, path: Path) -> tuple[list[Entry], list[str]]:
    """The entries of one mapping of the file at ``path``, and a problem for each repeated key."""
    entries: dict[str, Entry] = {}
    problems = []
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key.value, str):
            problems.append(f"{place}: expected a name before the colon, got a collection")
            continue
        name = key.value.replace("-", "_")
        if name in entries:
            first = entries[name].place.rpartition(":")[2]
            problems.append(f"{place}: '{name}' is given twice (first in line {first}); keep one")
            continue
        entries[name] = Entry(name, value, place)
    return list(entries.values()), problems
