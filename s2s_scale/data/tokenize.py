"""Tokenised examples: text pairs as token ids and lengths, cached by content."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers

from s2s_scale.data.batch_plan import row_lengths
from s2s_scale.data.cache import (
    SOURCE_LENGTHS,
    TARGET_LENGTHS,
    content_key,
    default_cache_dir,
    entry_of,
    read_manifest,
    write_entry,
)
from s2s_scale.errors import LISTED, Problems
from s2s_scale.utils import IGNORE_INDEX

ROWS_PER_BATCH = 1000
ROWS_PER_WORKER = 20_000
"""Rows that pay for one more process with a tokenizer written in Python.

It takes about 0.2 ms a pair on one core (20,000 pairs: 3.6 s, with two processes 2.6 s), and
another process takes most of a second to start and to receive its rows.
"""
FEATURES = {
    "source": datasets.Value("string"),
    "target": datasets.Value("string"),
    "input_ids": datasets.Sequence(datasets.Value("int32")),
    "labels": datasets.Sequence(datasets.Value("int32")),
    "source_length": datasets.Value("int32"),
    "target_length": datasets.Value("int32"),
}


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer: Any,
    *,
    source_prefix: str = "",
    max_source_length: int,
    max_target_length: int,
    long_rows: str = "truncate",
    cache_dir: Path | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> datasets.Dataset:
    """The pairs with token ids, memory-mapped from the cache.

    Columns: source and target (the text, without the prefix), input_ids, labels (int32 lists,
    truncated to the given numbers of tokens), source_length, target_length (int32). A second call
    with the same texts, tokenizer, prefix and lengths, in any process, reads the cache. A damaged
    entry is rewritten.

    Raises:
        UserError: the cache folder cannot be written, or rows are too long and ``long_rows`` is
            "error".
    """
    settings = {
        "source_prefix": source_prefix,
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
        "truncation": long_rows == "truncate",
    }
    limits = (max_source_length, max_target_length)
    pairs = pairs.with_format(None).select_columns(["source", "target"])
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    key = content_key(pairs, tokenizer, settings={**settings, **versions})
    folder = (cache_dir or default_cache_dir()) / "examples" / key
    found = None if overwrite else _open_entry(folder)
    if found is not None:
        _refuse_long_rows(found, limits)
        return found
    workers = num_workers or useful_workers(len(pairs), fast=tokenizer.is_fast)

    def fill(temporary: Path) -> Mapping[str, Any]:
        with _progress_bars(progress):
            tokens = pairs.map(
                tokenize_rows,
                fn_kwargs={"tokenizer": tokenizer, **settings},
                batched=True,
                batch_size=ROWS_PER_BATCH,
                features=datasets.Features(FEATURES),
                cache_file_name=str(temporary / "examples.arrow"),
                load_from_cache_file=False,
                new_fingerprint=key,
                num_proc=workers if workers > 1 else None,
                desc="Tokenising",
            )
        return _describe(tokens, temporary)

    write_entry(folder, fill)
    made = _open_entry(folder)
    if made is None:
        raise RuntimeError(f"{folder}: a cache entry that was just written cannot be read")
    _refuse_long_rows(made, limits)
    return made


def tokenize_rows(
    rows: Mapping[str, list[str]],
    *,
    tokenizer: Any,
    source_prefix: str,
    max_source_length: int,
    max_target_length: int,
    truncation: bool,
) -> dict[str, list[Any]]:
    """Token ids and lengths of rows of text: columns source and target, each a list."""
    source = tokenizer(
        [source_prefix + text for text in rows["source"]],
        truncation=truncation,
        max_length=max_source_length if truncation else None,
        return_attention_mask=False,
    )["input_ids"]
    target = tokenizer(
        text_target=list(rows["target"]),
        truncation=truncation,
        max_length=max_target_length if truncation else None,
        return_attention_mask=False,
    )["input_ids"]
    return {
        "input_ids": source,
        "labels": target,
        "source_length": [len(ids) for ids in source],
        "target_length": [len(ids) for ids in target],
    }


def too_long(row: int, side: str, tokens: int, limit: int) -> str:
    """The problem of a row, counted from 1, with too many tokens."""
    return (
        f"row {row}: {tokens} {side} tokens; expected at most {limit}; raise "
        f"--max_{side}_length, shorten the row, or use --long_rows truncate"
    )


def beyond_vocabulary(row: int, side: str, token: int, size: int) -> str:
    """The problem of a row, counted from 1, with a token id that the model cannot embed."""
    return (
        f"row {row}: {side} token id {token}; expected ids from 0 to {size - 1}, the model's "
        f"{side} vocabulary; tokenizer and model do not match: give --tokenizer_name the model's "
        f"own"
    )


def _refuse_long_rows(examples: datasets.Dataset, limits: tuple[int, int]) -> None:
    """Raise ``UserError`` for rows with more source or target tokens than the limits."""
    problems = Problems()
    for side, lengths, limit in zip(
        ("source", "target"), row_lengths(examples), limits, strict=True
    ):
        rows = np.flatnonzero(lengths > limit)
        problems.add_many(
            f"rows with more than {limit} {side} tokens",
            (too_long(int(row) + 1, side, int(lengths[row]), limit) for row in rows[:LISTED]),
            count=len(rows),
        )
    problems.raise_any()


def useful_workers(n_rows: int, *, fast: bool) -> int:
    """Processes that make tokenising so many rows faster; fast tokenizers use all cores alone."""
    if fast:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, n_rows // ROWS_PER_WORKER))


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of ``datasets``, which has no switch for a single call."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _describe(tokens: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Save the lengths beside the rows; return the manifest: rows, and the range of token ids."""
    table = tokens.data
    for column, name in (("source_length", SOURCE_LENGTHS), ("target_length", TARGET_LENGTHS)):
        np.save(folder / name, table.column(column).to_numpy().astype(np.int32))
    facts: dict[str, Any] = {"rows": len(tokens)}
    for column in ("input_ids", "labels"):
        extremes = [pc.min_max(chunk.flatten()).as_py() for chunk in table.column(column).chunks]
        facts[column] = [
            min((e["min"] for e in extremes if e["min"] is not None), default=0),
            max((e["max"] for e in extremes if e["max"] is not None), default=0),
        ]
    return facts


