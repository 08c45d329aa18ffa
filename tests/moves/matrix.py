"""Checkpoints written by each backend and read by each, at several numbers of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.parity.matrix import CONFIGS, PROFILES
from tests.support.ranks import run_ranks

BOUND = 1e-5
SAVED_AT, STEPS, ROWS, ROWS_PER_STEP = 10, 20, 67, 12
BACKENDS = {"cpu": ("local", None), **PROFILES}
SOURCES = tuple((name, 1 if name == "cpu" else 2) for name in BACKENDS)
TARGETS = (
    *SOURCES,
    *((name, ranks) for name in ("cpu-ddp", "cpu-oss", "cpu-zero1", "cpu-zero3") for ranks in (3,)),
    *((name, 1) for name in ("cpu-oss", "cpu-zero2", "cpu-zero3")),
    ("cpu-ddp", 4),
)
"""12 rows a step on 1, 2, 3 or 4 ranks; an epoch has 6 steps, so step 10 is inside one."""

Side = tuple[str, int]


@dataclass(frozen=True)
class Move:
    """How far steps 11 to 20 are off the run that was never interrupted, relative."""

    source: Side
    target: Side
    loss: float
    grad_norm: float
    weights: float

    @property
    def good(self) -> bool:
        return max(self.loss, self.grad_norm, self.weights) <= BOUND


def moves(
    folder: Path, *, sources: Iterable[Side] = SOURCES, targets: Iterable[Side] = TARGETS
) -> Iterator[Move]:
    """Write a checkpoint under each source, go on from each under each target."""
    saved = {}
    whole = None
    for side in sources:
        output = folder / f"from-{side[0]}-{side[1]}"
        one = {"name": "whole", "output": str(output), "arguments": {"save_steps": SAVED_AT}}
        found = launch(folder / f"write-{side[0]}-{side[1]}", side, [one])["whole"]
        saved[side] = output / f"checkpoint-{SAVED_AT}"
        whole = whole or found
    assert whole is not None, "no source is given"
    for target in targets:
        runs = [
            {
                "name": f"{source[0]} {source[1]}",
                "resume": str(path),
                "arguments": {"save_strategy": "no"},
            }
            for source, path in saved.items()
        ]
        found = launch(folder / f"read-{target[0]}-{target[1]}", target, runs)
        for source in saved:
            yield compare(source, target, found[f"{source[0]} {source[1]}"], whole)


def launch(folder: Path, side: Side, runs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Do the runs one after the other under a profile; their results by name."""
    backend, config = BACKENDS[side[0]]
    folder.mkdir(parents=True)
    arguments: dict[str, Any] = {
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
    if config:
        arguments["deepspeed"] = str(CONFIGS / f"{config}.json")
    job = {"backend": backend, "rows": ROWS, "rows_per_step": ROWS_PER_STEP, "runs": runs}
    job |= {"arguments": arguments | more.pop("arguments", {}), **more}
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    worker = ["-m", "tests.support.moves_worker", str(path)]
    for rank, result in enumerate(run_ranks(worker, ranks=side[1], folder=folder, limit=600)):
        assert result.code == 0, f"{side}, rank {rank}:\n{result.output}"
    return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))


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
