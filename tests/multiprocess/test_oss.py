"""FairScale OSS: to the bit what the unsharded optimizer does on the same ranks."""

from __future__ import annotations

import pytest

from tests.support.adam import assert_same_weights
from tests.support.shares import run_all

STEPS = 20
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "adafactor": {"adafactor": True},
}


def one(backend, optimizer, *, ranks, resume=None, **more):
    """A run with 8 rows a step, whatever the number of ranks."""
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8 // ranks,
        "warmup_steps": 4,
        "max_grad_norm": 0.5,
        "label_smoothing": 0.1,
        **OPTIMIZERS[optimizer],
        **more,
    }
    return {"backend": backend, "resume": resume, "arguments": arguments}


@pytest.fixture(scope="module", params=[2, 4])
def both(request, tmp_path_factory):
    """(ranks, folder, results): each optimizer plain and sharded; the sharded AdamW saves too."""
    ranks, folder = request.param, tmp_path_factory.mktemp("oss") / "runs"
    runs = {}
    for optimizer in OPTIMIZERS:
        saving = {"save_strategy": "steps", "save_steps": 10} if optimizer == "adamw" else {}
        runs[f"plain {optimizer}"] = one("local", optimizer, ranks=ranks)
        runs[f"oss {optimizer}"] = one("fairscale_oss", optimizer, ranks=ranks, **saving)
    return ranks, folder, run_all(folder, runs, ranks=ranks)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equal_to_the_unsharded_optimizer_to_the_bit(both, optimizer):
    ranks, _, results = both
    plain, sharded = results[f"plain {optimizer}"], results[f"oss {optimizer}"]
    assert len(sharded["loss"]) == STEPS
    assert max(plain["grad_norm"]) > 0.5  # so that clipping acts
    for name in ("loss", "grad_norm", "weights"):
        assert sharded[name] == plain[name], name
    assert sharded["replicas_equal"] == [True] * STEPS
    whole = plain["held"][0]
    assert sharded["largest_share"] < 0.25
    assert sum(sharded["held"]) == whole
    fraction = max(sharded["held"]) / whole
    print(f"{optimizer}, {ranks} ranks: at most {fraction:.4f} of the optimizer state on one rank")
    assert fraction <= {2: 0.52, 4: 0.27}[ranks]


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(both, tmp_path):
    ranks, folder, results = both
    through, checkpoint = results["oss adamw"], str(folder / "oss adamw" / "checkpoint-10")
    again = {"resumed": one("fairscale_oss", "adamw", ranks=ranks, resume=checkpoint)}
    resumed = run_all(tmp_path / "resumed", again, ranks=ranks)["resumed"]
    assert len(resumed["loss"]) == STEPS
    assert resumed["loss"] == through["loss"]
    assert resumed["weights"] == through["weights"]
    # The saved state is the whole one, so one process can go on with it too.
    again = {"alone": one("local", "adamw", ranks=1, resume=checkpoint)}
    alone = run_all(tmp_path / "alone", again, ranks=1)["alone"]
    assert alone["loss"] == pytest.approx(through["loss"], rel=1e-5)
    assert_same_weights(alone["weights"], through["weights"], steps=STEPS - 10, grad_norm=0.5)
