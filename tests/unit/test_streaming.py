"""Streams of pairs: the rows of files from any place, plans block by block, exact resuming."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2s_scale import cli
from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.config import DataArguments
from s2s_scale.data.sources import load_pairs
from s2s_scale.data.streaming import FIRST_BLOCK, BlockPlace, StreamedExamples, open_stream
from s2s_scale.errors import UserError
from s2s_scale.trainer.dataloaders import make_sampler
from s2s_scale.trainer.streaming import StreamLoader
from tests.support.families import tiny_folder
from tests.support.training import fresh, history, our_trainer

ROWS = 53
TEXTS = [
    (f"w{row} " * (1 + row * 7 % 11) + "é", f"v{row} " * (1 + row * 5 % 9) + 'say "x",\ty')
    for row in range(ROWS)
]


class Words:
    """A tokenizer: a word becomes its number, and the row's end id 1."""

    is_fast = True

    def __call__(self, text: Any = None, *, text_target: Any = None, **options: Any) -> Any:
        rows = []
        for line in text if text is not None else text_target:
            ids = [10 + int("".join(filter(str.isdigit, w)) or 0) for w in line.split()]
            limit = options["max_length"]
            rows.append((ids if limit is None else ids[: limit - 1]) + [1])
        return {"input_ids": rows}


def write(folder: Any, kind: str) -> DataArguments:
    if kind == "data_dir":
        for side, name in enumerate(("source", "target")):
            lines = "".join(pair[side] + "\n" for pair in TEXTS)
            (folder / f"train.{name}").write_text("\ufeff" + lines, encoding="utf-8")
        return DataArguments(data_dir=str(folder), streaming=True)
    path = folder / f"train{kind}"
    rows = [dict(zip(("source", "target"), pair, strict=True)) for pair in TEXTS]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    elif kind == ".jsonl":
        languages = [{"en": row["source"], "ro": row["target"]} for row in rows]
        lines = [json.dumps({"translation": row}, ensure_ascii=False) for row in languages]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        return DataArguments(train_file=str(path), src_lang="en", tgt_lang="ro", streaming=True)
    else:
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, ["target", "source"], delimiter="\t" if kind == ".tsv" else ","
            )
            writer.writeheader()
            # A cell of two lines: a row is not a line.
            writer.writerows({**row, "target": row["target"].replace("\t", "\n")} for row in rows)
    return DataArguments(train_file=str(path), streaming=True)


