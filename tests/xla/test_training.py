"""Training on virtual XLA devices: graphs, what each device holds, and saved runs."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors import safe_open

from s2s_scale.trainer.metrics import SETUP_COMPILATIONS
from tests.support.adam import assert_same_weights
from tests.support.families import tiny_model
from tests.support.xla_training import run_job, run_jobs

pytest.importorskip("torch_xla", reason="torch-xla has an environment of its own: make test-xla")

ARGUMENTS = {
    "batching": "tokens",
    "tokens_per_step": 500,
    "num_buckets": 3,
    "optim": "adamw_torch",
    "label_smoothing": 0.1,
}


def test_200_steps_of_random_lengths_compile_each_shape_once(tmp_path):
    """Also with evaluations and logs in between."""
    arguments = {
        **ARGUMENTS,
        "max_steps": 200,
        "eval_strategy": "steps",
        "eval_steps": 80,
        "logging_steps": 7,
        "strict_compilations": True,
    }
    job = {"backend": "xla:data", "rows": 1000, "longest": 30, "arguments": arguments}
    result = run_job(job, tmp_path)
    assert len(result["counts"]) == 200
    assert 2 <= result["shapes"] <= 3
    assert 1 <= result["evaluation_shapes"] <= 3
    shapes = result["shapes"] + result["evaluation_shapes"]
    assert result["counts"][-1] <= shapes + SETUP_COMPILATIONS
    # All shapes come in the first epoch and the first evaluation; nothing is compiled after that.
    assert result["counts"][-1] == result["counts"][90]


OPTIONS = {
    "adafactor": ({"optim": "adafactor"}, 1e-5),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, 1e-5),
    "bf16": ({"bf16": True}, 2e-2),
}
"""Settings, and how near their losses must be to those of fp32 on the CPU."""
SAVED = {
    **ARGUMENTS,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_scheduler": "linear",
    "warmup_steps": 2,
}


def jobs_of(backend: str) -> dict[str, dict[str, Any]]:
    """What is run under a backend; one process does all, since starting one takes longest."""
    nan = {**ARGUMENTS, "num_buckets": 1, "max_steps": 6, "logging_steps": 3}
    jobs = {
        "saved": {"arguments": SAVED, "evaluate": True},
        "nan": {"arguments": nan, "spoilt": {"2": "nan"}, "weights": True},
    }
    for name, (options, _) in OPTIONS.items():
        values = {**ARGUMENTS, "num_buckets": 1, "max_steps": 4, **options}
        if backend == "local":
            values.pop("bf16", None)
        jobs[name] = {"arguments": values}
    return {name: {**job, "backend": backend} for name, job in jobs.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, and every job's result under "cpu" and "xla"; "saved" goes on under the other."""
    folder = tmp_path_factory.mktemp("runs")

    def resumed(backend: str, saved_by: str) -> dict[str, Any]:
        checkpoint = folder / saved_by / "saved" / "run" / "checkpoint-3"
        return {**jobs_of(backend)["saved"], "resume": str(checkpoint)}

    results = {"cpu": run_jobs(jobs_of("local"), folder / "cpu")}
    jobs = {**jobs_of("xla:fsdp"), "resumed": resumed("xla:fsdp", "cpu")}
    results["xla"] = run_jobs(jobs, folder / "xla")
    results["cpu"]["resumed"] = run_job(resumed("local", "xla"), folder / "resumed")
    return folder, results


def test_weights_and_moments_are_divided(runs, capsys):
    held = runs[1]["xla"]["saved"]["held"]
    assert len(held["specs"]) > 50
    for name in ("weights", "moments"):
        sizes = held[name]
        with capsys.disabled():
            print(f"\n{name}: {sizes['first']} of {sizes['whole']} bytes on the first of 4 devices")
        assert sizes["first"] <= sizes["whole"] / 4 + sizes["stuck"]
    assert held["moments"]["whole"] == 2 * held["weights"]["whole"]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_give_what_they_give_on_a_cpu(runs, name):
    """bf16 is held against fp32: it must be near, and not the same."""
    found, expected = (runs[1][side][name]["loss"] for side in ("xla", "cpu"))
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=OPTIONS[name][1])
    if name == "bf16":
        assert found != pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_not_finite_is_left_out_and_reported_at_the_next_log(runs):
    cpu, xla = (runs[1][side]["nan"] for side in ("cpu", "xla"))
    assert xla["nonfinite"] == cpu["nonfinite"] == [2]
    assert xla["metrics"] == {}
    assert_same_weights(xla["weights"], cpu["weights"], steps=6)


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_the_other_backend(runs):
    cpu, xla = (runs[1][side]["saved"] for side in ("cpu", "xla"))
    assert len(cpu["loss"]) == 6
    assert xla["loss"] == pytest.approx(cpu["loss"], rel=1e-5)
    for side in ("cpu", "xla"):
        resumed = runs[1][side]["resumed"]["loss"]
        assert resumed[-3:] == pytest.approx(cpu["loss"][3:], rel=1e-5)
    loss = cpu["metrics"]["eval_loss"]
    assert xla["metrics"]["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_saved_models_are_those_of_the_other_backend(runs):
    saved = {side: runs[0] / side / "saved" / "run" for side in ("cpu", "xla")}
    with (
        safe_open(saved["cpu"] / "model.safetensors", "pt") as cpu,
        safe_open(saved["xla"] / "model.safetensors", "pt") as xla,
    ):
        names = set(cpu.keys())
        assert names == set(xla.keys()) and len(names) > 20
        for name in names:
            assert_same_weights(xla.get_tensor(name), cpu.get_tensor(name), steps=6)
    loaded = type(tiny_model("t5")).from_pretrained(saved["xla"])
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_compiled_graphs_are_kept(tmp_path, monkeypatch):
    """They are found again; the CPU's client of torch-xla 2.9 cannot read them, a TPU's can."""
    arguments = {**ARGUMENTS, "max_steps": 2}
    job = {"backend": "xla:data", "arguments": arguments}
    monkeypatch.setenv("XLA_PERSISTENT_CACHE_PATH", str(tmp_path / "graphs"))
    first = run_job(job, tmp_path / "first")
    # Without a mesh axis for weights each device holds them whole.
    assert first["held"]["weights"]["first"] == first["held"]["weights"]["whole"] > 0
    kept = {path.name for path in (tmp_path / "graphs").iterdir()}
    assert len(kept) == first["compilations"] == first["cache"]["PersistentCacheMiss"] >= 3
    again = run_job(job, tmp_path / "again")
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == kept, "other keys"
    assert again["cache"].get("PersistentCacheMiss", 0) == 0
    assert sum(again["cache"].values()) == first["compilations"]
    assert again["loss"] == first["loss"]
