"""From the mapped file to a batch in time: rows without copies, and batches made ahead."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time

import datasets
import numpy as np
import pytest
import torch

from s2s_scale.backends import make_backend
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.data.prefetch import BATCHES_AHEAD, ArrowRows, prefetch, reads_from_arrow
from s2s_scale.data.samplers import FillerRows
from s2s_scale.errors import UserError
from tests.support.training import fresh, history, our_trainer, ragged_rows

FEATURES = datasets.Features(
    {name: datasets.Sequence(datasets.Value("int32")) for name in ("input_ids", "labels")}
)


def token_rows(count, *, seed=0):
    random = np.random.RandomState(seed)
    columns = {
        name: [random.randint(5, 90, random.randint(1, 9)).tolist() for _ in range(count)]
        for name in FEATURES
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """Rows in several files and chunks, memory-mapped, and some of them sliced off."""
    folder = tmp_path_factory.mktemp("rows")
    for part in range(2):
        token_rows(2500, seed=part).save_to_disk(str(folder / str(part)))
    parts = [datasets.load_from_disk(str(folder / str(part))) for part in range(2)]
    return datasets.concatenate_datasets([parts[0], parts[1].select(range(700, 2100))])


def test_rows_are_those_of_datasets(mapped):
    rows = ArrowRows(mapped)
    assert reads_from_arrow(mapped) and len(mapped.data.column("labels").chunks) > 2
    assert len(rows) == 3900
    wanted = [0, 2499, 2500, 3899, 7, 7]
    found = rows.__getitems__(wanted)
    assert [{name: list(ids) for name, ids in row.items()} for row in found] == [
        mapped[row] for row in wanted
    ]
    assert [row["labels"].tolist() for row in map(rows.__getitem__, range(3900))] == list(
        mapped["labels"]
    )
    again = pickle.loads(pickle.dumps(rows))
    assert again[3000]["labels"].tolist() == mapped[3000]["labels"]


def test_filler_rows_and_batches_are_the_same(mapped):
    collate = Seq2SeqCollator(1)
    ids = [5, ~9, 2600, 1]
    one, other = (
        collate(FillerRows(rows).__getitems__(ids)) for rows in (mapped, ArrowRows(mapped))
    )
    assert one.keys() == other.keys() == {"input_ids", "attention_mask", "labels"}
    for name in one:
        assert torch.equal(one[name], other[name])


def test_other_tables_are_left_to_datasets(mapped):
    nulls = datasets.Dataset.from_dict({"input_ids": [[1], None], "labels": [[1], [2]]})
    others = {
        "chosen rows": mapped.select([5, 1, 3]),
        "format": mapped.with_format("numpy"),
        "more columns": mapped.add_column("length", [1] * len(mapped)),
        "missing values": nulls,
        "words": datasets.Dataset.from_dict({"input_ids": [["a"]], "labels": [["b"]]}),
        "a list": [{"input_ids": [1]}],
    }
    assert [name for name, rows in others.items() if reads_from_arrow(rows)] == []


def test_items_come_in_order_from_a_thread_that_stops():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    assert list(prefetch(items())) == list(range(100))
    made.clear()
    part = prefetch(items())
    assert [next(part) for _ in range(3)] == [0, 1, 2]
    part.close()
    for thread in threading.enumerate():
        if thread.name == "batches":
            thread.join(5)
            assert not thread.is_alive()
    assert len(made) <= 3 + BATCHES_AHEAD + 1


def test_an_error_in_the_thread_is_raised_where_items_are_read():
    def items():
        yield 1
        raise UserError("row 7 is damaged")

    reader = prefetch(items())
    assert next(reader) == 1
    with pytest.raises(UserError, match="row 7 is damaged"):
        next(reader)


ENDS_MEANWHILE = """
import sys, time
from s2s_scale.data.prefetch import prefetch

def items():
    yield 1
    time.sleep(1)  # stands for work inside torch, in which Python must not end the thread
    print("done", flush=True)
    yield 2

reader = prefetch(items())
next(reader)
sys.exit(3)
"""


def test_a_program_that_ends_meanwhile_waits_for_the_item_in_work():
    words = [sys.executable, "-c", ENDS_MEANWHILE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "")


@pytest.mark.parametrize("name", ["local", "fairscale_oss", "deepspeed"])
def test_every_backend_makes_batches_ahead(name):
    made = []

    def batches():
        for number in range(9):
            made.append(threading.current_thread().name)
            yield number, {"input_ids": torch.zeros(1)}

    placed = make_backend(name, "cpu").place_batches(batches())
    assert next(placed)[0] == 0
    deadline = time.monotonic() + 10
    while len(made) < 1 + BATCHES_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 1 + BATCHES_AHEAD
    assert set(made) == {"batches"}
    assert [number for number, _ in placed] == list(range(1, 9))


def test_training_counts_the_pads_of_its_own_steps_and_stops_reading(tmp_path):
    """Though batches of later steps have been made by then."""
    model = fresh("bart")
    rows = datasets.Dataset.from_list(ragged_rows(model, 60))
    trainer = our_trainer(model, tmp_path, rows, max_steps=3, per_device_train_batch_size=4)
    trainer.train()
    sampler = trainer.parts.loaders.train_sampler
    padded = real = 0
    for step in range(3):
        for ids in sampler.plan.rows(step).reshape(-1, 4):
            for column in ("input_ids", "labels"):
                lengths = [len(rows[int(row)][column]) for row in ids]
                real += sum(lengths)
                padded += 4 * max(lengths)
    assert trainer.parts.meter.pad_share == pytest.approx(1 - real / padded)
    waits = history(trainer, "input_wait")
    assert waits and all(0 <= wait < 1 for wait in waits)
    for thread in threading.enumerate():
        if thread.name == "batches":
            thread.join(5)
            assert not thread.is_alive()
