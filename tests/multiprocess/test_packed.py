"""Packed rows on ranks: the numbers of one process, and in six families of unpacked pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adam import assert_same_weights
from tests.support.families import FAMILY_NAMES
from tests.support.shares import run_all

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
WAYS = ("ddp", "zero2", "zero3")
RATE = 0.5


def job(family, way):
    """Plain gradient descent, so that the change of the weights is the gradient."""
    own = {"deepspeed": str(CONFIGS / f"{way}.json")} if way.startswith("zero") else {}
    return {
        "backend": "deepspeed" if own else "local",
        "family": family,
        "unpacked": way == "unpacked",
        "logits": True,
        "replicas": way != "zero3",
        "arguments": {
            "batching": "packed",
            "tokens_per_step": 150,
            "max_tokens_per_device": 60,
            "max_steps": 3,
            "label_smoothing": 0.1,
            "optim": "sgd",
            "lr_scheduler": "constant",
            "learning_rate": RATE,
            "max_grad_norm": 0.5,
            **own,
        },
    }


STEPS, SAVED = 8, 5


def trajectory(resume=None, **more):
    """A run by AdamW that is saved on its way."""
    arguments = {
        "batching": "packed",
        "tokens_per_step": 150,
        "max_steps": STEPS,
        "label_smoothing": 0.1,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": SAVED,
        **more,
    }
    own = {"resume": None if resume is None else str(resume)}
    return {"backend": "local", "family": "bart", "arguments": arguments, **own}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, and its folder."""
    folder = tmp_path_factory.mktemp("alone") / "runs"
    return run_all(folder, {"one": trajectory()}, ranks=1)["one"], folder / "one"


@pytest.fixture(scope="module")
def three(tmp_path_factory, alone):
    """Three ranks from the beginning, and from the checkpoint of one."""
    runs = {
        "whole": trajectory(max_tokens_per_device=40),
        "resumed": trajectory(alone[1] / f"checkpoint-{SAVED}", max_tokens_per_device=75),
    }
    return run_all(tmp_path_factory.mktemp("three") / "runs", runs, ranks=3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """ "way family" -> what two ranks found. Without DeepSpeed first: it stays with a process."""
    runs = {
        f"{way} {family}": job(family, way)
        for way in ("unpacked", *WAYS)
        for family in FAMILY_NAMES
    }
    runs = {"trajectory": trajectory(), **runs}
    return run_all(tmp_path_factory.mktemp("packed") / "runs", runs, ranks=2)


@pytest.mark.parametrize("ranks", ["two", "three", "one, then three"])
def test_ranks_give_the_numbers_of_one_process(alone, three, results, ranks):
    runs = {
        "two": results["trajectory"],
        "three": three["whole"],
        "one, then three": three["resumed"],
    }
    found, expected = runs[ranks], alone[0]
    assert len(expected["loss"]) == STEPS
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert_same_weights(found["weights"], expected["weights"], steps=STEPS, grad_norm=0.5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_packed_ranks_give_the_numbers_of_unpacked_pairs(results, way, family):
    found, expected = results[f"{way} {family}"], results[f"unpacked {family}"]
    assert len(expected["loss"]) == 3 and len(expected["logits"]) > 500
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    # Three gradients, scaled to norm 0.5 at most, times the rate: the largest change is below 1.
    assert found["weights"] == pytest.approx(expected["weights"], rel=0, abs=1e-5)
    assert found["logits"] == pytest.approx(expected["logits"], rel=0, abs=1e-5)
