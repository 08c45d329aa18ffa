"""One rank of the backend contract: every method of ``Backend``, as its docstring promises."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from s2s_scale.backends import Backend
from s2s_scale.generation.shrinking import generate
from tests.support.families import tiny_model


def work(backend: Backend, job: dict[str, Any], folder: Path) -> None:
    """Hold the backend to its contract; an assertion that fails ends the rank."""
    values = {"learning_rate": 1e-3, "output_dir": str(folder)}
    overridden = backend.training_overrides(values, trains=True)
    assert values == {"learning_rate": 1e-3, "output_dir": str(folder)}, "changed in place"
    assert overridden.items() >= values.items()
    shares(backend)
    collectives(backend)
    main_first(backend, folder)
    optimizer(backend)


def device_of(backend: Backend) -> torch.device:
    """Where a batch lies once it is placed; a plain batch stays where it is."""
    rows = torch.zeros(backend.rows_multiple, 2, dtype=torch.int64)
    return backend.place_batch({"rows": rows})["rows"].device


def shares(backend: Backend) -> None:
    assert backend.rows_multiple >= 1
    assert backend.averaged_ranks in (1, backend.collectives.world_size)
    assert isinstance(backend.static_shapes, bool)
    count, seconds = backend.compilations()
    assert count >= 0 and seconds >= 0.0


def collectives(backend: Backend) -> None:
    rank, world = backend.collectives.rank, backend.collectives.world_size
    assert int(backend.collectives.sum_counts(rank + 1, device_of(backend))) == sum(
        range(1, world + 1)
    )
    assert [backend.collectives.any_rank(rank == other) for other in range(world)] == [True] * world
    assert backend.collectives.any_rank(False) is False
    assert backend.collectives.gather_objects({"rank": rank}) == [
        {"rank": number} for number in range(world)
    ]
    value = torch.tensor([1.0, float(rank)])
    summed = backend.collectives.all_reduce_sum(value)
    assert summed.tolist() == [world, world * (world - 1) / 2]
    assert value.tolist() == [1.0, float(rank)], "total changed its argument"
    rows = torch.full((2, 1 + rank), rank)
    gathered = backend.collectives.gather_rows(rows, -1)
    assert gathered.shape == (2 * world, world)
    expected = [[n] * (1 + n) + [-1] * (world - 1 - n) for n in range(world) for _ in range(2)]
    assert gathered.tolist() == expected


def main_first(backend: Backend, folder: Path) -> None:
    """Rank 0 is slow; the others must find what it has made."""
    made = folder / "made-by-rank-0"
    with backend.collectives.main_first():
        if backend.collectives.rank == 0:
            time.sleep(0.5)
            made.write_text("x", encoding="utf-8")
        assert made.exists()
    backend.collectives.gather_objects(None)


def optimizer(backend: Backend) -> None:
    """A step with the same gradients on all ranks is a plain optimizer's step, on all ranks."""
    model, reference = tiny_model("bart"), tiny_model("bart")
    backend.place_model(model)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    built = backend.build_optimizer(torch.optim.AdamW, groups, {"lr": 1e-2})
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    assert isinstance(built, torch.optim.Optimizer)
    for one in (model, reference):
        for number, parameter in enumerate(one.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (number % 3 - 1))
    backend.after_prepare(built)
    built.step()
    plain.step()
    backend.flush()
    same_weights(model, reference)
    moved_state(backend, built, model, plain)
    dropped_updates(backend, built, model)
    same_weights(model, reference)
    weights = backend.full_weights(model)
    expected = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if backend.collectives.rank:
        assert weights == {}
    else:
        assert set(weights) == set(expected)
        for name, parameter in model.named_parameters():
            assert weights[name].dtype == torch.float32
            assert weights[name].device.type == "cpu"
            assert torch.equal(weights[name], expected[name].float())
            assert weights[name].data_ptr() != parameter.data_ptr()
    with backend.generation(model) as keywords, torch.no_grad():
        source = torch.tensor([[7, 8, 2]], device=device_of(backend))
        texts = model.generate(source, max_new_tokens=3, **keywords)
        assert texts.shape[0] == 1
        if not backend.static_shapes:  # one rank ends before the other
            options = {
                "inputs": source,
                "max_new_tokens": 3 + 4 * backend.collectives.rank,
                **keywords,
            }
            assert generate(model, **options).tolist() == model.generate(**options).tolist()


