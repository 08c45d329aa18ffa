"""Comparison of what the package computes now with the golden files."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.golden.runs import (
    CHECKPOINT_FAMILY,
    CHECKPOINTS,
    LEARNING_RATES,
    ROWS,
    SAVED_AT,
    TRAJECTORIES,
    WEIGHTS,
    XLA,
    CommandFailed,
    Trajectory,
    environment_of_figures,
    read_run,
    run_commands,
    train_words,
    write_pairs,
)

BOUND = 1e-6
"""Relative, for figures that need not be equal to the bit: under another profile than ``cpu``, on
another processor, with other versions. Measured between profiles: 2.5e-7 of losses and norms."""
WEIGHTS_BOUND = 4e-6
"""The same for weights, each tensor relative to its largest. Measured: 1.3e-6. Adam divides by the
gradients' size and its epsilon, so that the rounding errors of small gradients, such as those of
biases, count for more."""

KNOWN: dict[tuple[str, str], str] = {}
"""Cells that are known to be off, and why."""


@functools.cache
def golden() -> dict[str, Any]:
    """What ``trajectories.json`` holds."""
    return dict(json.loads(TRAJECTORIES.read_text(encoding="utf-8")))


def same_environment() -> bool:
    """Whether figures must be equal to the bit: the processor and versions of the golden files."""
    return bool(golden()["environment"] == environment_of_figures())


@dataclass(frozen=True)
class Deviation:
    """The largest relative deviation of each figure over the steps, and of the final weights."""

    figures: dict[str, float]
    weights: float
    exact: bool
    """Whether all figures and weights are equal to the bit."""

    @property
    def within(self) -> bool:
        """Whether all are within their bounds."""
        return max(self.figures.values()) <= BOUND and self.weights <= WEIGHTS_BOUND

    def __str__(self) -> str:
        if self.exact:
            return "to the bit"
        return f"{max(self.figures.values()):.0e} / {self.weights:.0e}"


def deviation(family: str, run: Trajectory, *, after: int = 0) -> Deviation:
    """How far a run is off the golden one under ``cpu``; of its figures, those after a step."""
    expected = {name: values[after:] for name, values in golden()["figures"][family]["cpu"].items()}
    found = {name: values[-len(expected[name]) :] for name, values in run.figures.items()}
    assert found.keys() == expected.keys()
    assert all(len(found[name]) == len(expected[name]) > 0 for name in found)
    weights = load_file(WEIGHTS / f"{family}.safetensors")
    assert len(weights) > 10
    # Under ZeRO 1 and 2 a tied weight is saved under each of its names.
    for name in run.weights.keys() - weights.keys():
        assert any(torch.equal(run.weights[name], run.weights[other]) for other in weights), name
    figures = {
        name: max(_relative(a, b) for a, b in zip(found[name], expected[name], strict=True))
        for name in found
    }
    exact = found == expected and all(torch.equal(run.weights[n], weights[n]) for n in weights)
    differences = [
        float((run.weights[name] - wanted).abs().max()) / _scale(wanted)
        for name, wanted in weights.items()
        # A key's bias adds the same to all scores of a query: its gradient is nothing but rounding.
        if not name.endswith("k_proj.bias")
    ]
    return Deviation(figures, max(differences), exact)


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected else abs(found)


def _scale(weight: torch.Tensor) -> float:
    """The largest entry, but at least the way that Adam can have gone: the sum of its rates."""
    return max(float(weight.abs().max()), LEARNING_RATES)


def resumed(
    moves: Iterable[tuple[str, str]], folder: Path, *, xla_python: str = sys.executable
) -> Iterator[tuple[str, str, Trajectory | CommandFailed]]:
    """(source, target, its run) for each profile that wrote a golden checkpoint and each that
    goes on from it."""
    data = write_pairs(folder / "data", rows=ROWS, seed=0)
    moves = list(moves)
    for target in dict.fromkeys(target for _, target in moves):
        sources = [source for source, other in moves if other == target]
        outputs = {source: folder / f"{source}-{target}" for source in sources}
        commands = {}
        for source in sources:
            name = f"checkpoint-{SAVED_AT}"
            own = folder / f"saved-{source}-{target}" / name
            shutil.copytree(CHECKPOINTS / source / name, own)
            commands[source] = train_words(
                CHECKPOINT_FAMILY,
                target,
                data=data,
                output=outputs[source],
                resume_from_checkpoint=own,
            )
        failure = None
        try:
            python = xla_python if target in XLA else sys.executable
            run_commands(list(commands.values()), folder / f"to-{target}", python=python)
        except CommandFailed as error:
            failure = error
        for source in sources:
            if (outputs[source] / "train_results.json").is_file():
                yield source, target, read_run(outputs[source], first_step=SAVED_AT + 1)
            else:
                assert failure is not None, f"{outputs[source]}: no results, and no error"
                yield source, target, failure
