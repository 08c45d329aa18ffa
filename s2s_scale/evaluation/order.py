"""Put rows that an evaluation produced in batch order back into the data's order."""

from __future__ import annotations

from typing import Any

import numpy as np


def in_data_order(rows: Any, order: np.ndarray) -> Any:
    """``rows``, whose i-th entry belongs to data row ``order[i]``, sorted by data row.

    Args:
        rows: array [N, ...], or [N * R, ...] with R entries per data row (several returned
            sequences); tuples and lists of such arrays; or None.
        order: int array [N]: a permutation of the data rows, with any number of ids below 0 in
            between, whose entries stand for no row and are left out.

    Raises:
        ValueError: the number of entries is no multiple of N.
    """
    if rows is None:
        return None
    if isinstance(rows, (tuple, list)):
        return type(rows)(in_data_order(part, order) for part in rows)
    per_row, rest = divmod(len(rows), len(order))
    if rest:
        raise ValueError(
            f"{len(rows)} predictions for {len(order)} data rows: expected a multiple of the rows"
        )
    real = np.flatnonzero(order >= 0)
    positions = real[np.argsort(order[real], kind="stable")]
    entries = (positions[:, None] * per_row + np.arange(per_row)).reshape(-1)
    return rows[entries]
