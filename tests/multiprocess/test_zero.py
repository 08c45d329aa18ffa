"""DeepSpeed ZeRO: what each rank holds, saved runs that go on, schedules, overflow in fp16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2s_scale.schedules import arg_to_scheduler
from tests.support.ranks import run_ranks

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
STEPS = 12


def run(folder, *, config, ranks=2, family="t5", **more):
    """Train with 8 rows a step under ``config`` (None: the plain backend)."""
    folder.mkdir(parents=True)
    names = ("resume", "replicas", "runs", "fp16_anywhere")
    own = {name: more.pop(name) for name in names if name in more}
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8 // ranks,
        "warmup_steps": 4,
        "max_grad_norm": 0.5,
        "label_smoothing": 0.1,
        "optim": "adamw_torch",
        **more,
    }
    if isinstance(config, dict):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments["deepspeed"] = str(folder / "config.json")
    elif config is not None:
        arguments["deepspeed"] = str(CONFIGS / f"{config}.json")
    job = {"backend": "deepspeed" if config else "local", "family": family, **own}
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "arguments": arguments}), encoding="utf-8")
    worker = ["-m", "tests.support.shares_worker", str(path)]
    results = run_ranks(worker, ranks=ranks, folder=folder)
    for rank, result in enumerate(results):
        assert result.code == 0, f"rank {rank}:\n{result.output}"
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("config", "shared"),
    [
        ("zero1", {"held"}),
        ("zero2", {"held", "gradients"}),
        ("zero3", {"held", "gradients", "parameters"}),
    ],
)
def test_each_rank_holds_its_share(tmp_path, config, shared):
    result = run(tmp_path / "run", config=config, replicas=config != "zero3")
    whole = result["whole_parameters"]
    fractions = {
        "held": max(result["held"]) / (2 * whole),  # AdamW: two moments for each number
        "gradients": max(result["gradients"]) / whole,
        "parameters": max(result["parameters"]) / whole,
    }
    print(config, fractions)
    for name in shared:
        assert 0.49 <= fractions[name] <= 0.52, (name, fractions)
    assert set(result["replicas_equal"]) <= {True}


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tmp_path, config):
    saving = {"save_strategy": "steps", "save_steps": 6, "replicas": False}
    through = run(tmp_path / "through", config=config, **saving)
    checkpoint = tmp_path / "through" / "run" / "checkpoint-6"
    resumed = run(tmp_path / "resumed", config=config, resume=str(checkpoint), replicas=False)
    assert len(resumed["loss"]) == STEPS
    assert resumed["loss"] == pytest.approx(through["loss"], rel=1e-6)
    assert resumed["weights"] == pytest.approx(through["weights"], abs=1e-6)
    assert resumed["learning_rate"] == through["learning_rate"]


def test_schedules_step_as_without_deepspeed(tmp_path):
    runs = {
        name: {"lr_scheduler": name, "warmup_steps": 0 if name == "constant" else 2}
        for name in arg_to_scheduler
    }
    assert len(runs) == 6
    common = {"ranks": 1, "max_steps": 6, "runs": runs, "replicas": False}
    plain = run(tmp_path / "plain", config=None, **common)
    zero = run(tmp_path / "zero", config="zero1", **common)
    for name in runs:
        assert len(zero[name]["learning_rate"]) == 6
        assert zero[name]["learning_rate"] == plain[name]["learning_rate"], name
    assert len({tuple(result["learning_rate"]) for result in zero.values()}) >= 5


def test_overflow_in_fp16_is_counted(tmp_path):
    config = json.loads((CONFIGS / "zero2.json").read_text(encoding="utf-8"))
    config["fp16"] |= {"initial_scale_power": 30, "hysteresis": 1}
    result = run(
        tmp_path / "run", config=config, family="bart", fp16=True, fp16_anywhere=True, max_steps=20
    )
    skipped = result["overflow_steps"]
    assert 0 < skipped[-1] < 20
    assert skipped == sorted(skipped)
    # A step that was skipped leaves the schedule where it is.
    warm = [rate for rate in result["learning_rate"] if rate == 0]
    assert len(warm) == skipped[-1] + 1
