"""What was written, on the command line and in YAML files, into typed values.

There is one conversion for both: an ``Entry`` holds a name and its text, and ``convert_entries``
makes typed values of all entries and collects every problem. YAML scalars are converted by the
option's type and not by YAML's own rules, because those read ``3e-4`` as text and ``no``, a value
of several options, as false.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from s2s_scale.errors import UserError, did_you_mean, raise_problems
from s2s_scale.settings.options import Option

if TYPE_CHECKING:
    import yaml

COMMAND_LINE = "command line"
ALONE = object()
"""What is written for a flag without a value."""
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)
NONE_WORDS = ("none", "null")
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a JSON object or the path of a JSON file",
}


class Entry(NamedTuple):
    """A name with what was written for it.

    ``name`` has underscores; ``label`` is the name as it was written, such as ``--max-steps``.
    ``written`` is a text, a list of texts, a YAML mapping, None (YAML's null) or ``ALONE``.
    ``place`` is ``file:line``, or ``COMMAND_LINE``.
    """

    name: str
    label: str
    written: Any
    place: str


def convert_entries(
    entries: Iterable[Entry], find: Callable[[Entry], Option], *, within: str = ""
) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """Option's name -> (typed value, place), and the problems of all entries.

    ``find`` gives the option of an entry, or raises ``UserError`` if its name is unknown.
    ``within`` follows the place in problems, such as ``arguments: ``.
    """
    found: dict[str, tuple[Any, str]] = {}
    labels: dict[str, str] = {}
    problems: list[str] = []
    for entry in entries:
        where = ("" if entry.place == COMMAND_LINE else f"{entry.place}: ") + within
        try:
            name = (option := find(entry)).name
            where += f"{entry.label}: "
            value = convert(option, entry.written)
        except UserError as error:
            problems += [where + problem for problem in error.problems]
            continue
        if name in found and found[name][0] != value:
            problems.append(
                f"{where}given twice, as {found[name][0]!r} ({labels[name]}) and {value!r}; "
                "keep one"
            )
        else:
            found[name] = (value, entry.place)
            labels[name] = entry.label
    return found, problems


def convert(option: Option, written: Any) -> Any:
    """The typed value of what was written for an option, as in ``Entry``.

    Raises:
        UserError: "expected …, got '…'", one problem for each item of a list, without the
            option's name, which the caller puts first.
    """
    if written is ALONE and option.const is not None:
        return option.const
    if written is None and option.optional:
        return None
    if written is None or written is ALONE:
        raise UserError(f"expected {expected(option)}, got nothing")
    if isinstance(written, list):
        if not option.is_list:
            raise UserError(f"expected {expected(option)}, got a list")
        values: list[Any] = []
        problems: list[str] = []
        for item in written:
            try:
                if not isinstance(item, str):
                    raise UserError(f"expected {expected(option)}, got a list within a list")
                values.append(_convert_text(option, (option.item_kind,), item))
            except UserError as error:
                problems += error.problems
        raise_problems(problems)
        return values
    if not isinstance(written, str):
        if "dict" not in option.kinds:
            raise UserError(f"expected {expected(option)}, got a mapping of names to values")
        return plain(written)
    if option.is_list and "str" not in option.kinds:
        return [_convert_text(option, (option.item_kind,), written)]
    # 'none' is a text like any other where text is allowed, such as for --report_to.
    if option.optional and "str" not in option.kinds and written.lower() in NONE_WORDS:
        return None
    return _convert_text(option, option.kinds, written)


def expected(option: Option) -> str:
    """What an option takes, in words, such as ``a whole number``."""
    if option.choices:
        return f"one of: {', '.join(option.choices)}"
    # Text is the way in which a dict is written, so 'dict|str' is a dict to the reader.
    kinds = [kind for kind in option.kinds if not (kind == "str" and "dict" in option.kinds)]
    return " or ".join(
        f"a list of {kind[5:-1]} values" if kind.startswith("list[") else EXPECTED[kind]
        for kind in kinds
    )


def _convert_text(option: Option, kinds: tuple[str, ...], text: str) -> Any:
    """``text`` as the first of ``kinds`` that it can be read as, if that is among the choices."""
    value: Any = None
    if "bool" in kinds:
        value = BOOLS.get(text.lower())
    if value is None and "dict" in kinds:
        value = _read_json(text)
    if value is None and "int" in kinds and re.fullmatch(r"[+-]?[0-9]+", text):
        value = int(text)
    if value is None and "float" in kinds and is_float(text):
        value = float(text.lower().replace(".inf", "inf"))
    if value is None and "str" in kinds:
        value = text
    if value is None or (option.choices and isinstance(value, str) and value not in option.choices):
        near = did_you_mean(text, option.choices) if option.choices else ""
        raise UserError(f"expected {expected(option)}, got '{text}'{near}")
    return value


def is_float(text: str) -> bool:
    """Whether ``text`` is a number as people write them; 'nan' is none, 'inf' is."""
    number = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    return bool(re.fullmatch(rf"{number}|[+-]?\.?inf(inity)?", text, flags=re.IGNORECASE))


def _read_json(text: str) -> dict[str, Any]:
    """A JSON object, written out or as the path of a file that holds one."""
    path = None if text.lstrip().startswith("{") else Path(text)
    if path is not None:
        if not path.is_file():
            raise UserError(f"expected {EXPECTED['dict']}, got '{text}', which is neither")
        text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}" if path else f"column {error.colno}"
        raise UserError(f"{where}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, got {type(value).__name__} in '{path}'")
    return value


def plain(node: yaml.Node) -> Any:
    """A YAML node as plain Python values, with ``3e-4`` as a number.

    Raises:
        UserError: a key occurs twice in one mapping.
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
    assert isinstance(node, yaml.ScalarNode)
    is_text = node.tag == "tag:yaml.org,2002:str" and node.style is None  # not in quotes
    if is_text and re.match(r"[+-]?\.?[0-9]", node.value) and is_float(node.value):
        return float(node.value)
    return yaml.safe_load(yaml.serialize(node))


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
    import yaml

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
        written: Any = value
        if isinstance(value, yaml.SequenceNode):
            written = [item.value for item in value.value]
        elif isinstance(value, yaml.ScalarNode):
            written = None if value.tag == "tag:yaml.org,2002:null" else value.value
        entries[name] = Entry(name, key.value, written, place)
    return list(entries.values()), problems
