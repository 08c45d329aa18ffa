"""Several ranks give one process's numbers: losses, gradients, weights, texts, rows."""

from __future__ import annotations

import pytest

from s2s_scale.checkpoint import verify
from tests.support.adam import assert_same_weights
from tests.support.worker import run_ranks

STEPS = 8
ROWS_PER_STEP = 12


def figures(folder, *, family, ranks, smoothing, accumulation=1, rows=31):
    """Train on ``ranks`` ranks with the same rows in each step, whatever their number."""
    job = {
        "family": family,
        "rows": rows,
        "evaluation_rows": 11,
        "arguments": {
            "label_smoothing": smoothing,
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS_PER_STEP // (ranks * accumulation),
            "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": 2,
            "warmup_steps": 3,
            "max_grad_norm": 0.5,
            "predict_with_generate": True,
            "save_strategy": "steps",
            "save_steps": 5,
        },
    }
    return run_ranks("tests.support.figures:work", job, ranks=ranks, folder=folder)[0]


@pytest.mark.parametrize(
    ("family", "smoothing", "ranks", "accumulation"),
    [("t5", 0.0, 2, 2), ("bart", 0.1, 2, 1), ("marian", 0.0, 3, 2)],
)
def test_ranks_give_the_numbers_of_one_process(tmp_path, family, smoothing, ranks, accumulation):
    one = figures(tmp_path / "one", family=family, ranks=1, smoothing=smoothing)
    many = figures(
        tmp_path / "many",
        family=family,
        ranks=ranks,
        smoothing=smoothing,
        accumulation=accumulation,
    )
    assert (one["world_size"], many["world_size"]) == (1, ranks)
    assert len(one["loss"]) == STEPS
    for name in ("loss", "nll_loss", "grad_norm"):
        assert many[name] == pytest.approx(one[name], rel=1e-5), name
    assert_same_weights(many["weights"], one["weights"], steps=STEPS, grad_norm=0.5)
    assert many["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert many["predictions"] == one["predictions"]
    assert many["labels"] == one["labels"]
    assert len(many["labels"]) == 11
    verify(tmp_path / "many" / "run" / "checkpoint-8")
