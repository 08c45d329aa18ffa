"""What backend xla is made of that needs no XLA device: mesh, AdamW, processes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from s2s_scale.backends import make_backend
from s2s_scale.backends.xla.adamw import GraphAdamW
from s2s_scale.backends.xla.sharding import divided_dimension, mesh_lengths, rows_dimension
from s2s_scale.errors import UserError
from s2s_scale.trainer.metrics import CompilationWatch, RecompilationError, batch_shape
from tests.support.adam import assert_same_weights


@pytest.mark.parametrize(
    ("wanted", "devices", "lengths"),
    [
        ({"data": -1}, 8, (8, 1)),
        ({"fsdp": -1}, 8, (1, 8)),
        ({"data": 2, "fsdp": -1}, 8, (2, 4)),
        ({"data": 4, "fsdp": 2}, 8, (4, 2)),
        ({"data": -1}, 1, (1, 1)),
    ],
)
def test_mesh_lengths(wanted, devices, lengths):
    assert mesh_lengths(wanted, devices) == lengths


@pytest.mark.parametrize(
    ("wanted", "devices"),
    [
        ({"data": 3}, 8),
        ({"data": -1, "fsdp": -1}, 4),
        ({"rows": -1}, 4),
        ({"data": 3, "fsdp": -1}, 8),
    ],
)
def test_a_mesh_that_does_not_fit(wanted, devices):
    with pytest.raises(UserError, match=f"for {devices} devices: expected the axes data and fsdp"):
        mesh_lengths(wanted, devices)


def test_the_longest_dimension_that_divides_is_divided():
    assert divided_dimension((96, 16), 4) == 0
    assert divided_dimension((16, 96), 4) == 1
    assert divided_dimension((97, 16), 4) == 1
    assert divided_dimension((97, 3), 4) is None
    assert divided_dimension((2,), 4) is None
    assert divided_dimension((), 4) is None
    assert divided_dimension((96, 16), 1) is None


def test_hidden_states_are_divided_by_rows_whatever_their_order():
    assert rows_dimension((8, 20, 16), 8) == 0
    assert rows_dimension((20, 8, 16), 8) == 1
    assert rows_dimension((8, 8, 16), 8) == 0
    assert rows_dimension((1, 8, 16), None) == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay):
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    betas, epsilon = (0.9, 0.98), 1e-6
    options = {"weight_decay": weight_decay, "betas": betas, "eps": epsilon}
    made = [GraphAdamW(ours, lr=1e-2, **options), torch.optim.AdamW(theirs, lr=1e-2, **options)]
    for step in range(20):
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (step % 7)  # 0 at the first step, as in a warm-up
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in made:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        same_gradients = {"grad_norm": 0.0, "epsilon": epsilon, "betas": betas}
        assert_same_weights(one, other, steps=20, learning_rate=6e-2, **same_gradients)
    saved, expected = (optimizer.state_dict()["state"][0] for optimizer in made)
    assert set(saved) == set(expected)
    assert float(saved["step"]) == float(expected["step"]) == 20


def test_a_share_of_the_rows_is_a_hosts(monkeypatch):
    runtime = SimpleNamespace(
        process_index=lambda: 1,
        process_count=lambda: 2,
        addressable_runtime_device_count=lambda: 4,
    )
    package = SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "torch_xla", package)
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    backend = make_backend("xla", "tpu", {"data": -1})
    share = (backend.collectives.rank, backend.collectives.world_size, backend.rows_multiple)
    assert share == (1, 2, 4)
    assert backend.static_shapes and backend.averaged_ranks == 1


def test_settings_that_would_do_nothing_on_xla_devices_are_refused():
    backend = make_backend("xla", "cpu", {"data": -1})
    values = {"fp16": True, "torch_compile": True, "optim": "adamw_torch_fused", "bf16": True}
    with pytest.raises(UserError) as caught:
        backend.training_overrides(values, trains=True)
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "fp16",
        "torch_compile",
        "optim",
    ]
    found = backend.training_overrides({"bf16": True, "use_cpu": True}, trains=True)
    assert found["optim"] == "adamw_torch" and "bf16" not in found and "use_cpu" not in found


class Counted:
    """A backend that has compiled ``count`` graphs."""

    count = 0

    def compilations(self):
        return self.count, 0.0


def test_a_compilation_after_warm_up_is_reported_with_its_shape(caplog):
    backend = Counted()
    watch = CompilationWatch(backend.compilations, limit=None, strict=False)
    for step in range(1, 6):
        backend.count = 1
        watch.ran("training", (8, 16, 24), step=step)
    assert not caplog.records
    backend.count = 2
    watch.skip()  # a log
    watch.ran("training", (8, 16, 24), step=6)
    assert not caplog.records
    backend.count = 3
    watch.ran("training", (8, 16, 24), step=7)
    (record,) = caplog.records
    assert "step 7: training on rows x source x target = 8 x 16 x 24 was compiled" in record.message
    assert "used 6 times" in record.message
    assert watch.shapes("training") == [(8, 16, 24)]


def test_strict_stops_at_the_limit():
    backend = Counted()
    watch = CompilationWatch(backend.compilations, limit=1, strict=True)
    backend.count = 1
    watch.ran("training", (8, 16, 24), step=1)
    backend.count = 2
    with pytest.raises(RecompilationError, match="at most 1 .--max_compilations.; keep shapes few"):
        watch.ran("training", (8, 32, 24), step=2)


def test_shape_of_a_batch():
    batch = {"input_ids": torch.ones(3, 5), "labels": torch.ones(3, 7), "attention_mask": None}
    assert batch_shape(batch) == (3, 5, 7)
    assert batch_shape({"input_ids": torch.ones(3, 5)}) == (3, 5)
    assert batch_shape({}) == ()
