"""Checkpoints written by each backend and read by each, at several numbers of ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2s_scale.settings.profiles import resolve
from tests.parity.matrix import CONFIGS, MESHES
from tests.support.worker import run_jobs

BOUND = 1e-5
SAVED_AT, STEPS, ROWS, ROWS_PER_STEP = 10, 20, 67, 12
"""12 rows a step on 1, 2, 3 or 4 ranks; an epoch has 6 steps, so step 10 is inside one."""
BACKENDS: dict[str, tuple[str, str | None]] = {
    "cpu": ("local", None),
    "cpu-ddp": ("local", None),
    "cpu-oss": ("fairscale_oss", None),
    "cpu-fsdp": ("torch_fsdp", None),
    "cpu-zero1": ("deepspeed", "zero1"),
    "cpu-zero2": ("deepspeed", "zero2"),
    "cpu-zero3": ("deepspeed", "zero3"),
}
SHARED_OUT = ("cpu-ddp", "cpu-oss", "cpu-fsdp", "cpu-zero1", "cpu-zero2", "cpu-zero3")
SOURCES = (("cpu", 1), *((name, 2) for name in SHARED_OUT))
TARGETS = (*SOURCES, *((name, ranks) for ranks in (3, 4) for name in SHARED_OUT))

XLA_SOURCES = tuple((name, 4) for name in MESHES)
XLA_TARGETS = (*XLA_SOURCES, *((name, devices) for devices in (1, 2, 3) for name in MESHES))

Side = tuple[str, int]
"""Profile and number of ranks; of devices, for those on XLA."""


@dataclass(frozen=True)
class Move:
    """How far steps 11 to 20 are off the run that was never interrupted, relative."""

    source: Side
    target: Side
    loss: float
    grad_norm: float
    weights: float

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.loss, self.grad_norm, self.weights)


def moves(
    folder: Path,
    *,
    sources: Iterable[Side] = SOURCES,
    targets: Iterable[Side] = TARGETS,
    xla_python: str = sys.executable,
) -> Iterator[Move]:
    """Write a checkpoint under each source, go on from each under each target.

    Everything at one number of ranks is done by the same processes, one run after the other.
    ``xla_python``: an interpreter that has torch-xla, which wants a torch of its own.
    """
    saved, whole = {}, None
    for (axis, ranks), sides in _together(sources).items():
        runs = [
            _run(side, str(side), {"save_steps": SAVED_AT}, output=_output(folder, side))
            for side in sides
        ]
        place = folder / f"write-{axis}{ranks}"
        found = launch(place, ranks, runs, xla_python=xla_python if axis else None)
        whole = whole or found[str(sides[0])]
        saved |= {side: f"{_output(folder, side)}/checkpoint-{SAVED_AT}" for side in sides}
    assert whole is not None, "no source is given"
    for (axis, ranks), sides in _together(targets).items():
        pairs = [(source, target) for target in sides for source in saved]
        no_saving = {"save_strategy": "no"}
        runs = [_run(t, f"{s} {t}", no_saving, resume=saved[s]) for s, t in pairs]
        place = folder / f"read-{axis}{ranks}"
        found = launch(place, ranks, runs, xla_python=xla_python if axis else None)
        for source, target in pairs:
            yield compare(source, target, found[f"{source} {target}"], whole)


def _together(sides: Iterable[Side]) -> dict[tuple[str, int], list[Side]]:
    """The sides that the same processes can do: by mesh axis ("" without XLA) and ranks."""
    found: dict[tuple[str, int], list[Side]] = {}
    for side in sides:
        found.setdefault((MESHES.get(side[0], ""), side[1]), []).append(side)
    return found


def _output(folder: Path, side: Side) -> str:
    return str(folder / f"from-{side[0]}-{side[1]}")


def _run(side: Side, name: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    if side[0] in MESHES:
        backend, config = f"xla:{MESHES[side[0]]}", None
        arguments = {**arguments, "num_buckets": 1}
    else:
        backend, config = BACKENDS[side[0]]
    if config:
        arguments = {**arguments, "deepspeed": str(CONFIGS / f"{config}.json")}
    return {"name": name, "backend": backend, "arguments": arguments, **more}


def launch(
    folder: Path,
    ranks: int,
    runs: list[dict[str, Any]],
    *,
    xla_python: str | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Do the runs one after the other on so many ranks; their results by name.

    With ``xla_python`` in one process, on so many virtual devices.
    """
    common = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "lr_scheduler": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "label_smoothing": 0.1,
        "batching": "sortish",
        "optim": "adamw_torch",
    }
    jobs = {
        one["name"]: {
            **one,
            "rows": ROWS,
            "rows_per_step": ROWS_PER_STEP,
            "arguments": {**common, **arguments, **one["arguments"]},
        }
        for one in runs
    }
    environment = {**resolve("cpu-xla").environment, "CPU_NUM_DEVICES": str(ranks)}
    return run_jobs(
        "tests.support.moves:work",
        jobs,
        ranks=1 if xla_python else ranks,
        folder=folder,
        limit=2400,
        environment=environment if xla_python else None,
        python=xla_python,
    )[0]


def compare(source: Side, target: Side, found: dict[str, Any], whole: dict[str, Any]) -> Move:
    """The largest relative deviation of each figure after the checkpoint."""
    after = [str(step) for step in range(SAVED_AT + 1, STEPS + 1)]
    assert list(found["ledger"]) == after, "it went on after the saved step and not before"
    off = {
        name: max(abs(found[name][s] - whole[name][s]) / abs(whole[name][s]) for s in after)
        for name in ("losses", "grad_norms")
    }
    ours, theirs = (torch.load(one["weights"], weights_only=True) for one in (found, whole))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    differences = [float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs]
    return Move(source, target, off["losses"], off["grad_norms"], max(differences))
