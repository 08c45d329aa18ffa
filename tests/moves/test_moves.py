"""A part of the move matrix (``python -m tests.moves`` runs all), and the ledger of rows."""

from __future__ import annotations

import pytest

from tests.moves.matrix import ROWS, ROWS_PER_STEP, launch, moves

PARTS = {
    "shared out": [("cpu-oss", 2), ("cpu-zero3", 2)],
    "whole": [("cpu", 1), ("cpu-ddp", 3)],
    "in parts": [("cpu-zero1", 2), ("cpu-zero2", 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_goes_on_under_other_backends(tmp_path, part):
    sources = [("cpu", 1), ("cpu-oss", 2), ("cpu-zero3", 2)]
    found = list(moves(tmp_path, sources=sources, targets=PARTS[part]))
    assert len(found) == 6
    for move in found:
        assert move.good, move


LEGS = (("cpu", 1, 7), ("cpu-ddp", 2, 11), ("cpu-ddp", 4, 16), ("cpu", 1, None))
"""Profile, ranks, and the step before which the leg is interrupted; saved every third step."""


@pytest.mark.slow
def test_each_row_comes_once_an_epoch_over_1_2_4_1_ranks_with_three_interruptions(tmp_path):
    epochs, steps = 3, -(-ROWS // ROWS_PER_STEP)
    output, done, losses = tmp_path / "run", {}, {}
    resume, redone = None, 0
    for number, (profile, ranks, stop_at) in enumerate(LEGS):
        one = {
            "name": "leg",
            "output": str(output),
            "resume": resume,
            "stop_at": stop_at,
            "arguments": {"save_steps": 3},
        }
        values = {"arguments": {"max_steps": epochs * steps}}
        found = launch(tmp_path / f"leg-{number}", (profile, ranks), [one], **values)["leg"]
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
    one = {"name": "whole", "output": str(tmp_path / "whole"), "arguments": {"save_steps": 100}}
    whole = launch(tmp_path / "one", ("cpu", 1), [one], **values)["whole"]
    assert whole["ledger"] == done
    assert losses == pytest.approx(whole["losses"], rel=1e-5)
