"""Rows to copy that every family learns in 300 steps of a tiny model.

A row is three to five letters, and each place has letters of its own, so that a model needs no
notion of absolute position (T5 has none, and mBART's positions start weak).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

PLACES = ("abcdef", "ghijkl", "mnopqr", "stuvwx", "yzABCD")
SHORTEST = 3


def copy_rows(count: int, *, seed: int = 0) -> list[str]:
    """``count`` different rows of letters between spaces."""
    chance = random.Random(seed)
    rows: dict[str, None] = {}
    while len(rows) < count:
        places = PLACES[: chance.randint(SHORTEST, len(PLACES))]
        rows[" ".join(map(chance.choice, places))] = None
    return list(rows)


def write_copy_task(folder: Path, splits: Mapping[str, int], *, seed: int = 0) -> Path:
    """A --data_dir whose targets repeat their sources; no row is in two splits, or twice in one."""
    rows = iter(copy_rows(sum(splits.values()), seed=seed))
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        text = "".join(f"{next(rows)}\n" for _ in range(count))
        for side in ("source", "target"):
            (folder / f"{split}.{side}").write_text(text, encoding="utf-8")
    return folder
