"""FSDP2: what each rank holds, bad steps, saved runs, mixed precision, refused settings."""

from __future__ import annotations

import math

import pytest

from s2s_scale.backends import make_backend
from s2s_scale.errors import UserError
from tests.support.shares import run_all

STEPS = 12
BAD = {"4": "nan", "6": "inf", "9": "spike"}
"""Steps whose loss is spoilt, and how; see ``Spoilt`` in the worker."""
COMMON = {
    "max_steps": STEPS,
    "warmup_steps": 4,
    "max_grad_norm": 0.5,
    "label_smoothing": 0.1,
    "loss_spike_factor": 3.0,
    "adam_epsilon": 1e-6,  # see docs/explanation/decisions.md
}


def one(backend, *, ranks, resume=None, spoilt=BAD, **more):
    """A run with 8 rows a step; ``more``: training arguments."""
    arguments = {**COMMON, "per_device_train_batch_size": 8 // ranks, **more}
    return {
        "backend": backend,
        "resume": resume,
        "arguments": arguments,
        "replicas": False,
        "spoilt": spoilt,
        "spike_window": 4,
    }


@pytest.fixture(scope="module", params=[2, 4])
def runs(request, tmp_path_factory):
    """(ranks, folder, results): a run saved in the middle, with each torch AdamW, and a plain one.

    All have bad steps. Two more have none: with activations computed again, and in bf16.
    """
    ranks, folder = request.param, tmp_path_factory.mktemp("fsdp") / "runs"
    saving = {"save_strategy": "steps", "save_steps": 6}
    wanted = {
        "plain": one("local", ranks=ranks, optim="adamw_torch"),
        "fsdp": one("torch_fsdp", ranks=ranks, optim="adamw_torch", **saving),
        "fused": one("torch_fsdp", ranks=ranks, optim="adamw_torch_fused"),
        "plain, no bad step": one("local", ranks=ranks, spoilt={}),
        "recomputed": one("torch_fsdp", ranks=ranks, spoilt={}, gradient_checkpointing=True),
        "bf16": one("torch_fsdp", ranks=ranks, spoilt={}, bf16=True),
    }
    return ranks, folder, run_all(folder, wanted, ranks=ranks)


def test_each_rank_holds_its_share(runs):
    ranks, _, results = runs
    result = results["fsdp"]
    whole = result["whole_parameters"]
    fractions = {
        "optimizer state": max(result["held"]) / (2 * whole),  # AdamW: two moments per number
        "gradients": max(result["gradients"]) / whole,
        "parameters": max(result["parameters"]) / whole,
    }
    shown = ", ".join(f"{name} {value:.4f}" for name, value in fractions.items())
    print(f"{ranks} ranks: at most {shown} of the whole on one rank")
    for name, fraction in fractions.items():
        assert 0.98 / ranks <= fraction <= {2: 0.52, 4: 0.27}[ranks], name


@pytest.mark.parametrize("name", ["fsdp", "fused"])
def test_bad_steps_are_left_out_as_by_the_plain_backend(runs, name):
    _, _, results = runs
    plain, found = results["plain"], results[name]
    kinds = [(step, kind) for step, kind, *_ in plain["bad_steps"]]
    assert kinds == [("4", "not finite"), ("6", "not finite"), ("9", "loss spike")]
    assert found["bad_steps"] == plain["bad_steps"]
    assert found["learning_rate"] == plain["learning_rate"]
    assert all(map(math.isfinite, found["weights"]))
    assert found["weights"] == pytest.approx(plain["weights"], abs=1e-5)


def test_activations_computed_again_change_nothing(runs):
    _, _, results = runs
    plain, found = results["plain, no bad step"], results["recomputed"]
    for name in ("loss", "grad_norm"):
        assert len(found[name]) == STEPS
        assert found[name] == pytest.approx(plain[name], rel=1e-5), name
    assert found["weights"] == pytest.approx(plain["weights"], abs=1e-5)


def test_bf16_computes_in_bf16_and_keeps_fp32(runs):
    _, _, results = runs
    plain, found = results["plain, no bad step"], results["bf16"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=2e-2)
    assert found["loss"] != pytest.approx(plain["loss"], rel=1e-5), "it was computed in fp32"
    # bf16 has 8 bits: of master weights in it the update of a step would change few.
    kept = [weight for weight in found["weights"] if weight]
    assert sum(math.frexp(w)[0] * 2**8 % 1 != 0 for w in kept) > 0.9 * len(kept)


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(runs, tmp_path):
    ranks, folder, results = runs
    through, checkpoint = results["fsdp"], str(folder / "fsdp" / "checkpoint-6")
    again = {"resumed": one("torch_fsdp", ranks=ranks, optim="adamw_torch", resume=checkpoint)}
    resumed = run_all(tmp_path / "resumed", again, ranks=ranks)["resumed"]
    assert len(resumed["loss"]) == STEPS
    for name in ("loss", "weights", "learning_rate", "bad_steps"):
        assert resumed[name] == through[name], name


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"adafactor": True}, "needs whole ones"),
        ({"optim": "adafactor"}, "optim=adafactor: .*needs whole ones"),
        ({"fp16": True}, "fp16=True: .*give --bf16"),
        ({"torch_compile": True}, "torch_compile=True: .*leave it out"),
        ({"fsdp": "full_shard"}, "fsdp=full_shard: .*leave it out"),
        ({"generation_engine": "ctranslate2"}, "needs the whole model on each rank"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(values, told):
    with pytest.raises(UserError, match=told):
        make_backend("torch_fsdp", "cpu").training_overrides(values, trains=True)
