"""The benchmark of generation: its model, what it compares, and a run of a tiny one."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import generate
from benchmarks.copying_model import copying_model


@pytest.mark.parametrize("beams", [1, 4])
def test_the_model_copies_and_ends_with_its_source(beams):
    model = copying_model(width=64, layers=2, vocabulary=256)
    lengths = [3, 20, 60, 11]
    torch.manual_seed(1)
    rows = [[0, *torch.randint(6, 256, (n,)).tolist(), 2] for n in lengths]
    ids = torch.tensor([row + [1] * (62 - len(row)) for row in rows])
    mask = (ids != 1).long()
    found = model.generate(input_ids=ids, attention_mask=mask, max_length=80, num_beams=beams)
    assert [generate._text(row) for row in found.tolist()] == [row[:-1] for row in rows]


def test_rows_that_differ_are_counted():
    assert generate._differing([[1, 2], [3], []], [[1, 2], [3, 4], [5]]) == 2
    assert generate._text([2, 7, 8, 2, 1, 1]) == [7, 8]
    assert generate._text([2, 7, 8]) == [7, 8]


def test_a_quick_run_writes_table_figures_and_picture(tmp_path, capfd):
    generate.main(["--quick", "--rows", "24", "--results", str(tmp_path)])
    entries = json.loads((tmp_path / "generate-quick-greedy-beams-cpu.json").read_text())["entries"]
    assert {entry["search"] for entry in entries} == {"greedy", "4 beams"}
    assert {"transformers", "s2s-scale"} <= {entry["side"] for entry in entries}
    for entry in entries:
        assert entry["rows_that_differ"] == 0
        assert entry["rows_per_second"]["median"] > 0
        assert (entry["times_transformers"]["median"] == 1) == (entry["side"] == "transformers")
    table = (tmp_path / "generate-quick-greedy-beams-cpu.md").read_text()
    assert "0 of 48" in table and "rows that differ" in table
    assert (tmp_path / "generate-quick-greedy-beams-cpu.png").read_bytes().startswith(b"\x89PNG")