@pytest.mark.parametrize("kind", ["data_dir", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_rows_are_those_of_loading_from_every_place_on(tmp_path: Any, kind: str) -> None:
    data = write(tmp_path, kind)
    loaded = load_pairs(data, "train")
    wanted = list(zip(loaded["source"], loaded["target"], strict=True))
    assert len(wanted) == ROWS
    stream = open_stream(data)
    pairs = list(stream.pairs())
    assert [(pair.source, pair.target) for pair in pairs] == wanted
    assert [pair.after.rows for pair in pairs] == list(range(1, ROWS + 1))
    for start in (1, 10, 26, ROWS - 1, ROWS):
        rest = list(stream.pairs(pairs[start - 1].after))
        assert rest == pairs[start:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"source": "a", "target": "b"}\n[1]\n', "a.jsonl:2: no JSON object"),
        (
            "a.jsonl",
            '{"source": "a", "target": "b"}\n{"source": "a"}',
            "a.jsonl:2: column 'target' is missing",
        ),
        ("a.jsonl", '{"source": "a", "target": " "}\n', "a.jsonl:1: empty target text"),
        ("a.json", '[{"source": "a", "target": "b"}]', "is one array cannot be streamed"),
        ("a.csv", "source,target\na,b\na\n", "a.csv:3: 1 cells; expected 2"),
        ("a.tsv", 'source\ttarget\na\t"b"c\n', "a.tsv:2"),
        ("a.csv", b"source,target\na,\xff\n", "a.csv:2: byte 0xff"),
        ("a.parquet", "no", "a.parquet: not a readable .parquet"),
        ("a.jsonl", "\n", "has no rows; expected at least 1"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Any, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(examples(open_stream(DataArguments(train_file=str(path), streaming=True))))


def test_files_of_different_length_are_named(tmp_path: Any) -> None:
    (tmp_path / "train.source").write_text("a\nb\nc\n")
    (tmp_path / "train.target").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"train.source has 3 lines and .*target has 2;"):
        list(open_stream(DataArguments(data_dir=str(tmp_path), streaming=True)).pairs())


def examples(stream: Any, **options: Any) -> StreamedExamples:
    defaults = {"vocab_sizes": (100, 100), "max_source_length": 20, "max_target_length": 20}
    return StreamedExamples(stream, Words(), **{**defaults, "buffer": 20, **options})


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_stream(write(tmp_path_factory.mktemp("stream"), ".jsonl"))


def test_blocks_hold_each_row_once_an_epoch_and_begin_anywhere(stream: Any) -> None:
    blocks = examples(stream).blocks(rows=20)
    found = [next(blocks) for _ in range(7)]
    assert [len(block) for block in found] == [20, 20, 13, 20, 20, 13, 20]
    assert [(b.start.epoch, b.start.block) for b in found[2:5]] == [(0, 2), (1, 0), (1, 1)]
    rows = [row for block in found[:3] for row in block.input_ids]
    assert len({row[0] for row in rows}) == ROWS
    assert rows == [row for block in found[3:6] for row in block.input_ids]
    for number in (0, 2, 4):
        place = BlockPlace.from_json(json.loads(json.dumps(found[number].start.as_json())))
        again = examples(stream).blocks(place, rows=20)
        assert [next(again) for _ in range(3)] == found[number : number + 3]


def test_a_limit_ends_the_epoch(stream: Any) -> None:
    blocks = examples(stream, limit=25).blocks(rows=20)
    assert [len(next(blocks)) for _ in range(4)] == [20, 5, 20, 5]
    assert len(list(examples(stream, limit=25))) == 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_sizes": (30, 100)}, "row 21: source token id 30; expected ids from 0 to 29"),
        ({"max_target_length": 5, "long_rows": "error"}, "row 2: .* target tokens; expected at m"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(
    stream: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(examples(stream, **options))


def loader(
    stream: Any, tmp_path: Any, *, rank: int, world_size: int, **values: Any
) -> StreamLoader:
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), max_steps=9, **values)
    return StreamLoader(
        examples(stream),
        plan=partial(make_sampler, args, rows_per_device=3, rank=rank, world_size=world_size),
        collate=list,
        rows_per_block=18,
        accumulation=args.groups_per_step or 1,
    )


def real_rows(batch: list[Any]) -> list[int]:
    return [row["input_ids"][0] for row in batch if any(id >= 0 for id in row["labels"])]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batching", ["tokens", "fixed"])
def test_ranks_share_steps_that_do_not_depend_on_them(
    stream: Any, tmp_path: Any, batching: str, world_size: int
) -> None:
    values: dict[str, Any] = {"batching": batching}
    if batching == "tokens":
        values |= {"tokens_per_step": 120, "groups_per_step": 2}
    steps = 36
    micro_batches = steps * values.get("groups_per_step", 1)
    shares = []
    for rank in range(world_size):
        batches = iter(loader(stream, tmp_path, rank=rank, world_size=world_size, **values))
        shares.append([real_rows(next(batches)) for _ in range(micro_batches)])
    each = values.get("groups_per_step", 1)
    together = [
        sorted(row for share in shares for batch in share[n : n + each] for row in batch)
        for n in range(0, micro_batches, each)
    ]
    seen: list[int] = []
    while len(seen) < ROWS:
        seen += together.pop(0)
    assert sorted(seen) == list(range(10, 10 + ROWS))  # the epoch's end is a step's end
    if batching == "tokens":
        alone = iter(loader(stream, tmp_path, rank=0, world_size=1, **values))
        expected = [
            sorted(row for _ in range(each) for row in real_rows(next(alone))) for _ in range(9)
        ]
        again = [
            sorted(row for share in shares for batch in share[n : n + each] for row in batch)
            for n in range(0, 9 * each, each)
        ]
        assert again == expected
        first, second = expected[:4], together[:4]
        assert first != second  # another order in the next epoch


@pytest.mark.parametrize("stopped", [1, 4, 5, 9, 14])
def test_a_loader_goes_on_where_it_was(stream: Any, tmp_path: Any, stopped: int) -> None:
    values = {"batching": "tokens", "tokens_per_step": 120, "groups_per_step": 2}
    make = partial(loader, stream, tmp_path, rank=0, world_size=1, **values)
    through = make()
    batches = iter(through)
    whole = [next(batches) for _ in range(40)]
    position = json.loads(json.dumps(through.position(stopped)))
    resumed = make()
    resumed.go_on(position, stopped)
    rest = iter(resumed)
    assert [next(rest) for _ in range(8)] == whole[2 * stopped : 2 * stopped + 8]
    assert resumed.position(stopped + 2) == through.position(stopped + 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "max_steps=-1: expected a number above 0"),
        ({"max_steps": 3, "eval_strategy": "epoch"}, "eval_strategy=epoch: cannot take effect"),
        ({"max_steps": 3, "batching": "packed"}, "batching=packed: needs the lengths of all rows"),
        ({"max_steps": 3, "max_tokens_per_device": 99}, "raise --groups_per_step"),
        ({"max_steps": 3, "dataloader_num_workers": 1}, "a thread prefetches"),
    ],
)
def test_what_a_stream_cannot_do_is_said(
    stream: Any, tmp_path: Any, values: dict[str, Any], message: str
) -> None:
    values = {"save_strategy": "no", "eval_dataset": [], **values}
    with pytest.raises(UserError, match=message):
        our_trainer(fresh("bart"), tmp_path, examples(stream), **values)


