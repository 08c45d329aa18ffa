"""Loading pairs: every format gives the same rows, every mistake its line."""

from __future__ import annotations

import csv
import itertools
import json
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2s_scale.config import DataArguments
from s2s_scale.data import readers, sources
from s2s_scale.data.sources import has_split, load_pairs
from s2s_scale.errors import Problems, UserError
from tests.support.pairs import write_folder

SOURCE = ["one", 'two "quoted", words', "tab\there?", "ünï\u2028cödé \U0001f600", "five"]
TARGET = ["eins", "zwei\x0bdrei", '"vier"', "\u0085fünf\r6", "sechs "]


def rows_of(pairs: datasets.Dataset) -> tuple[list[str], list[str]]:
    assert pairs.column_names == ["source", "target"]
    return list(pairs["source"]), list(pairs["target"])


def problems_of(split: str = "train", **settings: object) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_pairs(DataArguments(**settings), split)  # type: ignore[arg-type]
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


def write_table(path: Path) -> dict[str, str]:
    """Write SOURCE and TARGET to ``path``; returns the column settings that its layout needs."""
    if path.name == "nested.jsonl":
        rows = [
            {"id": i, "translation": {"de": t, "en": s}}
            for i, (s, t) in enumerate(zip(SOURCE, TARGET, strict=True))
        ]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return {"src_lang": "en_XX", "tgt_lang": "de"}
    rows = [{"source": s, "x": "-", "target": t} for s, t in zip(SOURCE, TARGET, strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name == "array.json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    elif path.suffix in (".json", ".jsonl"):
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, ["source", "x", "target"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return {}


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "array.json", "nested.jsonl", "a.csv", "a.tsv", "a.parquet"],
)
def test_table_files_give_the_rows_written(tmp_path: Path, name: str) -> None:
    columns = write_table(tmp_path / name)
    data = DataArguments(validation_file=str(tmp_path / name), **columns)
    assert rows_of(load_pairs(data, "val")) == (SOURCE, TARGET)
    assert has_split(data, "val")
    assert not has_split(data, "train")
    data.n_val = 2
    assert rows_of(load_pairs(data, "val")) == (SOURCE[:2], TARGET[:2])


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", None])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_files_split_at_newlines_only(
    tmp_path: Path, end: bytes, last: bytes | None, mark: bytes
) -> None:
    tail = end if last is None else last
    source, target = (
        mark + end.join(text.encode() for text in side) + tail for side in (SOURCE, TARGET)
    )
    folder = write_folder(tmp_path / "data", source=source, target=target)
    data = DataArguments(data_dir=str(folder))
    assert rows_of(load_pairs(data, "train")) == (SOURCE, TARGET)
    assert has_split(data, "train")
    assert not has_split(data, "test")


