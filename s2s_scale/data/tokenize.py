"""Turns pairs of text into token ids and lengths, once: the result is cached by content."""

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
from s2s_scale.data.readers import LISTED, Problems

LABEL_PAD = -100
ROWS_PER_BATCH = 1000
# A tokenizer written in Python takes about 0.2 ms a pair on one core (20,000 pairs: 3.6 s, with
# two processes 2.6 s), and a further process most of a second to start and to be handed its rows.
# Fast tokenizers spread a batch over all cores by themselves: processes only slowed them down.
ROWS_PER_WORKER = 20_000
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

    Columns: source and target (the text, without the prefix), input_ids, labels (int32 lists, cut
    to the given numbers of tokens), source_length, target_length (int32). A second call with the
    same texts, tokenizer, prefix and lengths, in any process, tokenises nothing. A damaged entry
    is written anew. Raises ``UserError`` if the cache folder cannot be written, and with
    ``long_rows="error"`` for rows that would have to be cut.
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
    workers = num_workers or _workers_that_pay(len(pairs), fast=tokenizer.is_fast)

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


def _refuse_long_rows(examples: datasets.Dataset, limits: tuple[int, int]) -> None:
    """Raise ``UserError`` for rows with more source or target tokens than the limits."""
    problems = Problems()
    for side, lengths, limit in zip(
        ("source", "target"), row_lengths(examples), limits, strict=True
    ):
        rows = np.flatnonzero(lengths > limit)
        problems.add_many(
            f"rows with more than {limit} {side} tokens",
            (
                f"row {row + 1}: {lengths[row]} {side} tokens; expected at most {limit}; raise "
                f"--max_{side}_length, shorten the row, or use --long_rows truncate"
                for row in rows[:LISTED]
            ),
            count=len(rows),
        )
    problems.raise_any()


def _workers_that_pay(n_rows: int, *, fast: bool) -> int:
    if fast:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, n_rows // ROWS_PER_WORKER))


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the bars of ``datasets`` for a while; it has no switch for a single call."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _describe(tokens: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Save the lengths beside the rows; return the facts that a later start needs of them."""
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

    Names the rows (counted from 1) and the vocabulary. Labels may hold -100. Data that was just
    loaded from the cache is judged by the saved range of its ids, without reading a row.
    """
    sizes = {"input_ids": source_vocab_size, "labels": target_vocab_size}
    entry = entry_of(examples)
    facts = read_manifest(entry) if entry is not None else None
    problems = Problems()
    for column, size in sizes.items():
        in_range = facts is not None and facts[column][0] >= 0 and facts[column][1] < size
        if not in_range and column in examples.column_names:
            _check_column(examples, column=column, size=size, problems=problems)
    problems.raise_any()


def _check_column(
    examples: datasets.Dataset, *, column: str, size: int, problems: Problems
) -> None:
    side = "source" if column == "input_ids" else "target"
    first_row = 0
    for table in examples.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        for chunk in table.column(0).chunks:
            ids = chunk.flatten().to_numpy(zero_copy_only=False)
            wrong = (ids < 0) | (ids >= size)
            if column == "labels":
                wrong &= ids != LABEL_PAD
            places = np.flatnonzero(wrong)
            ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
            rows, firsts = np.unique(np.searchsorted(ends, places, side="right"), return_index=True)
            problems.add_many(
                f"rows with {side} token ids beyond the vocabulary",
                (
                    f"row {first_row + row + 1}: {side} token id {ids[places[first]]}; expected "
                    f"ids from 0 to {size - 1}, the model's {side} vocabulary; tokenizer and "
                    f"model do not match: give --tokenizer_name the model's own"
                    for row, first in list(zip(rows, firsts, strict=True))[:LISTED]
                ),
                count=len(rows),
            )
            first_row += len(chunk)
