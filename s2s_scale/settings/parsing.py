"""Written values into typed ones: words of a command line and nodes of a YAML file.

YAML nodes are converted by the option's type and not by YAML's own rules, because those read
``3e-4`` as text and ``no``, a value of several options, as false.

YAML files as entries that remember their lines, so that errors can name them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from s2s_scale.errors import UserError, did_you_mean
from s2s_scale.settings.options import Option

if TYPE_CHECKING:
    import yaml


TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NONE_WORDS = ("none", "null")
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a JSON object or the path of a JSON file",
}


def expected(option: Option) -> str:
    """What an option takes, in words, such as ``a whole number``."""
    if option.choices:
        return f"one of: {', '.join(option.choices)}"
    # Text is the way in which a dict is written, so 'dict|str' is a dict to the reader.
    kinds = [kind for kind in option.kinds if not (kind == "str" and "dict" in option.kinds)]
    words = [
        f"a list of {kind[5:-1]} values" if kind.startswith("list[") else EXPECTED[kind]
        for kind in kinds
    ]
    return " or ".join(words)


def from_words(option: Option, words: Sequence[str]) -> Any:
    """The typed value of a flag followed by ``words`` (more than one for lists only).

    Raises:
        UserError: "expected …, got '…'", without the option's name, which the caller puts first.
    """
    if option.is_list and not (len(words) == 1 and "str" in option.kinds):
        return [_checked(option, _scalar(option, option.item_kind, word)) for word in words]
    (word,) = words
    # 'none' is a text like any other where text is allowed, such as for --report_to.
    if option.optional and "str" not in option.kinds and word.lower() in NONE_WORDS:
        return None
    for kind in ("bool", "dict", "int", "float", "str"):
        if kind in option.kinds:
            try:
                return _checked(option, _scalar(option, kind, word))
            except _NotOfKind:
                continue
    raise _mismatch(option, word)


def from_node(option: Option, node: yaml.Node) -> Any:
    """The typed value of a YAML node. Raises ``UserError`` as ``from_words`` does."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        if not option.is_list:
            raise UserError(f"expected {expected(option)}, got a list")
        return [
            _checked(option, _scalar(option, option.item_kind, _text(option, item)))
            for item in node.value
        ]
    if isinstance(node, yaml.MappingNode):
        if "dict" not in option.kinds:
            raise UserError(f"expected {expected(option)}, got a mapping of names to values")
        return plain(node)
    if is_null(node):
        if not option.optional:
            raise UserError(f"expected {expected(option)}, got nothing")
        return None
    return from_words(option, [node.value])


def is_null(node: yaml.Node) -> bool:
    """Whether a YAML node is an unquoted null, ``~`` or nothing at all."""
    return bool(node.tag == "tag:yaml.org,2002:null")


def plain(node: yaml.Node) -> Any:
    """A YAML node as plain Python values, with ``3e-4`` as a number.

    Raises:
        UserError: a key stands twice in one mapping.
    """
    import yaml

    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key, value in node.value:
            if key.value in result:
                raise UserError(f"'{key.value}' is given twice")
            result[key.value] = plain(value)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    unquoted = isinstance(node, yaml.ScalarNode) and node.style is None
    if unquoted and node.tag == "tag:yaml.org,2002:str":
        return float(node.value) if _is_float(node.value) else node.value
    return yaml.safe_load(yaml.serialize(node))


class _NotOfKind(Exception):
    """A word that cannot be read as one of an option's kinds; another kind may take it."""


def _scalar(option: Option, kind: str, word: str) -> Any:
    """``word`` as one kind. Raises ``_NotOfKind``, or ``UserError`` for a list's item."""
    converters: dict[str, Callable[[str], Any]] = {
        "int": _int,
        "float": _float,
        "bool": _bool,
        "dict": _dict,
        "str": str,
    }
    try:
        return converters[kind](word)
    except _NotOfKind:
        if len(option.kinds) == 1:
            raise _mismatch(option, word) from None
        raise


def _checked(option: Option, value: Any) -> Any:
    """``value`` if it is among the choices. Raises ``UserError`` with the nearest one."""
    if option.choices and isinstance(value, str) and value not in option.choices:
        raise _mismatch(option, value)
    return value


def _mismatch(option: Option, word: str) -> UserError:
    near = did_you_mean(word, option.choices) if option.choices else ""
    return UserError(f"expected {expected(option)}, got '{word}'{near}")


def _text(option: Option, node: yaml.Node) -> str:
    """The text of a list's item. Raises ``UserError`` for a nested list or mapping."""
    if not isinstance(node.value, str):
        raise UserError(f"expected {expected(option)}, got a list that holds another collection")
    return node.value


def _int(word: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", word):
        raise _NotOfKind
    return int(word)


def _is_float(word: str) -> bool:
    return bool(re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", word))


def _float(word: str) -> float:
    if not _is_float(word) and not re.fullmatch(r"[+-]?\.?inf(inity)?", word.lower()):
        raise _NotOfKind
    return float(word.lower().replace(".inf", "inf"))


def _bool(word: str) -> bool:
    if word.lower() in TRUE_WORDS:
        return True
    if word.lower() in FALSE_WORDS:
        return False
    raise _NotOfKind


def _dict(word: str) -> dict[str, Any]:
    """A JSON object, written out or as the path of a file that holds one."""
    if word.lstrip().startswith("{"):
        return _json_object(word, place="")
    path = Path(word)
    if not path.is_file():
        raise UserError(f"expected {EXPECTED['dict']}, got '{word}', which is neither")
    return _json_object(path.read_text(encoding="utf-8"), place=f"{path}:")


def _json_object(text: str, *, place: str) -> dict[str, Any]:
    """The object that ``text`` holds; ``place`` is the file's name in errors."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{place}{error.lineno}: " if place else f"column {error.colno}: "
        raise UserError(f"{where}not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, got {type(value).__name__} in '{place or text}'")
    return value


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
