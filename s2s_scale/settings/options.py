"""Every option by name, type, default and help. Imports neither torch nor transformers.

Options of transformers come from the *source* of the installed version, read with ``ast``:
importing it takes seconds, which is too long for ``--help`` and for finding a mistyped flag. The
section comments of that source (``# --- Optimizer ---``) give the groups in ``--help``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.machinery
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2s_scale.config import SCHEDULES, DataArguments, ModelArguments, TrainingExtras
from s2s_scale.errors import UserError

SCALAR_KINDS = ("int", "float", "bool", "str")

# Settings of transformers that only exist as Python objects, so they have no written form.
PYTHON_ONLY = ("parallelism_config",)

LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")

# Sections of transformers' source that belong with a group of ours.
SECTION_GROUPS = {
    "Output": "output",
    "Training Duration and Batch Size": "training",
    "Learning Rate & Scheduler": "learning rate",
    "Optimizer": "optimizer",
    "External Script Flags": "what runs",
}
GROUP_OVERRIDES = {
    "sortish_sampler": "batching",
    "train_sampling_strategy": "batching",
    "length_column_name": "batching",
    "dataloader_drop_last": "batching",
    "gradient_accumulation_steps": "training",
    "label_smoothing_factor": "loss",
}
# Where our own use of an option says more than transformers' text.
HELP_OVERRIDES = {
    "output_dir": "Folder for checkpoints, the trained model, results and the report.",
    "do_train": "Accepted for old scripts: 'train' always trains.",
    "do_eval": "After training, evaluate on the validation split (val_results.json).",
    "do_predict": "After training, evaluate on the test split (test_results.json).",
    "resume_from_checkpoint": (
        "Go on from this checkpoint folder; 'latest': the newest one; 'auto': likewise, or from "
        "the beginning where there is none."
    ),
    "sortish_sampler": "Old name of --batching sortish.",
    "deepspeed": "DeepSpeed configuration in place of the profile's: a name in ds_configs/, such "
    "as zero2, or the path of a JSON file.",
    "predict_with_generate": "Generate text in evaluation and compute --metrics from it.",
}
# A configuration is named, so that every message about it can say where it stands.
TYPE_OVERRIDES = {"deepspeed": "str"}


@dataclass(frozen=True)
class Option:
    """One setting that the command line and a YAML file accept.

    ``type`` is one of int, float, bool, str, dict, list[int|float|str], or several of them
    joined by ``|``. ``bare`` is the value of the flag given alone, None if it needs a value.
    ``values`` holds what may be written; ``choices`` None means anything of the type.
    """

    name: str
    type: str
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] | None = None
    optional: bool = False
    bare: Any = None
    aliases: tuple[str, ...] = ()
    required: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The alternatives in ``type``."""
        return tuple(self.type.split("|"))

    @property
    def is_bool(self) -> bool:
        """Whether true and false are among its values, so that ``--no_name`` makes sense."""
        return "bool" in self.kinds

    @property
    def is_list(self) -> bool:
        """Whether the flag takes one or more values."""
        return any(kind.startswith("list[") for kind in self.kinds)

    @property
    def item_kind(self) -> str:
        """The type of a list's items, such as ``str`` for ``list[str]``."""
        return next(kind[5:-1] for kind in self.kinds if kind.startswith("list["))


def option(name: str, type: str, default: Any, group: str, help: str, **more: Any) -> Option:
    """An option of a verb itself; ``bare`` is True for booleans."""
    kinds = type.split("|")
    more.setdefault("bare", True if "bool" in kinds else None)
    more.setdefault("optional", default is None)
    return Option(name=name, type=type, default=default, group=group, help=help, **more)


def transformers_folder() -> Path:
    """Folder of the installed transformers, found without importing it.

    Raises:
        UserError: transformers is not installed.
    """
    spec = importlib.machinery.PathFinder.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("transformers is not installed here; install it: pip install transformers")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def training_options() -> list[Option]:
    """All training options: transformers' own, seq2seq's, and those of ``TrainingExtras``.

    A name that occurs in several of them keeps one entry, that of the last.
    """
    folder = transformers_folder()
    base = (folder / "training_args.py").read_text(encoding="utf-8")
    seq2seq = (folder / "training_args_seq2seq.py").read_text(encoding="utf-8")
    enums = _enum_values(base) | _enum_values(
        (folder / "trainer_utils.py").read_text(encoding="utf-8")
    )
    found = _source_options(base, "TrainingArguments", enums=enums, first_group="output")
    found += _source_options(
        seq2seq, "Seq2SeqTrainingArguments", enums=enums, first_group="generation"
    )
    by_name = {entry.name: entry for entry in found + _class_options(TrainingExtras)}
    return list(by_name.values())


@functools.cache
def model_options() -> list[Option]:
    """The options of ``ModelArguments``; ``--model`` is a short name of the model's path."""
    return [
        dataclasses.replace(entry, aliases=("model",))
        if entry.name == "model_name_or_path"
        else entry
        for entry in _class_options(ModelArguments)
    ]


@functools.cache
def data_options() -> list[Option]:
    """The options of ``DataArguments``."""
    return _class_options(DataArguments)


