"""The data sets that the user named, and their text pairs.

There are three kinds of sources, of which exactly one is given: a folder of line files
(--data_dir), table files (--train_file, ...), a saved or hub data set (--dataset_name). Every
mistake in them is a ``UserError`` that names file and line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from s2s_scale.config import DataArguments
from s2s_scale.data.columns import SCHEMA, ColumnChoice, check_types, report_blank
from s2s_scale.data.readers import LineReader, PairReader, open_table
from s2s_scale.errors import Problems, UserError

Split = Literal["train", "val", "test"]
Where = Callable[[int, str], str]  # (row counted from 0, "source" or "target") -> "file:line"

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

    At most --n_train, --n_val or --n_test rows.

    Raises:
        UserError: the settings name no data, or there are mistakes in them.
    """
    limit = {"train": data.n_train, "val": data.n_val, "test": data.n_test}[split]
    rows = None if limit < 0 else limit
    if source_kind(data) == "dataset":
        pairs, where, origin = _load_dataset(data, split, rows)
    else:
        pairs, where, origin = _load_files(open_reader(data, split), rows)
    if len(pairs) == 0:
        raise UserError(
            f"{origin}: the {split} split has no rows; expected at least 1; add rows or leave "
            f"the split out"
        )
    problems = Problems()
    tables = pairs.with_format("arrow").iter(batch_size=ROWS_PER_CHECK)
    for number, table in enumerate(tables):
        report_blank(
            table,
            number * ROWS_PER_CHECK + np.arange(len(table)),
            where=where,
            origin=origin,
            problems=problems,
        )
    problems.raise_any()
    return pairs


def has_split(data: DataArguments, split: Split) -> bool:
    """Whether the data that the user named has this split. Reads no rows.

    Raises ``UserError`` unless exactly one kind of source is given, and for a missing folder.
    """
    kind = source_kind(data)
    if kind == "data_dir":
        return any(path.exists() for path in _line_files(data, split))
    if kind == "files":
        return bool(getattr(data, FILE_FLAGS[split]))
    return any(name in _dataset_splits(data) for name in SPLIT_NAMES[split])


def source_kind(data: DataArguments) -> Literal["data_dir", "files", "dataset"]:
    """Which of the three kinds of sources is given; ``UserError`` unless it is exactly one."""
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


def open_reader(data: DataArguments, split: Split) -> PairReader:
    """The reader of a split's files, for --data_dir and for --train_file and its kin.

    Raises:
        UserError: a file is missing or of an unknown format.
    """
    if source_kind(data) == "data_dir":
        files = _line_files(data, split)
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise UserError(
                *(
                    f"{path}: no such file; expected one {path.suffix[1:]} text a line; add it, or "
                    f"correct --data_dir"
                    for path in missing
                )
            )
        return LineReader(*files)
    flag = FILE_FLAGS[split]
    name = getattr(data, flag)
    if not name:
        raise UserError(f"no {split} data: found no --{flag}; expected a file; give --{flag}")
    return open_table(Path(name).expanduser(), _column_choice(data), flag=f"--{flag}")


def _line_files(data: DataArguments, split: Split) -> tuple[Path, Path]:
    folder = Path(str(data.data_dir)).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--data_dir {folder}: {'is a file' if folder.exists() else 'no such folder'}; "
            f"expected a folder with {split}.source and {split}.target; correct the path"
        )
    return folder / f"{split}.source", folder / f"{split}.target"


def _column_choice(data: DataArguments) -> ColumnChoice:
    return ColumnChoice(
        wanted=(data.source_column, data.target_column), languages=(data.src_lang, data.tgt_lang)
    )


def _load_files(reader: PairReader, limit: int | None) -> tuple[datasets.Dataset, Where, str]:
    """The first ``limit`` rows in memory.

    Line files are read to their ends all the same: if one has fewer lines than the other, rows may
    be out of step from anywhere on.
    """
    problems = Problems()
    texts, lines = [], [np.empty(0, dtype=np.int64)]
    stop = None if isinstance(reader, LineReader) else limit
    for chunk in reader.chunks(problems=problems, limit=stop):
        texts.append(chunk.texts)
        lines.append(chunk.lines)
    problems.raise_any()
    table = pa.Table.from_batches(texts, schema=SCHEMA).slice(0, limit)
    line_of_row = np.concatenate(lines)
    pairs = datasets.Dataset(
        datasets.table.InMemoryTable(table),
        info=datasets.DatasetInfo(features=datasets.Features(FEATURES)),
    )
    return (
        pairs,
        lambda row, side: reader.where(int(line_of_row[row]), side),
        str(reader.paths[0]),
    )


def _load_dataset(
    data: DataArguments, split: Split, limit: int | None
) -> tuple[datasets.Dataset, Where, str]:
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
    folder = Path(name).expanduser()
    if folder.exists():
        saved = _open_saved(folder)
        rows = saved[found] if isinstance(saved, datasets.DatasetDict) else saved
    else:
        config = data.dataset_config_name
        rows = _from_hub(data, lambda: datasets.load_dataset(name, config, split=found))
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
    config = data.dataset_config_name
    return list(_from_hub(data, lambda: datasets.get_dataset_split_names(name, config)))


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