def _open_entry(folder: Path) -> datasets.Dataset | None:
    """Map an entry's Arrow files into memory; None for a missing or damaged entry."""
    facts = read_manifest(folder)
    if facts is None:
        return None
    try:
        paths = sorted(folder / name for name in facts["files"] if name.endswith(".arrow"))
        parts = [datasets.Dataset.from_file(str(path)).data for path in paths]
        table = datasets.table.concat_tables(parts)
        found = datasets.Dataset(
            table,
            info=datasets.DatasetInfo(features=datasets.Features(FEATURES)),
            fingerprint=folder.name,
        )
    except (OSError, ValueError, pa.ArrowInvalid):
        return None
    return found if len(found) == facts["rows"] else None


def check_token_ids(
    examples: datasets.Dataset, *, source_vocab_size: int, target_vocab_size: int
) -> None:
    """Raise ``UserError`` for token ids that the model has no embedding for.

    Names the rows (counted from 1) and the vocabulary. Labels may hold ``IGNORE_INDEX``. For data
    that was just loaded from the cache the manifest's range of ids decides, and no row is read.
    """
    entry = entry_of(examples)
    facts = read_manifest(entry) if entry is not None else None
    problems = Problems()
    for column, side, size in (
        ("input_ids", "source", source_vocab_size),
        ("labels", "target", target_vocab_size),
    ):
        in_range = facts is not None and facts[column][0] >= 0 and facts[column][1] < size
        if not in_range and column in examples.column_names:
            _check_column(examples, column, side, size, problems)
    problems.raise_any()


def _check_column(
    examples: datasets.Dataset, column: str, side: str, size: int, problems: Problems
) -> None:
    first_row = 0
    for table in examples.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        for chunk in table.column(0).chunks:
            ids = chunk.flatten().to_numpy(zero_copy_only=False)
            wrong = (ids < 0) | (ids >= size)
            if column == "labels":
                wrong &= ids != IGNORE_INDEX
            places = np.flatnonzero(wrong)
            ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
            rows, firsts = np.unique(np.searchsorted(ends, places, side="right"), return_index=True)
            problems.add_many(
                f"rows with {side} token ids beyond the vocabulary",
                (
                    beyond_vocabulary(first_row + int(row) + 1, side, ids[places[first]], size)
                    for row, first in list(zip(rows, firsts, strict=True))[:LISTED]
                ),
                count=len(rows),
            )
            first_row += len(chunk)