def moved_state(backend: Backend, built: Any, model: torch.nn.Module, plain: Any) -> None:
    """The state comes whole and by name on rank 0, and goes into another model and optimizer."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert backend.whole_shapes(model) == shapes
    found = [
        state._replace(
            weight=None if state.weight is None else state.weight.clone(),
            moments={k: torch.as_tensor(v).clone() for k, v in state.moments.items()},
        )
        for state in backend.state(model, built)
    ]
    assert [state.name for state in found] == list(shapes)
    if backend.collectives.rank > 0:
        assert all(state.weight is None and not state.moments for state in found)
    saved = {state.name: state for state in backend.collectives.gather_objects(found)[0]}
    expected = [plain.state[p] for group in plain.param_groups for p in group["params"]]
    for state, reference in zip(saved.values(), expected, strict=True):
        assert state.moments.keys() == {"exp_avg", "exp_avg_sq", "step"}
        for moment, value in state.moments.items():
            assert value.device.type == "cpu"
            torch.testing.assert_close(value, torch.as_tensor(reference[moment]))
    writers = backend.writers(model, built)
    assert backend.collectives.gather_objects(writers) == [writers] * backend.collectives.world_size
    assert set(writers) == set(shapes) and set(writers.values()) == set(
        range(backend.collectives.world_size)
    )
    shares = {s.name: s for s in backend.state(model, built, writers) if s.weight is not None}
    assert list(shares) == [name for name in shapes if writers[name] == backend.collectives.rank]
    for name, share in shares.items():  # to the bit what rank 0 alone gets
        assert torch.equal(share.weight, saved[name].weight), name
        assert share.moments.keys() == saved[name].moments.keys(), name
        for moment, value in share.moments.items():
            assert torch.equal(torch.as_tensor(value), saved[name].moments[moment]), name
    weights_alone = list(backend.state(model, None))
    assert all(not state.moments for state in weights_alone) and len(weights_alone) == len(saved)

    def read(name: str, *, weight: bool = True, moments: bool = True) -> Any:
        state = saved[name]
        return state._replace(
            weight=state.weight if weight else None, moments=state.moments if moments else {}
        )

    other = tiny_model("bart", seed=5)
    backend.place_model(other)
    groups = [{"params": list(other.parameters()), "weight_decay": 0.1}]
    second = backend.build_optimizer(torch.optim.AdamW, groups, {"lr": 1e-2})
    backend.after_prepare(second)
    backend.load_state(other, second, read)
    again = list(backend.state(other, second))
    if backend.collectives.rank == 0:
        for state in again:
            assert torch.equal(state.weight, saved[state.name].weight), state.name
            for moment, value in saved[state.name].moments.items():
                assert torch.equal(torch.as_tensor(state.moments[moment]), value), moment
    draws = []
    for seed in (3, 2**62, 3):
        backend.seed(seed)
        draws.append(torch.rand(4, device=device_of(backend)).cpu())
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def same_weights(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        torch.testing.assert_close(whole(ours), theirs.detach(), msg=name)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter in host memory; of a sharded one all of it. Every rank must call it."""
    return getattr(parameter.detach(), "full_tensor", parameter.detach)().cpu()


def dropped_updates(backend: Backend, built: Any, model: torch.nn.Module) -> None:
    """A step that is bad on the last rank alone changes nothing, on any rank."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    last = backend.collectives.rank == backend.collectives.world_size - 1
    bad = torch.tensor(last, device=next(model.parameters()).device)
    assert bool(backend.skip_update_where(built, bad))
    built.step()
    backend.flush()
