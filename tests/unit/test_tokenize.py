"""Tokenising, its cache, lengths and the check of token ids."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from s2s_scale.data import cache, tokenize
from s2s_scale.data.batch_plan import row_lengths
from s2s_scale.data.tokenize import check_token_ids, tokenize_pairs
from s2s_scale.errors import UserError
from tests.support.families import FAMILY_NAMES, TINY_TEXTS, tiny_folder
from tests.support.pairs import WORDS, pairs_of, word_tokenizer

SOURCE = ["one two three", "four", "five six one two three four five six"] * 4
TARGET = ["three", "four five six one", "two two"] * 4
SIZES = {"max_source_length": 6, "max_target_length": 4}


@pytest.fixture
def pairs() -> datasets.Dataset:
    return pairs_of(SOURCE, TARGET)


class Refusing:
    """Replaces a tokenizer's call, to show that nothing is tokenised."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the tokenizer was called")


def refuse(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(type(tokenizer), "__call__", Refusing())


def tokens_of(found: datasets.Dataset) -> list[dict[str, Any]]:
    return [found[row] for row in range(len(found))]


def test_rows_that_are_too_long_are_refused_where_asked(
    tmp_path: Path, pairs: datasets.Dataset
) -> None:
    tokenizer = word_tokenizer()
    options: dict[str, Any] = {"cache_dir": tmp_path, "progress": False, "long_rows": "error"}
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError) as caught:
            tokenize_pairs(pairs, tokenizer, **SIZES, **options)
        assert "row 3: 9 source tokens; expected at most 6; raise --max_source_length" in str(
            caught.value
        )
        assert "row 2: 5 target tokens; expected at most 4; raise --max_target_length" in str(
            caught.value
        )
    found = tokenize_pairs(pairs, tokenizer, max_source_length=9, max_target_length=5, **options)
    source, target = row_lengths(found)
    assert (source.max(), target.max()) == (9, 5)


def test_rows_are_what_the_tokenizer_gives_one_by_one(
    tmp_path: Path, pairs: datasets.Dataset
) -> None:
    tokenizer = word_tokenizer()
    found = tokenize_pairs(
        pairs, tokenizer, source_prefix="say ", cache_dir=tmp_path, progress=False, **SIZES
    )
    assert found.cache_files
    assert len(found) == len(SOURCE)
    for row, source, target in zip(found, SOURCE, TARGET, strict=True):
        ids = tokenizer("say " + source, truncation=True, max_length=6)["input_ids"]
        labels = tokenizer(text_target=target, truncation=True, max_length=4)["input_ids"]
        assert row == {
            "source": source, "target": target, "input_ids": ids, "labels": labels,
            "source_length": len(ids), "target_length": len(labels),
        }  # fmt: skip
    assert found[2]["source_length"] == 6
    assert found[2]["input_ids"][-1] == WORDS.index("</s>")
    assert found.features["input_ids"].feature.dtype == "int32"


