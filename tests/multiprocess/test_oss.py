"""FairScale OSS: to the bit what the unsharded optimizer does on the same ranks."""

from __future__ import annotations

import json

import pytest

from tests.support.ranks import run_ranks

STEPS = 20
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "adafactor": {"adafactor": True},
}


def run(folder, *, backend, ranks, optimizer, **more):
    folder.mkdir(parents=True)
    job = {
        "backend": backend,
        "resume": more.pop("resume", None),
        "arguments": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 8 // ranks,
            "warmup_steps": 4,
            "max_grad_norm": 0.5,
            "label_smoothing": 0.1,
            **OPTIMIZERS[optimizer],
            **more,
        },
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    results = run_ranks(
        ["-m", "tests.support.shares_worker", str(path)], ranks=ranks, folder=folder
    )
    for rank, result in enumerate(results):
        assert result.code == 0, f"rank {rank}:\n{result.output}"
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("optimizer", "ranks"), [("adamw", 2), ("adafactor", 2), ("adamw", 4)])
def test_equal_to_the_unsharded_optimizer_to_the_bit(tmp_path, optimizer, ranks):
    plain = run(tmp_path / "plain", backend="local", ranks=ranks, optimizer=optimizer)
    sharded = run(tmp_path / "oss", backend="fairscale_oss", ranks=ranks, optimizer=optimizer)
    assert len(sharded["loss"]) == STEPS
    assert max(plain["grad_norm"]) > 0.5  # so that clipping acts
    for name in ("loss", "grad_norm", "weights"):
        assert sharded[name] == plain[name], name
    assert sharded["replicas_equal"] == [True] * STEPS
    whole = plain["held"][0]
    assert sharded["largest_share"] < 0.25
    assert sum(sharded["held"]) == whole
    assert max(sharded["held"]) / whole <= {2: 0.52, 4: 0.27}[ranks]


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    common = {"backend": "fairscale_oss", "optimizer": "adamw"}
    saving = {"save_strategy": "steps", "save_steps": 10}
    through = run(tmp_path / "through", ranks=2, **common, **saving)
    resumed = run(
        tmp_path / "resumed",
        ranks=2,
        resume=str(tmp_path / "through" / "run" / "checkpoint-10"),
        **common,
    )
    assert len(resumed["loss"]) == STEPS
    assert resumed["loss"] == through["loss"]
    assert resumed["weights"] == through["weights"]
    # The saved state is the whole one, so one process can go on with it too.
    alone = run(
        tmp_path / "alone",
        backend="local",
        ranks=1,
        optimizer="adamw",
        resume=str(tmp_path / "through" / "run" / "checkpoint-10"),
    )
    assert alone["loss"] == pytest.approx(through["loss"], rel=1e-5)
    assert alone["weights"] == pytest.approx(through["weights"], abs=1e-5)