def _class_options(cls: type) -> list[Option]:
    """Options of a dataclass of ours, whose annotations are text and metadata complete."""
    result = []
    for entry in dataclasses.fields(cls):
        default = (
            entry.default
            if entry.default_factory is dataclasses.MISSING
            else entry.default_factory()
        )
        kinds, optional, _ = _read_annotation(str(entry.type), {})
        result.append(
            Option(
                name=entry.name,
                type="|".join(kinds),
                default=default,
                help=entry.metadata["help"],
                group=entry.metadata["help"].group,
                choices=entry.metadata.get("choices"),
                optional=optional,
                bare=True if "bool" in kinds else None,
            )
        )
    return result


def _source_options(
    source: str, class_name: str, *, enums: dict[str, tuple[str, ...]], first_group: str
) -> list[Option]:
    """The fields of a dataclass in ``source``, grouped by its section comments."""
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    sections = [
        (number, match.group(1))
        for number, line in enumerate(source.splitlines(), start=1)
        if (match := re.match(r"    # -+ (\w.*?) -+$", line))
    ]
    result = []
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if not isinstance(node.value, ast.Call) or node.target.id in PYTHON_ONLY:
            continue
        section = next((text for line, text in reversed(sections) if line < node.lineno), None)
        group = SECTION_GROUPS.get(section, section.lower()) if section else first_group
        result.append(_source_option(node, body, enums=enums, group=group))
    return result


def _source_option(
    node: ast.AnnAssign, body: list[ast.stmt], *, enums: dict[str, tuple[str, ...]], group: str
) -> Option:
    """One field ``name: annotation = field(default=…, metadata={…})``."""
    assert isinstance(node.target, ast.Name)
    assert isinstance(node.value, ast.Call)
    name = node.target.id
    keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
    metadata = _literal_dict(keywords.get("metadata"))
    kinds, optional, choices = _read_annotation(ast.unparse(node.annotation), enums)
    if "choices" in metadata:
        choices = tuple(metadata["choices"])
    elif name.startswith("log_level"):
        choices = LOG_LEVELS  # written there as the keys of a dict made at run time
    elif name == "lr_scheduler_type":
        choices = tuple(dict.fromkeys(SCHEDULES + (choices or ())))
    default = _default(keywords, body)
    return Option(
        name=name,
        type=TYPE_OVERRIDES.get(name, "|".join(kinds)),
        default=default,
        help=HELP_OVERRIDES.get(name, str(metadata.get("help", "")).replace("%%", "%")),
        group=GROUP_OVERRIDES.get(name, group),
        choices=choices,
        optional=optional or default is None,
        bare=True if "bool" in kinds else metadata.get("const"),
    )


def _default(keywords: dict[str | None, ast.expr], body: list[ast.stmt]) -> Any:
    """A field's default. A name (``default_optim``) stands for the last text given to it."""
    if "default" not in keywords:
        factory = keywords.get("default_factory")
        return [] if isinstance(factory, ast.Name) and factory.id == "list" else None
    value = keywords["default"]
    if not isinstance(value, ast.Name):
        return ast.literal_eval(value)
    given = [
        node.value
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == value.id for target in node.targets)
    ]
    return ast.literal_eval(given[-1])


def _literal_dict(node: ast.expr | None) -> dict[str, Any]:
    """The entries of a dict literal whose values are literals; others are left out."""
    if not isinstance(node, ast.Dict):
        return {}
    result = {}
    for key, value in zip(node.keys, node.values, strict=True):
        try:
            result[ast.literal_eval(key)] = ast.literal_eval(value)  # type: ignore[arg-type]
        except ValueError:
            continue  # an expression such as trainer_log_levels.keys()
    return result


def _read_annotation(
    text: str, enums: dict[str, tuple[str, ...]]
) -> tuple[list[str], bool, tuple[str, ...] | None]:
    """``"SchedulerType | str | None"`` -> (kinds, whether None is allowed, values of the enum)."""
    optional_of = re.fullmatch(r"Optional\[(.*)\]", text)
    parts = [part.strip() for part in (optional_of.group(1) if optional_of else text).split("|")]
    kinds: list[str] = []
    choices = None
    for part in parts:
        if part == "None":
            continue
        kind = _kind_of(part)
        choices = enums.get(part, choices)
        if kind not in kinds:
            kinds.append(kind)
    return kinds, optional_of is not None or "None" in parts, choices


def _kind_of(annotation: str) -> str:
    """The kind of one alternative; enums, paths and config objects are written as text."""
    if annotation in SCALAR_KINDS:
        return annotation
    if annotation.startswith("dict"):
        return "dict"
    if annotation == "Literal[False]":
        return "bool"
    items = re.fullmatch(r"list\[(.*)\]", annotation)
    if items:
        return f"list[{items.group(1) if items.group(1) in SCALAR_KINDS else 'str'}]"
    return "str"


def _enum_values(source: str) -> dict[str, tuple[str, ...]]:
    """The values of each ``class X(ExplicitEnum)`` in ``source``."""
    classes = re.findall(
        r"^class (\w+)\(ExplicitEnum\):\n((?:[ \t]+.*\n|\n)+)", source, flags=re.MULTILINE
    )
    return {
        name: tuple(re.findall(r'^    [A-Z0-9_]+ = "([^"]*)"', body, flags=re.MULTILINE))
        for name, body in classes
    }
