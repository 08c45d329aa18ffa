"""Packed rows on virtual XLA devices: one shape, one compilation, the numbers of unpacked pairs."""

from __future__ import annotations

import pytest

from tests.support.families import FAMILY_NAMES
from tests.support.xla_training import run_jobs

pytest.importorskip("torch_xla", reason="torch-xla has an environment of its own: make test-xla")

STEPS = 5
# Plain gradient descent, so that the change of the weights is the gradient.
ARGUMENTS = {
    "batching": "packed",
    "tokens_per_step": 300,
    "max_steps": STEPS,
    "label_smoothing": 0.1,
    "optim": "sgd",
    "lr_scheduler": "constant",
    "learning_rate": 0.5,
    "max_grad_norm": 0.5,
}


def jobs(backend, *, unpacked=False, **more):
    """A job for each family."""
    shared = {"backend": backend, "unpacked": unpacked, "rows": 120, "weights": True}
    arguments = {**ARGUMENTS, **more}
    return {name: {**shared, "family": name, "arguments": arguments} for name in FAMILY_NAMES}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of four devices with packed rows, and of one process with a row for each pair."""
    folder = tmp_path_factory.mktemp("packed")
    packed = run_jobs(jobs("xla:data", strict_compilations=True), folder / "packed")
    return packed, run_jobs(jobs("local", unpacked=True), folder / "unpacked")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_packed_rows_give_the_numbers_of_unpacked_pairs(found, family):
    packed, unpacked = (results[family] for results in found)
    assert len(unpacked["loss"]) == STEPS and len(unpacked["weights"]) > 1000
    for name in ("loss", "grad_norm"):
        assert packed[name] == pytest.approx(unpacked[name], rel=1e-5), name
    assert packed["weights"] == pytest.approx(unpacked["weights"], rel=0, abs=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_steps_are_compiled_once(found, family):
    """One graph for the step; the first log has up to three small ones. Then nothing more.

    A graph is counted once it is compiled, which may be after the step that asked for it.
    """
    packed = found[0][family]
    assert packed["shapes"] == 1
    assert len(packed["counts"]) == STEPS
    assert packed["counts"][-1] - packed["before"] <= 1 + 3
    assert len(set(packed["counts"][1:])) == 1
