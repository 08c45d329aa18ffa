"""The benchmark of training: what it counts, which rows it takes, and a run of a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train
from benchmarks.fresh import Spread
from benchmarks.peaks import training_flops
from benchmarks.train_runs import (
    DEFAULT,
    GROUPED,
    PACKED,
    ROWS_PER_BATCH,
    SIDES,
    Case,
    Recorder,
    grouped_rows,
    model_of,
)
from s2s_scale.data.collators import Seq2SeqCollator
from tests.support.lengths import long_tailed, share_of_pads_at_random

LENGTHS = long_tailed(train.ROWS, longest=512)


def case(**values):
    return Case(
        **{
            "side": PACKED,
            "bf16": False,
            "size": "quick",
            "family": "bart",
            "device": "cpu",
            "seed": 1,
            "share": 0.5,
            "steps": 4,
            "lengths": LENGTHS,
            **values,
        }
    )


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_flops_are_those_that_torch_counts(family):
    """Forward pass of rows without pads; torch counts attention made of plain products, in full."""
    model = model_of(case(family=family)).eval()
    rows, source, target = 3, 7, 5
    ids = torch.full((rows, source), 9)
    labels = torch.full((rows, target), 9)
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, labels=labels)
    lengths = (np.full(rows, source, np.int32), np.full(rows, target, np.int32))
    width, layers = model.config.d_model, 1
    causal_half = rows * layers * 2 * width * target**2
    assert counter.get_total_flops() > 0
    assert training_flops(model.config, lengths) / 3 + causal_half == counter.get_total_flops()


def test_random_batches_of_the_benchmark_hold_as_many_pads_as_it_says():
    assert 0.65 <= share_of_pads_at_random(LENGTHS) <= 0.70


def test_batches_of_length_grouping_are_spread_over_a_megabatch():
    """The same ones that transformers' sampler makes, short and long ones."""
    rows = np.array(grouped_rows(case(side=GROUPED, steps=5))).reshape(-1, ROWS_PER_BATCH)
    assert len(rows) == 6
    means = LENGTHS[0][rows].mean(axis=1)
    timed = means[1:]
    assert (np.diff(timed) < 0).all(), "a megabatch is sorted, longest first"
    assert timed.mean() == pytest.approx(LENGTHS[0].mean(), rel=0.15)
    assert len(set(rows[1:].reshape(-1).tolist())) == rows[1:].size


def test_the_recorder_counts_real_tokens_and_those_with_pads():
    recorder = Recorder(Seq2SeqCollator(0))
    recorder([{"input_ids": [5, 6, 7], "labels": [5]}, {"input_ids": [5], "labels": [5, 6]}])
    assert recorder.lengths == [[(3, 1), (1, 2)]] and recorder.padded == [2 * 3 + 2 * 2]


def test_ratios_are_those_of_runs_of_the_same_turn():
    def run(seconds):
        return {"real": 100.0, "padded": 200.0, "seconds": seconds, "flops": 1e9, "peak": 2**20}

    runs = {
        (DEFAULT, "fp32"): [run(4.0), run(8.0)],
        (GROUPED, "fp32"): [run(2.0), run(2.0)],
        (PACKED, "fp32"): [run(1.0), run(1.0)],
    }
    ours = train.summary(runs, {"fp32": 1e10})[-1]
    assert ours["times_default_fp32"] == Spread(6.0, 4.0, 8.0)
    assert ours["times_grouping"] == Spread(2.0, 2.0, 2.0)
    assert ours["pads"] == 0.5 and ours["mfu"].median == pytest.approx(0.1)


def test_a_quick_run_writes_its_table_its_picture_and_its_figures(tmp_path, capsys):
    train.main(["--quick", "--precision", "fp32", "--results", str(tmp_path)])
    assert "s2s-scale" in capsys.readouterr().out
    written = json.loads((tmp_path / "train-quick-cpu.json").read_text())
    assert [entry["trainer"] for entry in written["entries"]] == [*SIDES]
    assert all(entry["tokens_per_second"]["median"] > 0 for entry in written["entries"])
    assert written["machine"]["torch"] == torch.__version__
    assert (tmp_path / "train-quick-cpu.md").read_text().count("\n| ") == 2 + len(SIDES)
    assert (tmp_path / "train-quick-cpu.png").read_bytes().startswith(b"\x89PNG")
