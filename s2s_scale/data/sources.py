"""Finds the data the user named and loads its pairs of text.

Three kinds of source, of which exactly one is given: a folder of line files (--data_dir), table
files (--train_file, ...), a saved or hub data set (--dataset_name). Every mistake in them is a
``UserError`` that names file and line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_scale.config import DataArguments
from s2s_scale.data.readers import (
    LISTED,
    ColumnChoice,
    Problems,
    check_table_path,
    check_types,
    read_lines,
    read_table,
)
from s2s_scale.errors import UserError

Split = Literal["train", "val", "test"]
Place = Callable[[int, str], str]  # (row counted from 0, "source" or "target") -> "file:line"

SPLITS = ("train", "val", "test")
FILE_FLAGS = {"train": "train_file", "val": "validation_file", "test": "test_file"}
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}
ROWS_PER_CHECK = 100_000
FEATURES = {"source": datasets.Value("string"), "target": datasets.Value("string")}


def load_pairs(data: DataArguments, split: Split) -> datasets.Dataset:
    """The pairs of a split: columns ``source`` and ``target``, both text, without any prefix.

    At most --n_train, --n_val or --n_test rows. Raises ``UserError`` for everything that is wrong
    with the files or the settings: see the functions below.
    """
    kind = source_kind(data)
    limit = {"train": data.n_train, "val": data.n_val, "test": data.n_test}[split]
    rows = None if limit < 0 else limit
    if kind == "data_dir":
        pairs, place, origin = _load_folder(data, split, rows)
    elif kind == "files":
        pairs, place, origin = _load_table(data, split, rows)
    else:
        pairs, place, origin = _load_dataset(data, split, rows)
    if len(pairs) == 0:
        raise UserError(
            f"{origin}: the {split} split has no rows; expected at least 1; add rows or leave "
            f"the split out"
        )
    _check_texts(pairs, place=place, origin=origin)
    return pairs


def has_split(data: DataArguments, split: Split) -> bool:
    """Whether the data that the user named has this split. Reads no rows.

    Raises ``UserError`` unless exactly one kind of source is given, and for a missing folder.
    """
    kind = source_kind(data)
    if kind == "data_dir":
        return any(path.exists() for path in _pair_files(data, split))
    if kind == "files":
        return bool(getattr(data, FILE_FLAGS[split]))
    return any(name in _dataset_splits(data) for name in SPLIT_NAMES[split])


def source_kind(data: DataArguments) -> Literal["data_dir", "files", "dataset"]:
    """Which of the three kinds of source is given; ``UserError`` unless it is exactly one."""
    files = [f"--{flag}" for flag in FILE_FLAGS.values() if getattr(data, flag)]
    given = {
        "data_dir": ["--data_dir"] if data.data_dir else [],
        "files": files,
        "dataset": ["--dataset_name"] if data.dataset_name else [],
    }
    kinds = [kind for kind, flags in given.items() if flags]
    if len(kinds) != 1:
        flags = " and ".join(itertools.chain.from_iterable(given.values())) or "none"
        raise UserError(
            f"data: found {flags}; expected exactly one of --data_dir, --train_file (with "
            f"--validation_file, --test_file) and --dataset_name; give one kind of source"
        )
    idle = {
        "data_dir": ("source_column", "target_column", "dataset_config_name"),
        "files": ("dataset_config_name",),
        "dataset": (),
    }[kinds[0]]
    unused = [f"--{name}" for name in idle if getattr(data, name)]
    if unused:
        raise UserError(
            f"{' and '.join(unused)}: has no effect with {given[kinds[0]][0]}; expected nothing "
            f"there; leave it out"
        )
    return kinds[0]  # type: ignore[return-value]


def _load_folder(
    data: DataArguments, split: Split, limit: int | None
) -> tuple[datasets.Dataset, Place, str]:
    """Rows of {split}.source and {split}.target: the same number of lines, in UTF-8."""
    files = _pair_files(data, split)
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(
            *(
                f"{path}: no such file; expected one {path.suffix[1:]} text a line; add it, or "
                f"correct --data_dir"
                for path in missing
            )
        )
    problems = Problems()
    source, target = (read_lines(path, problems=problems) for path in files)
    problems.raise_any()
    if len(source) != len(target):
        problems.add(
            "line counts",
            f"{files[0]} has {len(source):,} lines and {files[1]} has {len(target):,}; expected "
            f"the same number; add the missing lines or delete the surplus ones",
        )
        problems.raise_any()
    table = pa.table({"source": source, "target": target}).slice(0, limit)
    named = dict(zip(("source", "target"), files, strict=True))
    return _in_memory(table), lambda row, side: f"{named[side]}:{row + 1}", str(files[0])


def _pair_files(data: DataArguments, split: Split) -> tuple[Path, Path]:
    folder = Path(str(data.data_dir)).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--data_dir {folder}: {'is a file' if folder.exists() else 'no such folder'}; "
            f"expected a folder with {split}.source and {split}.target; correct the path"
        )
    return folder / f"{split}.source", folder / f"{split}.target"


def _load_table(
    data: DataArguments, split: Split, limit: int | None
) -> tuple[datasets.Dataset, Place, str]:
    flag = FILE_FLAGS[split]
    name = getattr(data, flag)
    if not name:
        raise UserError(f"no {split} data: found no --{flag}; expected a file; give --{flag}")
    path = Path(name).expanduser()
    check_table_path(path, flag=f"--{flag}")
    table, place = read_table(path, choice=_column_choice(data), limit=limit)
    return _in_memory(table), lambda row, side: place(row), str(path)


def _column_choice(data: DataArguments) -> ColumnChoice:
    return ColumnChoice(
        wanted=(data.source_column, data.target_column), languages=(data.src_lang, data.tgt_lang)
    )


def _in_memory(table: pa.Table) -> datasets.Dataset:
    return datasets.Dataset(
        datasets.table.InMemoryTable(table),
        info=datasets.DatasetInfo(features=datasets.Features(FEATURES)),
    )


def _load_dataset(
    data: DataArguments, split: Split, limit: int | None
) -> tuple[datasets.Dataset, Place, str]:
    """Rows of a folder written by save_to_disk (memory-mapped) or of a data set of the hub."""
    name = str(data.dataset_name)
    origin = f"--dataset_name {name}"
    splits = _dataset_splits(data)
    found = next((known for known in SPLIT_NAMES[split] if known in splits), None)
    if found is None:
        raise UserError(
            f"{origin}: no {split} split; found {', '.join(splits)}; expected "
            f"{' or '.join(SPLIT_NAMES[split])}; rename a split or leave {split} out"
        )
    rows = _open_dataset(data, found)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    rows = rows.with_format(None).flatten()
    names = _column_choice(data).find(rows.column_names, where=origin)
    check_types({column: rows.data.schema.field(column).type for column in names}, where=origin)
    # By way of names that are in no data set: "source" may be what holds the target text.
    pairs = rows.select_columns(list(names))
    pairs = pairs.rename_columns({names[0]: "\0source", names[1]: "\0target"})
    pairs = pairs.rename_columns({"\0source": "source", "\0target": "target"})
    return pairs, lambda row, side: f"{origin}, split {found}, row {row + 1}", origin


def _dataset_splits(data: DataArguments) -> list[str]:
    name = str(data.dataset_name)
    folder = Path(name).expanduser()
    if folder.exists():
        saved = _open_saved(folder)
        return list(saved) if isinstance(saved, datasets.DatasetDict) else ["train"]
    names = _from_hub(
        data, lambda: datasets.get_dataset_split_names(name, data.dataset_config_name)
    )
    return list(names)


def _open_dataset(data: DataArguments, split: str) -> datasets.Dataset:
    name = str(data.dataset_name)
    folder = Path(name).expanduser()
    if folder.exists():
        saved = _open_saved(folder)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    return _from_hub(
        data, lambda: datasets.load_dataset(name, data.dataset_config_name, split=split)
    )


def _open_saved(folder: Path) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(
            f"--dataset_name {folder}: cannot be read ({error}); expected a folder written by "
            f"datasets' save_to_disk; for a folder with train.source files give --data_dir"
        ) from error


def _from_hub(data: DataArguments, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:  # not found, not reachable, unknown configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--dataset_name {data.dataset_name}: {reason}; expected a folder written by "
            f"save_to_disk or a data set of the hub; correct the name or --dataset_config_name, "
            f"or check the network"
        ) from error


def _check_texts(pairs: datasets.Dataset, *, place: Place, origin: str) -> None:
    """Raise ``UserError`` for rows whose source or target is missing, empty or all white space."""
    problems = Problems()
    start = 0
    for table in pairs.with_format("arrow").iter(batch_size=ROWS_PER_CHECK):
        for side in ("source", "target"):
            column = table.column(side).cast(pa.large_string())
            blank = pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))
            rows = np.flatnonzero(pc.fill_null(blank, True).to_numpy(zero_copy_only=False))
            problems.add_many(
                f"empty {side} lines in {origin}",
                (
                    f"{place(start + int(row), side)}: empty {side} text (found "
                    f"{column[int(row)].as_py()!r}); expected text; fill it in, or delete the row "
                    f"from source and target"
                    for row in rows[:LISTED]
                ),
                count=len(rows),
            )
        start += len(table)
    problems.raise_any()
