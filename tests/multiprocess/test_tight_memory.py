"""Saving where no rank can hold the optimizer's whole state: the address space is limited."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fresh import MIB
from s2s_scale.checkpoint import verify
from s2s_scale.checkpoint.portable import (
    OPTIMIZER,
    TRAINING_STATE,
    WEIGHTS,
    PortableCheckpoint,
    read_json,
)
from s2s_scale.checkpoint.tensors import TensorReader
from tests.parity.matrix import CONFIGS
from tests.support.families import wide_model
from tests.support.worker import run_jobs

D_FF = 4_096
"""64 MiB of weights, 128 MiB of moments, of which each of two ranks holds half."""
SLACK_MIB = 40
RUNS = [
    {"name": "oss", "backend": "fairscale_oss", "arguments": {}},
    {
        "name": "zero2",
        "backend": "deepspeed",
        "arguments": {"deepspeed": str(CONFIGS / "zero2.json")},
    },
    {
        "name": "zero3",
        "backend": "deepspeed",
        "arguments": {"deepspeed": str(CONFIGS / "zero3.json")},
    },
]


@pytest.mark.slow
def test_a_sharded_state_is_saved_by_ranks_that_could_not_hold_it(tmp_path):
    found = run_jobs(
        "tests.support.tight:work",
        {one["name"]: {**one, "d_ff": D_FF, "slack_mib": SLACK_MIB} for one in RUNS},
        ranks=2,
        folder=tmp_path,
        # Arenas of other threads would take 64 MiB of address space each, used or not; and tensors
        # of one run that are freed must not leave a hole in the heap that holds the next one's.
        environment={"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB)},
        python=sys.executable,
    )[0]
    names = dict(wide_model(64).named_parameters())
    for one in RUNS:
        sizes = found[one["name"]]
        assert sizes["moments"] / 2 > 1.5 * SLACK_MIB * MIB
        assert not sizes["collected"], "the other half of the moments fits into no rank"
        folder = tmp_path / one["name"] / "checkpoint-1"
        assert verify(folder).step == 1
        with PortableCheckpoint(folder) as saved:
            assert {name for name in names if name in saved._moments} == set(names)
        same_content(folder, tmp_path / one["name"] / "alone" / "checkpoint-1")


def same_content(shared: Path, alone: Path) -> None:
    """What two ranks have written together is to the bit what one has, in other files."""
    assert verify(alone).step == 1
    numbers = [read_json(folder / TRAINING_STATE)["optimizer"] for folder in (shared, alone)]
    assert numbers[0] == numbers[1]
    for stem in (WEIGHTS, OPTIMIZER):
        with TensorReader(shared, stem) as ours, TensorReader(alone, stem) as theirs:
            assert set(ours) == set(theirs) and len(ours) > 50
            assert ours._file_of != theirs._file_of, "they were shared out"
            for name in ours:
                found, expected = ours.get(name), theirs.get(name)
                assert found.dtype == expected.dtype and torch.equal(found, expected), name