@pytest.mark.parametrize("block", [4, 7, 16, 1 << 20])
def test_blocks_do_not_change_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """The reference is bytes.split on the whole file."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    content = "äöü\r\n\r\n\n\r\rx\n".encode() + b"long line " * 9 + b"\n\x00\ny"
    path = tmp_path / "lines"
    path.write_bytes(content)
    problems = Problems()
    expected = [line.removesuffix("\r") for line in content.decode().split("\n")]
    blocks = list(readers.read_lines(path, problems=problems))
    assert [text for texts, _ in blocks for text in texts.to_pylist()] == expected
    ends = [end for _, ends in blocks for end in ends.tolist()]
    lines = [content[start:end] for start, end in itertools.pairwise([0, *ends])]
    assert b"".join(lines) == content and all(line.endswith(b"\n") for line in lines[:-1])
    assert not problems


def test_a_million_lines_load_in_seconds(tmp_path: Path) -> None:
    line = b"a line of some ten words, as they come in text\n"
    folder = write_folder(tmp_path / "data", source=line * 1_000_000, target=line * 1_000_000)
    start = time.perf_counter()
    pairs = load_pairs(DataArguments(data_dir=str(folder)), "train")
    assert time.perf_counter() - start < 20
    assert len(pairs) == 1_000_000


def test_empty_lines_are_named_five_of_each_kind(tmp_path: Path) -> None:
    source = "".join(f"{'' if row % 2 else row}\n" for row in range(18))
    target = source.replace("4\n", " \u3000\t\n", 1)
    folder = write_folder(tmp_path / "d", source=source.encode(), target=target.encode())
    lines = problems_of(data_dir=str(folder))
    assert [line.split(": ")[0] for line in lines[:5]] == [
        f"{folder / 'train.source'}:{number}" for number in (2, 4, 6, 8, 10)
    ]
    assert "empty source" in lines[0]
    assert "found ''" in lines[0]
    assert "delete" in lines[0]
    assert lines[5].startswith("and 4 more empty source lines")
    assert lines[8].startswith(f"{folder / 'train.target'}:5: empty target")
    assert "found ' \\u3000\\t'" in lines[8]
    assert lines[11].startswith("and 5 more empty target lines")
    assert len(lines) == 12


def test_only_the_rows_in_use_are_checked_for_emptiness(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", source=b"a\nb\n\n", target=b"a\nb\n\n")
    assert len(load_pairs(DataArguments(data_dir=str(folder), n_train=2), "train")) == 2
    assert len(problems_of(data_dir=str(folder))) == 2


def test_different_line_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", source=b"a\nb\nc", target=b"a\nb\n")
    (line,) = problems_of(data_dir=str(folder))
    assert "train.source has 3 lines" in line
    assert "train.target has 2;" in line


def test_invalid_utf8_names_line_and_byte(tmp_path: Path) -> None:
    source = b"\xef\xbb\xbfone\ntw\xc3\xb6\ndr\xf6i\n" + b"\xff\n" * 7
    folder = write_folder(tmp_path / "d", source=source, target=b"x\n" * 10)
    lines = problems_of(data_dir=str(folder))
    assert lines[0].startswith(f"{folder / 'train.source'}:3: byte 0xf6 at position 3 ")
    assert "iconv -f LATIN1" in lines[0]
    assert lines[1].startswith(f"{folder / 'train.source'}:4: byte 0xff at position 1 ")
    assert lines[5].startswith("and 3 more lines of")
    assert len(lines) == 6


def test_a_character_cut_by_a_newline_is_invalid(tmp_path: Path) -> None:
    """Its bytes are whole once newlines are taken out, so the check must come before."""
    folder = write_folder(tmp_path / "d", source=b"\xe2\n\x82\xac\n", target=b"x\nx\n")
    assert len(problems_of(data_dir=str(folder))) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_invalid_utf8_in_table_files(tmp_path: Path, name: str) -> None:
    """Nothing else is said of what follows: it would look wrong, whatever it is."""
    first = b"source,target" if name == "a.csv" else b'{"source": "a", "target": "b"}'
    (tmp_path / name).write_bytes(first + b"\na,\xf6\nand more\n")
    (line,) = problems_of(train_file=str(tmp_path / name))
    assert line.startswith(f"{tmp_path / name}:2: byte 0xf6 at position 3")
    (tmp_path / name).write_text("source,target\na,b\n" * 9, encoding="utf-16")
    (line,) = problems_of(train_file=str(tmp_path / name))
    assert line.startswith(f"{tmp_path / name}:1: byte 0xff") and "iconv -f UTF-16" in line


def test_missing_folder_file_and_empty_split(tmp_path: Path) -> None:
    (line,) = problems_of(data_dir=str(tmp_path / "no"))
    assert "no such folder" in line
    assert "--data_dir" in line
    folder = write_folder(tmp_path / "d", source=b"", target=b"")
    (line,) = problems_of(data_dir=str(folder))
    assert "train split has no rows" in line
    assert str(folder / "train.source") in line
    (folder / "train.target").unlink()
    (line,) = problems_of(data_dir=str(folder))
    assert line.startswith(f"{folder / 'train.target'}: no such file")
    (tmp_path / "e.jsonl").write_text("\n")
    (line,) = problems_of(train_file=str(tmp_path / "e.jsonl"))
    assert "has no rows" in line


def test_table_paths(tmp_path: Path) -> None:
    (line,) = problems_of(train_file=str(tmp_path / "a.jsonnl"))
    assert "unknown file ending '.jsonnl' (did you mean '.jsonl'?)" in line
    assert ".parquet" in line
    (line,) = problems_of(train_file=str(tmp_path / "a.csv"))
    assert "--train_file" in line
    assert "no such file" in line
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    (line,) = problems_of(train_file=str(tmp_path / "b.parquet"))
    assert "not a readable .parquet file" in line
    (line,) = problems_of("test", train_file=str(tmp_path / "a.csv"))
    assert "no test data" in line
    assert "--test_file" in line


def test_columns_missing_and_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sources,target\na,b\n")
    (line,) = problems_of(train_file=str(path))
    assert line.startswith(f"{path}:1: no column 'source' for the source text")
    assert "did you mean 'sources'?" in line
    assert "there: sources, target;" in line
    assert "--source_column" in line
    pairs = load_pairs(DataArguments(train_file=str(path), source_column="sources"), "train")
    assert rows_of(pairs) == (["a"], ["b"])
    (line,) = problems_of(train_file=str(path), source_column="target")
    assert "both source and target" in line


def test_nested_translation_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"translation": {"en": "a", "de": "b"}}\n')
    for columns in (
        {"src_lang": "de_DE", "tgt_lang": "en_XX"},
        {"source_column": "de", "target_column": "translation.en"},
    ):
        pairs = load_pairs(DataArguments(train_file=str(path), **columns), "train")
        assert rows_of(pairs) == (["b"], ["a"])
    lines = problems_of(train_file=str(path), src_lang="fr")
    assert len(lines) == 2
    assert "there: translation.en, translation.de;" in lines[0]
    assert "--src_lang" in lines[0]
    assert "--tgt_lang" in lines[1]


def test_bad_rows_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        '{"source": "a", "target": "b"}',
        '{"source": "a", "target": 7}',
        '{"source": null, "target": "b"}',
        '{"source": "a", "target": "b"',
        '{"target": "b"}',
        '["a", "b"]',
        '{"source": "\\ud83d", "target": "b"}',
    ]
    path.write_text("\n".join(rows))
    lines = problems_of(train_file=str(path))
    found = {int(line[len(f"{path}:") :].split(":")[0]): line for line in lines}
    assert sorted(found) == [2, 3, 4, 5, 6, 7]
    assert "'target' holds 7 (int); expected text" in found[2]
    assert "'source' holds null" in found[3]
    assert "not JSON (Expecting ',' delimiter" in found[4]
    assert "'source' is missing" in found[5]
    assert "no JSON object" in found[6]
    assert "\\ud83d stands alone" in found[7]
    assert "surrogate pair" in found[7]


def test_bad_rows_of_a_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"source": "a", "target": "b"}, {"source": "a", "target": " "}]')
    (line,) = problems_of(train_file=str(path))
    assert line.startswith(f"{path}: row 2: empty target")
    path.write_text('[{"source": "a", "target": "b"},\n {]')
    (line,) = problems_of(train_file=str(path))
    assert line.startswith(f"{path}:2: not JSON")


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('source,target\n"a\nb",c\n\n1,2,3\n"x" y,z\nnever,reached\n')
    lines = problems_of(train_file=str(path))
    assert lines[0].startswith(f"{path}:5: 3 cells; expected 2")
    assert lines[1].startswith(f"{path}:6: ',' expected after '\"'")
    assert len(lines) == 2
    path.write_text('source,target\n"a\nb",c\nd,\n')
    (line,) = problems_of(train_file=str(path))
    assert line.startswith(f"{path}:4: empty target")


def test_a_tsv_with_bare_quotes_is_refused_not_misread(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('source\ttarget\n"Yes," he said.\t"Ja", sagte er.\n')
    (line,) = problems_of(train_file=str(path))
    assert line.startswith(f"{path}:2: ")
    assert ".jsonl" in line


def test_cells_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"source,target\n{'x' * 200_000},y\n")
    pairs = load_pairs(DataArguments(train_file=str(path)), "train")
    assert len(pairs[0]["source"]) == 200_000


def test_parquet_types_nulls_and_nesting(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"source": [1, 2], "target": ["a", "b"]}), path)
    (line,) = problems_of(train_file=str(path))
    assert "'source' holds int64; expected text" in line
    pq.write_table(pa.table({"source": ["a", None], "target": ["a", "b"]}), path)
    (line,) = problems_of(train_file=str(path))
    assert line.startswith(f"{path}: row 2: empty source")
    assert "found None" in line
    dictionary = pa.array(["p", "q"]).dictionary_encode()
    nested = pa.StructArray.from_arrays([pa.array(["a", "b"]), dictionary], ["de", "en"])
    pq.write_table(pa.table({"translation": nested}), path)
    pairs = load_pairs(DataArguments(train_file=str(path), src_lang="en", tgt_lang="de"), "train")
    assert rows_of(pairs) == (["p", "q"], ["a", "b"])


def test_exactly_one_kind_of_source(tmp_path: Path) -> None:
    (line,) = problems_of()
    assert "found none" in line
    assert "--dataset_name" in line
    (line,) = problems_of(data_dir="d", train_file="f", test_file="g")
    assert "found --data_dir and --train_file and --test_file" in line
    (line,) = problems_of(data_dir="d", source_column="s")
    assert "--source_column" in line
    assert "no effect" in line
    with pytest.raises(UserError, match="exactly one"):
        has_split(DataArguments(), "train")


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_saved_dataset_dict(tmp_path: Path, name: str) -> None:
    rows = {"src": SOURCE, "source": TARGET, "n": list(range(len(SOURCE)))}
    parts = {"train": datasets.Dataset.from_dict(rows), name: datasets.Dataset.from_dict(rows)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    settings = {
        "dataset_name": str(tmp_path / "saved"),
        "source_column": "src",
        "target_column": "source",
    }
    data = DataArguments(**settings, n_val=3)
    assert has_split(data, "val")
    assert has_split(data, "train")
    assert not has_split(data, "test")
    pairs = load_pairs(data, "val")
    assert rows_of(pairs) == (SOURCE[:3], TARGET[:3])
    assert pairs.cache_files  # memory-mapped
    (line,) = problems_of("test", **settings)
    assert "no test split" in line
    assert f"train, {name}" in line
    (line,) = problems_of(dataset_name=settings["dataset_name"], target_column="n")
    assert "'n' holds int64" in line


def test_saved_single_dataset_is_the_training_split(tmp_path: Path) -> None:
    translations = [{"en": s, "ro": t} for s, t in zip(SOURCE, TARGET, strict=True)]
    features = datasets.Features({"translation": datasets.Translation(["en", "ro"])})
    saved = datasets.Dataset.from_dict({"translation": translations}, features=features)
    saved.select([4, 0]).save_to_disk(str(tmp_path / "saved"))
    data = DataArguments(dataset_name=str(tmp_path / "saved"), src_lang="en_XX", tgt_lang="ro_RO")
    assert has_split(data, "train")
    assert not has_split(data, "val")
    assert rows_of(load_pairs(data, "train")) == ([SOURCE[4], SOURCE[0]], [TARGET[4], TARGET[0]])


def test_saved_dataset_with_empty_rows(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"source": ["a", None], "target": ["", "b"]})
    saved.save_to_disk(str(tmp_path / "saved"))
    lines = problems_of(dataset_name=str(tmp_path / "saved"))
    assert len(lines) == 2
    assert "split train, row 2: empty source" in lines[0]
    assert "row 1: empty target" in lines[1]


def test_a_folder_that_was_not_saved(tmp_path: Path) -> None:
    (line,) = problems_of(dataset_name=str(tmp_path))
    assert "save_to_disk" in line
    assert "--data_dir" in line


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"source": SOURCE, "target": TARGET})
    calls = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return rows

    monkeypatch.setattr(
        sources.datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"]
    )
    monkeypatch.setattr(sources.datasets, "load_dataset", load)
    data = DataArguments(dataset_name="someone/pairs", dataset_config_name="de-en")
    assert has_split(data, "val")
    assert not has_split(data, "test")
    assert rows_of(load_pairs(data, "val")) == (SOURCE, TARGET)
    assert calls == [("someone/pairs", "de-en", "validation")]

    def fail(name: str, config: str | None) -> list[str]:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(sources.datasets, "get_dataset_split_names", fail)
    (line,) = problems_of(dataset_name="someone/pairs")
    assert "someone/pairs: Couldn't reach the Hub; expected" in line
