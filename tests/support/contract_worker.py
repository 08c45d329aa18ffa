"""One rank of the backend contract: every method of ``Backend``, as its docstring promises.

Usage: python -m tests.support.contract_worker BACKEND FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from s2s_scale.backends import Backend, make_backend
from tests.support.families import tiny_model


def main(name: str, folder: Path) -> None:
    """Hold the backend called ``name`` to its contract; an assertion that fails ends the rank."""
    backend = make_backend(name)
    assert list(backend.problems()) == []
    values = {"learning_rate": 1e-3, "output_dir": str(folder)}
    backend.prepare_process()
    try:
        overridden = backend.training_overrides(values, trains=True)
        assert values == {"learning_rate": 1e-3, "output_dir": str(folder)}, "changed in place"
        assert overridden.items() >= values.items()
        collectives(backend)
        main_first(backend, folder)
        optimizer(backend)
    finally:
        backend.close()


def collectives(backend: Backend) -> None:
    rank, world = backend.data_rank, backend.data_world_size
    assert backend.gather_objects({"rank": rank}) == [{"rank": number} for number in range(world)]
    value = torch.tensor([1.0, float(rank)])
    summed = backend.total(value)
    assert summed.tolist() == [world, world * (world - 1) / 2]
    assert value.tolist() == [1.0, float(rank)], "total changed its argument"
    rows = torch.full((2, 1 + rank), rank)
    gathered = backend.gather_rows(rows, -1)
    assert gathered.shape == (2 * world, world)
    expected = [[n] * (1 + n) + [-1] * (world - 1 - n) for n in range(world) for _ in range(2)]
    assert gathered.tolist() == expected


def main_first(backend: Backend, folder: Path) -> None:
    """Rank 0 is slow; the others must find what it has made."""
    made = folder / "made-by-rank-0"
    with backend.main_first():
        if backend.data_rank == 0:
            time.sleep(0.5)
            made.write_text("x", encoding="utf-8")
        assert made.exists()
    backend.gather_objects(None)


def optimizer(backend: Backend) -> None:
    """A step with the same gradients on all ranks is a plain optimizer's step, on all ranks."""
    model, reference = tiny_model("bart"), tiny_model("bart")
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
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)
    with backend.whole_state(built):
        if backend.data_rank == 0:
            state = built.state_dict()["state"]
            assert len(state) == len(list(model.parameters()))
            assert {"exp_avg", "exp_avg_sq", "step"} <= set(state[0])
    weights = backend.full_weights(model)
    if backend.data_rank:
        assert weights == {}
    else:
        assert set(weights) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert weights[name].dtype == torch.float32
            assert torch.equal(weights[name], parameter.detach().float())
            assert weights[name].data_ptr() != parameter.data_ptr()
    with backend.generation(model) as keywords, torch.no_grad():
        texts = model.generate(torch.tensor([[7, 8, 2]]), max_new_tokens=3, **keywords)
    assert texts.shape[0] == 1


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
