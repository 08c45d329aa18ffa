"""Steps by a budget of tokens: one process's numbers on any number of ranks, and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adam import assert_same_weights
from tests.support.worker import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
STEPS = 9
SAVED = 5
TOKENS = {"batching": "tokens", "tokens_per_step": 150, "groups_per_step": 2}


def figures(folder, *, ranks, config=None, resume=None, **arguments):
    """Train a T5 on 43 rows; the plan is the same whatever the ranks and the budget per device."""
    own = {"deepspeed": str(CONFIGS / f"{config}.json")} if config else {}
    job = {
        "family": "t5",
        "rows": 43,
        "evaluation_rows": 7,
        "backend": "deepspeed" if config else "local",
        "resume": None if resume is None else str(resume),
        "arguments": {
            "label_smoothing": 0.1,
            "max_steps": STEPS,
            "warmup_steps": 3,
            "max_grad_norm": 0.5,
            "optim": "adamw_torch",
            "predict_with_generate": True,
            "per_device_eval_batch_size": 2,
            "save_strategy": "steps",
            "save_steps": SAVED,
            **TOKENS,
            **arguments,
            **own,
        },
    }
    return run_ranks("tests.support.figures:work", job, ranks=ranks, folder=folder)[0]


def same(found, expected):
    assert len(expected["loss"]) == STEPS
    for name in ("loss", "nll_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert_same_weights(found["weights"], expected["weights"], steps=STEPS, grad_norm=0.5)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found["predictions"] == expected["predictions"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("one") / "job"
    result = figures(folder, ranks=1)
    assert result["world_size"] == 1
    return result, folder / "run"


@pytest.mark.parametrize(
    ("ranks", "config", "more"),
    [
        (1, None, {"max_tokens_per_device": 45}),
        (2, None, {}),
        (3, None, {"max_tokens_per_device": 40}),
        (2, None, {"num_buckets": 3}),
        (3, "zero2", {"max_tokens_per_device": 40}),
    ],
)
def test_ranks_give_the_numbers_of_one_process(tmp_path, one, ranks, config, more):
    found = figures(tmp_path / "many", ranks=ranks, config=config, **more)
    assert found["world_size"] == ranks
    if "num_buckets" not in more:  # fixed shapes make groups of their own
        same(found, one[0])
        return
    same(found, figures(tmp_path / "alone", ranks=1, **more))


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, one):
    expected, folder = one
    checkpoint = folder / f"checkpoint-{SAVED}"
    found = figures(tmp_path / "many", ranks=3, resume=checkpoint, max_tokens_per_device=60)
    same(found, expected)