def test_a_second_call_reads_and_tokenises_nothing(
    tmp_path: Path, pairs: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = word_tokenizer()
    first = tokenize_pairs(pairs, tokenizer, cache_dir=tmp_path, progress=False, **SIZES)
    rows = tokens_of(first)
    refuse(monkeypatch, tokenizer)
    # Other chunks, another object, the same text.
    again = datasets.concatenate_datasets([pairs.select(range(5)), pairs.select(range(5, 12))])
    second = tokenize_pairs(again, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    monkeypatch.setattr(datasets.Dataset, "iter", Refusing())
    monkeypatch.setattr(datasets.Dataset, "__getitem__", Refusing())
    source, target = row_lengths(second)
    check_token_ids(second, source_vocab_size=10, target_vocab_size=10)
    monkeypatch.undo()
    assert tokens_of(second) == rows
    assert source.dtype == target.dtype == np.int32
    assert source.tolist() == [len(row["input_ids"]) for row in rows]
    assert target.tolist() == [len(row["labels"]) for row in rows]


def test_every_setting_counts_for_the_key(tmp_path: Path, pairs: datasets.Dataset) -> None:
    def folders() -> int:
        return len(list((tmp_path / "examples").iterdir()))

    def make(pairs: datasets.Dataset, tokenizer: Any, **options: Any) -> datasets.Dataset:
        settings = {**SIZES, "cache_dir": tmp_path, "progress": False, **options}
        return tokenize_pairs(pairs, tokenizer, **settings)

    cut_left = word_tokenizer()
    cut_left.truncation_side = "left"
    changes: list[tuple[datasets.Dataset, Any, dict[str, Any]]] = [
        (pairs, word_tokenizer(), {}),
        (pairs, word_tokenizer(), {"source_prefix": "say "}),
        (pairs, word_tokenizer(), {"max_source_length": 5}),
        (pairs, word_tokenizer(), {"max_target_length": 3}),
        (pairs, word_tokenizer([*WORDS, "seven"]), {}),
        (pairs, cut_left, {}),
        (pairs_of(TARGET, SOURCE), word_tokenizer(), {}),
        (pairs.select(range(11)), word_tokenizer(), {}),
        (pairs.select([1, 0, *range(2, 12)]), word_tokenizer(), {}),
    ]
    for number, (rows, tokenizer, options) in enumerate(changes, start=1):
        first = make(rows, tokenizer, **options)
        assert folders() == number
        assert tokens_of(make(rows, tokenizer, **options)) == tokens_of(first)
        assert folders() == number


def test_texts_that_join_alike_have_different_keys() -> None:
    keys = {
        cache.hash_pairs(pairs_of(source, target))
        for source, target in (
            (["ab", "c"], ["d", "e"]),
            (["a", "bc"], ["d", "e"]),
            (["ab", "cd"], ["", "e"]),
            (["d", "e"], ["ab", "c"]),
        )
    }
    assert len(keys) == 4


KEY_PROGRAM = """
import sys
from transformers import AutoTokenizer
from s2s_scale.data.cache import content_key
from tests.support.pairs import pairs_of
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(content_key(pairs_of(["one two"], ["three"]), tokenizer, settings={"a": 1}))
"""


def test_the_key_is_the_same_in_another_process_and_folder(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        word_tokenizer().save_pretrained(tmp_path / folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer(["one two"], truncation=True, max_length=2)  # leaves its mark in the tokenizer
    pairs = pairs_of(["one two"], ["three"])
    expected = cache.content_key(pairs, tokenizer, settings={"a": 1})
    found = subprocess.run(
        [sys.executable, "-c", KEY_PROGRAM, str(tmp_path / "b")],
        capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert found.stdout.strip() == expected


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_each_familys_tokenizer(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are tokenised as targets (FSMT, mBART, Marian differ), and the key stays put."""
    folder = tmp_path / "model"
    languages = {"src_lang": "en_XX", "tgt_lang": "de_DE"} if name == "mbart" else {}
    tiny_folder(name, folder, **languages)
    tokenizer = AutoTokenizer.from_pretrained(folder, **languages)
    pairs = pairs_of(TINY_TEXTS[:20], TINY_TEXTS[20:40] or TINY_TEXTS[:20][::-1])
    settings = {"cache_dir": tmp_path, "progress": False, **SIZES}
    found = tokenize_pairs(pairs, tokenizer, **settings)
    for row in found:
        assert row["input_ids"] == tokenizer(row["source"], truncation=True, max_length=6).input_ids
        target = tokenizer(text_target=row["target"], truncation=True, max_length=4)
        assert row["labels"] == target["input_ids"]
    if name == "mbart":
        codes = [tokenizer.convert_tokens_to_ids(code) for code in languages.values()]
        last = [found[0][column][-1] for column in ("input_ids", "labels")]
        assert last == codes
    again = AutoTokenizer.from_pretrained(folder, **languages)
    refuse(monkeypatch, again)
    assert len(tokenize_pairs(pairs, again, **settings)) == len(pairs)
    assert len(tokenize_pairs(pairs, tokenizer, **settings)) == len(pairs)


@pytest.mark.parametrize("workers", [1, 2])
def test_slow_tokenizers_and_several_processes(
    tmp_path: Path, pairs: datasets.Dataset, workers: int
) -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    found = tokenize_pairs(
        pairs, tokenizer, cache_dir=tmp_path, num_workers=workers, progress=False, **SIZES
    )
    assert found["source"][:] == SOURCE
    assert found["target"][:] == TARGET
    assert found["input_ids"][:] == [
        tokenizer(text, truncation=True, max_length=6)["input_ids"] for text in SOURCE
    ]
    entry = cache.entry_of(found)
    assert entry is not None
    assert len(list(entry.glob("*.arrow"))) == workers
    assert row_lengths(found)[0].tolist() == [6, 5, 6] * 4


def test_useful_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    count = tokenize.useful_workers
    assert [count(n, fast=False) for n in (1, 39_999, 40_000, 10**7)] == [1, 1, 2, 8]
    assert count(10**7, fast=True) == 1


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(
    tmp_path: Path, pairs: datasets.Dataset, capfd: pytest.CaptureFixture[str], progress: bool
) -> None:
    assert not datasets.are_progress_bars_disabled()
    tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=progress, **SIZES)
    assert ("Tokenising" in capfd.readouterr().err) is progress
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("damage", ["cut", "manifest", "missing", "garbage"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, pairs: datasets.Dataset, damage: str) -> None:
    found = tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    expected = tokens_of(found)
    entry = cache.entry_of(found)
    assert entry is not None
    arrow, manifest = entry / "examples.arrow", entry / "entry.json"
    content = arrow.read_bytes()
    if damage == "cut":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        arrow.write_bytes(b"x" * len(content))
    elif damage == "missing":
        (entry / "source_lengths.npy").unlink()
    else:
        manifest.write_text(manifest.read_text()[:-5])
    again = tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    assert tokens_of(again) == expected
    assert cache.entry_of(again) == entry
    assert [path.name for path in (tmp_path / "examples").iterdir()] == [entry.name]


def test_overwrite_tokenises_again(
    tmp_path: Path, pairs: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = word_tokenizer()
    settings = {"cache_dir": tmp_path, "progress": False, **SIZES}
    tokenize_pairs(pairs, tokenizer, **settings)
    anew = tokenize_pairs(pairs, tokenizer, overwrite=True, **settings)
    assert len(anew) == 12
    refuse(monkeypatch, tokenizer)
    with pytest.raises(AssertionError, match="was called"):
        tokenize_pairs(pairs, tokenizer, overwrite=True, **settings)
    # What failed left the entry as it was, and nothing beside it.
    assert len(tokenize_pairs(pairs, tokenizer, **settings)) == 12
    assert len(list((tmp_path / "examples").iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, pairs: datasets.Dataset) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*--data_cache_dir"):
        tokenize_pairs(
            pairs, word_tokenizer(), cache_dir=tmp_path / "file", progress=False, **SIZES
        )


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, pairs: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenize.np, "save", save)
    with pytest.raises(UserError, match=r"\(No space left on device\).*S2S_SCALE_CACHE"):
        tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    assert list((tmp_path / "examples").iterdir()) == []


def test_entries_can_be_read_by_others(tmp_path: Path, pairs: datasets.Dataset) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    found = tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    entry = cache.entry_of(found)
    assert entry is not None
    assert entry.stat().st_mode == plain.stat().st_mode


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("S2S_SCALE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.default_cache_dir() == tmp_path / ".cache" / "s2s_scale"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.default_cache_dir() == Path("/x/s2s_scale")
    monkeypatch.setenv("S2S_SCALE_CACHE", "~/y")
    assert cache.default_cache_dir() == tmp_path / "y"


def test_lengths_of_changed_data_are_its_own(tmp_path: Path, pairs: datasets.Dataset) -> None:
    found = tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    source, target = row_lengths(found)
    assert source.tolist() == [4, 2, 6] * 4
    chosen = [2, 0, 7]
    for changed, rows in (
        (found.select(range(4)), list(range(4))),
        (found.select(chosen), chosen),
        (found.select(list(reversed(range(12)))), list(reversed(range(12)))),
        (found.remove_columns(["source_length", "target_length"]), list(range(12))),
        (found.with_format("torch"), list(range(12))),
    ):
        assert row_lengths(changed)[0].tolist() == source[rows].tolist()
        assert row_lengths(changed)[1].tolist() == target[rows].tolist()


def test_lengths_of_any_data_set() -> None:
    rows = [{"input_ids": [1] * n, "labels": np.ones(n + 1)} for n in range(1, 5)]
    assert [side.tolist() for side in row_lengths(rows)] == [[1, 2, 3, 4], [2, 3, 4, 5]]
    rows = [{"n": 7, "x": 0}, {"n": 8, "x": 0}]
    assert [s.tolist() for s in row_lengths(rows, length_column="n")] == [[7, 8], [0, 0]]
    table = datasets.Dataset.from_list(rows)
    assert [s.tolist() for s in row_lengths(table, length_column="n")] == [[7, 8], [0, 0]]
    rows = [{"source_length": 3, "target_length": 4, "length": 9}]
    assert [side.tolist() for side in row_lengths(rows)] == [[3], [4]]
    assert [side.tolist() for side in row_lengths([])] == [[], []]
    for dataset in ([{"x": 1}], datasets.Dataset.from_dict({"x": [1]})):
        with pytest.raises(UserError, match="found rows with x; expected input_ids"):
            row_lengths(dataset)


def test_token_ids_beyond_the_vocabulary(tmp_path: Path, pairs: datasets.Dataset) -> None:
    found = tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    check_token_ids(found, source_vocab_size=10, target_vocab_size=10)
    with pytest.raises(UserError) as caught:
        check_token_ids(found, source_vocab_size=9, target_vocab_size=9)
    lines = caught.value.problems
    # "six" is id 9: in every third source (three of them kept) and in "four five six one".
    assert [line.split(":")[0] for line in lines[:4]] == ["row 3", "row 6", "row 9", "row 12"]
    assert "source token id 9; expected ids from 0 to 8" in lines[0]
    assert "--tokenizer_name" in lines[0]
    assert [line.split(":")[0] for line in lines[4:]] == ["row 2", "row 5", "row 8", "row 11"]
    assert "target token id 9" in lines[4]


def test_token_ids_of_unsaved_rows() -> None:
    rows = [{"input_ids": [], "labels": [-100, 3]}] * 7 + [{"input_ids": [3, -1], "labels": []}]
    data = datasets.Dataset.from_list(rows)
    with pytest.raises(UserError) as caught:
        check_token_ids(data, source_vocab_size=4, target_vocab_size=3)
    lines = caught.value.problems
    assert lines[0].startswith("row 8: source token id -1")
    assert lines[1].startswith("row 1: target token id 3")
    assert lines[5].startswith("row 5")
    assert lines[6] == "and 2 more rows with target token ids beyond the vocabulary"
    check_token_ids(data.select(range(7)), source_vocab_size=4, target_vocab_size=4)


def test_manifest_says_what_is_there(tmp_path: Path, pairs: datasets.Dataset) -> None:
    found = tokenize_pairs(pairs, word_tokenizer(), cache_dir=tmp_path, progress=False, **SIZES)
    entry = cache.entry_of(found)
    assert entry is not None
    facts = json.loads((entry / "entry.json").read_text())
    assert facts["rows"] == 12
    assert facts["input_ids"] == [1, 9]
    assert facts["labels"] == [1, 9]