def test_a_resumed_run_is_the_run_that_went_through(stream: Any, tmp_path: Any) -> None:
    values = {
        "max_steps": 10,
        "tokens_per_step": 120,
        "groups_per_step": 2,
        "save_strategy": "steps",
        "save_steps": 6,
        "learning_rate": 1e-3,
    }
    one = our_trainer(fresh("bart"), tmp_path / "one", examples(stream), **values)
    one.train()
    two = our_trainer(fresh("bart", seed=3), tmp_path / "two", examples(stream), **values)
    two.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
    losses = history(one, "loss")
    assert len(losses) == 10 and len(set(losses)) == 10
    assert history(two, "loss")[-4:] == pytest.approx(losses[6:], abs=0)
    other = our_trainer(fresh("bart"), tmp_path / "three", examples(stream, buffer=21), **values)
    with pytest.raises(UserError, match="buffer"):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))


def test_the_command_trains_on_a_stream(tmp_path: Any, capsys: Any) -> None:
    data = write(tmp_path, "data_dir")
    model = tiny_folder("t5", tmp_path / "model")
    words = ["train", "--model", str(model), "--data_dir", str(data.data_dir), "--profile", "cpu"]
    words += "--streaming --shuffle_buffer 20 --logging_steps 1 --report_to none".split()
    words += ["--save_strategy", "no", "--tokens_per_step", "2000", "--disable_tqdm"]
    words += ["--output_dir", str(tmp_path / "run")]
    assert cli.main(words) != 0
    assert "--max_steps" in capsys.readouterr().err
    assert cli.main([*words, "--max_steps", "5"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert len(losses) == 5 and np.isfinite(losses).all()
    assert cli.main([*words[:-2], "--shuffle_buffer", "9", "--output_dir", "x"]) != 0


def test_a_buffer_without_a_stream_has_no_effect() -> None:
    with pytest.raises(UserError, match="shuffle_buffer=5: has no effect without --streaming"):
        DataArguments(data_dir="d", shuffle_buffer=5).validate()
    assert FIRST_BLOCK.as_json() == {"epoch": 0, "block": 0, "rows": 0, "lines": 0, "offsets": ()}
