"""DeepSpeed ZeRO: what each rank holds, bad steps, saved runs, schedules, overflow in fp16."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from s2s_scale.optim import arg_to_scheduler
from tests.support.adam import assert_same_weights
from tests.support.shares import run_all

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
STEPS = 12
SHARED = {
    "zero1": {"held"},
    "zero2": {"held", "gradients"},
    "zero3": {"held", "gradients", "parameters"},
}
BAD = {"4": "nan", "6": "inf", "9": "spike"}
"""Steps whose loss is spoilt, and how; see ``Spoilt`` in the worker."""
SPOILT = {"spoilt": BAD, "spike_window": 4, "loss_spike_factor": 3.0}


def one(config, *, ranks, family="t5", resume=None, **more):
    """A run with 8 rows a step under ``config`` (None: the plain backend)."""
    names = ("replicas", "fp16_anywhere", "spoilt", "spike_window")
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
    if config is not None:
        path = config if isinstance(config, Path) else CONFIGS / f"{config}.json"
        arguments["deepspeed"] = str(path)
    backend = "local" if config is None else "deepspeed"
    return {"backend": backend, "family": family, "resume": resume, "arguments": arguments, **own}


@pytest.fixture(scope="module", params=[2, 4])
def stages(request, tmp_path_factory):
    """(ranks, folder, results): a run under each stage, saved in the middle, and a plain one.

    All have bad steps.
    """
    ranks, folder = request.param, tmp_path_factory.mktemp("zero") / "runs"
    saving = {"save_strategy": "steps", "save_steps": 6, **SPOILT}
    # The plain one first: after a run with DeepSpeed accelerate uses it for the whole process.
    runs = {"plain": one(None, ranks=ranks, replicas=False, **SPOILT)}
    for config in SHARED:
        runs[config] = one(config, ranks=ranks, replicas=config != "zero3", **saving)
    return ranks, folder, run_all(folder, runs, ranks=ranks)


@pytest.mark.parametrize("config", SHARED)
def test_each_rank_holds_its_share(stages, config):
    ranks, _, results = stages
    result = results[config]
    whole = result["whole_parameters"]
    fractions = {
        "held": max(result["held"]) / (2 * whole),  # AdamW: two moments for each number
        "gradients": max(result["gradients"]) / whole,
        "parameters": max(result["parameters"]) / whole,
    }
    shown = ", ".join(f"{name} {value:.4f}" for name, value in fractions.items())
    print(f"{config}, {ranks} ranks: at most {shown} of the whole on one rank")
    for name in SHARED[config]:
        assert 0.98 / ranks <= fractions[name] <= {2: 0.52, 4: 0.27}[ranks], (name, fractions)
    assert result["replicas_equal"] == [True] * (STEPS if config != "zero3" else 0)


@pytest.mark.parametrize("config", SHARED)
def test_bad_steps_are_left_out_as_by_the_plain_backend(stages, config):
    """One rank's loss or gradient is not finite, or all ranks' loss is a spike."""
    _, _, results = stages
    plain, found = results["plain"], results[config]
    kinds = [(step, kind) for step, kind, *_ in plain["bad_steps"]]
    assert kinds == [("4", "not finite"), ("6", "not finite"), ("9", "loss spike")]
    # 31 rows: the fourth step is an epoch's last.
    assert [len(rows.split(", ")) for *_, rows in plain["bad_steps"]] == [7, 8, 8]
    assert found["bad_steps"] == plain["bad_steps"]
    assert found["learning_rate"] == plain["learning_rate"]
    assert all(map(math.isfinite, found["weights"]))
    assert_same_weights(found["weights"], plain["weights"], steps=STEPS, grad_norm=0.5)


def test_saved_runs_go_on_as_if_they_had_not_stopped(stages, tmp_path):
    ranks, folder, results = stages
    runs = {
        config: one(
            config,
            ranks=ranks,
            resume=str(folder / config / "checkpoint-6"),
            replicas=False,
            **SPOILT,
        )
        for config in SHARED
    }
    for config, resumed in run_all(tmp_path / "resumed", runs, ranks=ranks).items():
        through = results[config]
        assert len(resumed["loss"]) == STEPS
        assert resumed["loss"] == pytest.approx(through["loss"], rel=1e-6), config
        assert_same_weights(resumed["weights"], through["weights"], steps=STEPS - 6, grad_norm=0.5)
        assert resumed["learning_rate"] == through["learning_rate"], config
        assert resumed["bad_steps"] == through["bad_steps"], config


def test_schedules_step_as_without_deepspeed(tmp_path):
    runs = {}
    # The plain ones first: after a run with DeepSpeed accelerate uses it for the whole process.
    for kind, config in (("plain", None), ("zero", "zero1")):
        for name in arg_to_scheduler:
            options = {"lr_scheduler": name, "warmup_steps": 0 if name == "constant" else 2}
            runs[f"{kind} {name}"] = one(config, ranks=1, max_steps=6, replicas=False, **options)
    assert len(runs) == 12
    results = run_all(tmp_path / "runs", runs, ranks=1)
    rates = {name: results[f"zero {name}"]["learning_rate"] for name in arg_to_scheduler}
    for name, found in rates.items():
        assert len(found) == 6
        assert found == results[f"plain {name}"]["learning_rate"], name
    assert len(set(map(tuple, rates.values()))) >= 5


def test_overflow_in_fp16_is_counted(tmp_path):
    config = json.loads((CONFIGS / "zero2.json").read_text(encoding="utf-8"))
    config["fp16"] |= {"initial_scale_power": 30, "hysteresis": 1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    wanted = one(path, ranks=2, family="bart", fp16=True, fp16_anywhere=True, max_steps=20)
    result = run_all(tmp_path / "runs", {"fp16": wanted}, ranks=2)["fp16"]
    skipped = result["overflow_steps"]
    assert 0 < skipped[-1] < 20
    assert skipped == sorted(skipped)
    # A step that was skipped leaves the schedule where it is.
    warm = [rate for rate in result["learning_rate"] if rate == 0]
    assert len(warm) == skipped[-1] + 1
