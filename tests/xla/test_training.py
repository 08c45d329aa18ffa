"""Training on virtual XLA devices: graphs, what each device holds, and saved runs."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from s2s_scale.trainer.compilations import SETUP_COMPILATIONS
from tests.support.families import tiny_model
from tests.support.xla_worker import run_job

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


def test_weights_and_moments_are_divided(tmp_path, capsys):
    arguments = {**ARGUMENTS, "max_steps": 2}
    held = run_job({"backend": "xla:fsdp", "arguments": arguments}, tmp_path)["held"]
    assert len(held["specs"]) > 50
    for name in ("weights", "moments"):
        sizes = held[name]
        with capsys.disabled():
            print(f"\n{name}: {sizes['first']} of {sizes['whole']} bytes on the first of 4 devices")
        assert sizes["first"] <= sizes["whole"] / 4 + sizes["stuck"]
    assert held["moments"]["whole"] == 2 * held["weights"]["whole"]


def test_without_a_mesh_axis_for_them_weights_are_whole(tmp_path):
    arguments = {**ARGUMENTS, "max_steps": 1}
    held = run_job({"backend": "xla:data", "arguments": arguments}, tmp_path)["held"]
    assert held["weights"]["first"] == held["weights"]["whole"] > 0


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"optim": "adafactor"}, 1e-5),
        ({"gradient_checkpointing": True}, 1e-5),
        ({"bf16": True}, 2e-2),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_give_what_they_give_on_a_cpu(tmp_path, options, bound):
    """bf16 is held against fp32: it must be near, and not the same."""
    arguments = {**ARGUMENTS, "num_buckets": 1, "max_steps": 4, **options}
    found = run_job({"backend": "xla:fsdp", "arguments": arguments}, tmp_path / "xla")["loss"]
    exact = {name: value for name, value in arguments.items() if name != "bf16"}
    expected = run_job({"backend": "local", "arguments": exact}, tmp_path / "cpu")["loss"]
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=bound)
    if "bf16" in options:
        assert found != pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_not_finite_is_left_out_and_reported_at_the_next_log(tmp_path):
    arguments = {**ARGUMENTS, "num_buckets": 1, "max_steps": 6, "logging_steps": 3}
    job = {"arguments": arguments, "nan_at_step": 2}
    results = {
        name: run_job({**job, "backend": backend}, tmp_path / name)
        for name, backend in (("xla", "xla:data"), ("cpu", "local"))
    }
    assert results["xla"]["nonfinite"] == results["cpu"]["nonfinite"] == [2]
    assert results["xla"]["metrics"] == {}
    assert results["xla"]["final"] == pytest.approx(results["cpu"]["final"], rel=1e-5)


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory):
    """Six steps under each backend, saved after three, and each one's rest under the other."""
    folder = tmp_path_factory.mktemp("saved")
    arguments = {
        **ARGUMENTS,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler": "linear",
        "warmup_steps": 2,
    }
    jobs = {
        name: {"backend": backend, "arguments": arguments, "evaluate": True}
        for name, backend in (("cpu", "local"), ("xla", "xla:fsdp"))
    }
    results = {name: run_job(job, folder / name) for name, job in jobs.items()}
    for name, other in (("cpu", "xla"), ("xla", "cpu")):
        resumed = {**jobs[name], "resume": str(folder / other / "run" / "checkpoint-3")}
        results[f"{other} -> {name}"] = run_job(resumed, folder / f"{other}-{name}")
    return folder, results


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_the_other_backend(saved_runs):
    _, results = saved_runs
    expected = results["cpu"]["loss"]
    assert len(expected) == 6
    assert results["xla"]["loss"] == pytest.approx(expected, rel=1e-5)
    for way in ("xla -> cpu", "cpu -> xla"):
        assert results[way]["loss"][-3:] == pytest.approx(expected[3:], rel=1e-5)
    loss = results["cpu"]["metrics"]["eval_loss"]
    assert results["xla"]["metrics"]["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_saved_models_are_those_of_the_other_backend(saved_runs):
    folder, _ = saved_runs
    with (
        safe_open(folder / "cpu" / "run" / "model.safetensors", "pt") as cpu,
        safe_open(folder / "xla" / "run" / "model.safetensors", "pt") as xla,
    ):
        names = set(cpu.keys())
        assert names == set(xla.keys()) and len(names) > 20
        for name in names:
            torch.testing.assert_close(
                cpu.get_tensor(name), xla.get_tensor(name), atol=1e-5, rtol=0
            )
    loaded = type(tiny_model("t5")).from_pretrained(folder / "xla" / "run")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_compiled_graphs_are_kept(tmp_path, monkeypatch):
    """They are found again; the CPU's client of torch-xla 2.9 cannot read them, a TPU's can."""
    arguments = {**ARGUMENTS, "max_steps": 2}
    job = {"backend": "xla:data", "arguments": arguments}
    monkeypatch.setenv("XLA_PERSISTENT_CACHE_PATH", str(tmp_path / "graphs"))
    first = run_job(job, tmp_path / "first")
    kept = {path.name for path in (tmp_path / "graphs").iterdir()}
    assert len(kept) == first["compilations"] == first["cache"]["PersistentCacheMiss"] >= 3
    again = run_job(job, tmp_path / "again")
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == kept, "other keys"
    assert again["cache"].get("PersistentCacheMiss", 0) == 0
    assert sum(again["cache"].values()) == first["compilations"]
    assert again["loss"] == first["loss"]
