"""A part of the move matrix (``python -m tests.moves`` runs all), and the ledger of rows."""

from __future__ import annotations

import pytest

from tests.moves.matrix import BOUND, ROWS, ROWS_PER_STEP, launch, moves

SOURCES = [("cpu", 1), ("cpu-oss", 2), ("cpu-zero3", 2)]
TARGETS = [
    ("cpu", 1),
    ("cpu-zero2", 1),
    ("cpu-ddp", 2),
    ("cpu-oss", 2),
    ("cpu-zero1", 2),
    ("cpu-zero3", 2),
    ("cpu-oss", 3),
    ("cpu-zero2", 3),
]


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_other_backends(tmp_path):
    found = list(moves(tmp_path, sources=SOURCES, targets=TARGETS))
    assert len(found) == 24
    assert [move for move in found if move.worst > BOUND] == []


LEGS = ((1, 7), (2, 11), (4, 16), (1, None))
"""Ranks, and the step after which the leg is interrupted; it is saved every third step."""


@pytest.mark.slow
def test_each_row_comes_once_an_epoch_over_1_2_4_1_ranks_with_three_interruptions(tmp_path):
    epochs, steps = 3, -(-ROWS // ROWS_PER_STEP)
    output, done, losses = tmp_path / "run", {}, {}
    resume, redone = None, 0
    for number, (ranks, stop_at) in enumerate(LEGS):
        leg = {
            "name": "leg",
            "backend": "local",
            "output": str(output),
            "resume": resume,
            "stop_at": stop_at,
            "arguments": {"save_steps": 3},
        }
        steps_in_all = epochs * steps
        found = launch(tmp_path / f"leg-{number}", ranks, [leg], max_steps=steps_in_all)["leg"]
        for step, rows in found["ledger"].items():
            if step in done:
                redone += 1
                assert rows == done[step], "a step that is made again has the same rows"
            done[step] = rows
        losses |= found["losses"]
        last = (stop_at or 0) // 3 * 3
        resume = str(output / f"checkpoint-{last}")
    assert redone == 1 + 2 + 1, "steps 7, 10, 11 and 16 were lost and made again"
    assert [int(step) for step in sorted(done, key=int)] == list(range(1, epochs * steps + 1))
    for epoch in range(epochs):
        rows = [r for s in range(epoch * steps, (epoch + 1) * steps) for r in done[str(s + 1)]]
        assert sorted(rows) == list(range(ROWS)), f"epoch {epoch}"
    one = {
        "name": "whole",
        "backend": "local",
        "output": str(tmp_path / "whole"),
        "arguments": {"save_steps": 100},
    }
    whole = launch(tmp_path / "one", 1, [one], max_steps=epochs * steps)["whole"]
    assert whole["ledger"] == done
    assert losses == pytest.approx(whole["losses"], rel=1e-5)
