"""A part of the move matrix (``python -m tests.moves`` runs all), and the ledger of rows."""

from __future__ import annotations

import pytest

from tests.moves.matrix import BOUND, ROWS, ROWS_PER_STEP, launch, moves

SOURCES = [("cpu", 1), ("cpu-oss", 2), ("cpu-fsdp", 2), ("cpu-zero3", 2)]
TARGETS = [
    ("cpu", 1),
    ("cpu-zero2", 1),
    ("cpu-ddp", 2),
    ("cpu-oss", 2),
    ("cpu-fsdp", 2),
    ("cpu-zero1", 2),
    ("cpu-zero3", 2),
    ("cpu-oss", 3),
    ("cpu-fsdp", 3),
    ("cpu-zero2", 3),
    ("cpu-zero3", 3),
]


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_other_backends(tmp_path):
    found = list(moves(tmp_path, sources=SOURCES, targets=TARGETS))
    assert len(found) == 44
    assert [move for move in found if move.worst > BOUND] == []


LEGS = ((1, 7), (2, 11), (4, 16), (1, None))
"""Ranks, and the step after which the leg is interrupted; it is saved every third step."""
EPOCHS, STEPS_PER_EPOCH = 3, -(-ROWS // ROWS_PER_STEP)
MODES = {
    "sortish": {},
    "fixed": {"batching": "fixed"},
    "tokens": {"batching": "tokens", "tokens_per_step": 150, "groups_per_step": 2},
    "packed": {"batching": "packed", "tokens_per_step": 150},
}
"""Batching -> arguments under which an epoch has as many steps."""


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory):
    """Results by name: "mode leg number", and "mode whole" of a run that is never interrupted."""
    folder, resume, results = tmp_path_factory.mktemp("ledgers"), dict.fromkeys(MODES), {}
    for number, (ranks, stop_at) in enumerate(LEGS):
        runs = [
            {
                "name": f"{mode} leg {number}",
                "backend": "local",
                "output": str(folder / mode),
                "resume": resume[mode],
                "stop_at": stop_at,
                "arguments": {**arguments, "save_steps": 3},
            }
            for mode, arguments in MODES.items()
        ]
        if number == len(LEGS) - 1:
            runs += [
                {
                    "name": f"{mode} whole",
                    "backend": "local",
                    "output": str(folder / f"{mode}-whole"),
                    "arguments": {**arguments, "save_steps": 100},
                }
                for mode, arguments in MODES.items()
            ]
        steps = EPOCHS * STEPS_PER_EPOCH
        results |= launch(folder / f"leg-{number}", ranks, runs, max_steps=steps)
        last = (stop_at or 0) // 3 * 3
        resume = {mode: str(folder / mode / f"checkpoint-{last}") for mode in MODES}
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_each_row_comes_once_an_epoch_over_1_2_4_1_ranks_with_three_interruptions(ledgers, mode):
    done, losses, redone = {}, {}, 0
    for number in range(len(LEGS)):
        found = ledgers[f"{mode} leg {number}"]
        for step, rows in found["ledger"].items():
            if step in done:
                redone += 1
                assert rows == done[step], "a step that is made again has the same rows"
            done[step] = rows
        losses |= found["losses"]
    assert redone == 1 + 2 + 1, "steps 7, 10, 11 and 16 were lost and made again"
    steps = range(1, EPOCHS * STEPS_PER_EPOCH + 1)
    assert sorted(map(int, done)) == list(steps)
    for epoch in range(EPOCHS):
        of_epoch = steps[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        rows = [row for step in of_epoch for row in done[str(step)]]
        assert sorted(rows) == list(range(ROWS)), f"epoch {epoch}"
    whole = ledgers[f"{mode} whole"]
    assert whole["ledger"] == done
    assert losses == pytest.approx(whole["losses"], rel=1e-5)
