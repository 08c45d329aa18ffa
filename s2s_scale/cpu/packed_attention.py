"""Packed attention on a CPU: pair by pair instead of over whole rows.

A packed row with ten pairs has ten times as many scores as the pairs themselves, and nine tenths of
them are masked. Here the pairs are taken out of their rows, bucketed by length, and attended to as
ordinary padded rows; the outputs are put back into place.

Shapes: R rows, T queries and S keys of a row, H heads, E width of a head; P pairs of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2s_scale.cpu.ops import active

Ids = npt.NDArray[np.int64]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_RATIO = 1.5
"""Largest ratio of the lengths in a bucket."""


@dataclass(frozen=True)
class Permutation:
    """Rows in another order, in which some places may stay empty and some rows be left out.

    ``forth``: int64, the old place of each new one, 0 for an empty one; ``back``: the inverse.
    ``empty``, ``empty_back``: the new and the old places without a counterpart, where zeros are
    put.
    """

    forth: Tensor
    back: Tensor
    empty: Tensor
    empty_back: Tensor

    @classmethod
    def of(cls, forth: Ids, count: int) -> Permutation:
        """From the old place of each new one, -1 if it is empty; there are ``count`` old rows."""
        there = np.flatnonzero(forth >= 0)
        back = np.full(count, -1, dtype=np.int64)
        back[forth[there]] = there
        empty, empty_back = (np.flatnonzero(order < 0) for order in (forth, back))
        arrays = (np.maximum(forth, 0), np.maximum(back, 0), empty, empty_back)
        return cls(*(torch.from_numpy(array) for array in arrays))

    def inverse(self) -> Permutation:
        return Permutation(self.back, self.forth, self.empty_back, self.empty)


class _Permute(torch.autograd.Function):
    """Rows [n, D] in another order; the gradient comes back in the original one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _select(rows, permutation.forth, permutation.empty)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_rows: Tensor) -> tuple[Tensor, None]:
        return _select(by_rows, ctx.permutation.back, ctx.permutation.empty_back), None


def _select(rows: Tensor, order: Tensor, empty: Tensor) -> Tensor:
    selected = rows.index_select(0, order)
    return selected.index_fill_(0, empty, 0) if len(empty) else selected


class _Bucket(NamedTuple):
    """P pairs of like length: places of the queries [P, T] and of the keys [P, S], -1 for padding;
    ``mask`` [P, 1, T, S] is added to the scores."""

    queries: Ids
    keys: Ids
    mask: Tensor


class PackedAttention:
    """Attention of queries [R, T] to keys [R, S] of a packed batch, for all layers.

    Args:
        queries: segment ids of the queries, as in ``models.packed_attention``.
        keys: segment ids of the keys. Both must have the same pairs (see ``have_same_pairs``).
        causal: a query does not attend to later keys; both are then the same positions.
        masked: added to scores that must not count.
    """

    def __init__(self, queries: Tensor, keys: Tensor, *, causal: bool, masked: float) -> None:
        sides = _Pairs.of(queries), _Pairs.of(keys)
        self._buckets: list[_Bucket] = []
        self._sizes = queries.numel(), keys.numel()
        self._permutations: dict[int, list[Permutation]] = {}
        lengths = np.maximum(sides[0].lengths, sides[1].lengths)
        order = np.argsort(lengths, kind="stable")
        while len(order):
            longest = lengths[order[0]] * _RATIO
            size = np.searchsorted(lengths[order], longest, side="right")
            (q_at, q_real), (k_at, k_real) = (side.places(order[:size]) for side in sides)
            seen = np.broadcast_to(k_real[:, None, :], (*q_real.shape, k_real.shape[1]))
            mask = torch.from_numpy(np.tril(seen) if causal else np.array(seen)).unsqueeze(1)
            added = torch.zeros(mask.shape).masked_fill_(~mask, masked)
            self._buckets.append(_Bucket(q_at, k_at, added))
            order = order[size:]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Attention [R, H, T, E], with zeros at pads.

        ``attend`` (query, key, value, mask) computes it for a bucket. Its inputs are at least fp32:
        matmuls of so few rows are no faster in bf16, and oneDNN would compile each of their shapes.
        """
        rows, heads, _, _ = query.shape
        of_queries, of_keys = self._of_heads(heads)
        outputs = [
            attend(queries, keys, values, bucket.mask)
            for bucket, queries, keys, values in zip(
                self._buckets,
                self._split(query, of_queries, 0),
                self._split(key, of_keys, 1),
                self._split(value, of_keys, 1),
                strict=True,
            )
        ]
        if not outputs:
            return torch.zeros_like(query)
        flat = torch.cat([part.reshape(-1, value.shape[3]) for part in outputs]).to(query.dtype)
        whole: Tensor = _Permute.apply(flat, of_queries.inverse())
        return whole.view(rows, -1, heads, value.shape[3]).transpose(1, 2)

    def _of_heads(self, heads: int) -> list[Permutation]:
        """From the order [R, T, H] of queries, and of keys, to [P, H, T] of all buckets."""
        if heads not in self._permutations:
            self._permutations[heads] = []
            for side, size in enumerate(self._sizes):
                order = [np.empty(0, dtype=np.int64)]
                for bucket in self._buckets:
                    at = (bucket.queries, bucket.keys)[side][:, None, :]
                    places = at * heads + np.arange(heads)[:, None]
                    order.append(np.where(at < 0, -1, places).reshape(-1))
                permutation = Permutation.of(np.concatenate(order), size * heads)
                self._permutations[heads].append(permutation)
        return self._permutations[heads]

    def _split(self, tensor: Tensor, permutation: Permutation, side: int) -> list[Tensor]:
        """Each bucket's [P, H, length, E] of ``tensor`` [R, H, T, E], at least fp32."""
        _, heads, _, width = tensor.shape
        flat = _Permute.apply(tensor.transpose(1, 2).reshape(-1, width), permutation)
        exact = flat.to(torch.promote_types(flat.dtype, torch.float32))
        shapes = [(bucket.queries, bucket.keys)[side].shape for bucket in self._buckets]
        parts = exact.split([pairs * heads * length for pairs, length in shapes])
        return [
            part.view(pairs, heads, length, width)
            for part, (pairs, length) in zip(parts, shapes, strict=True)
        ]


@dataclass(frozen=True)
class _Pairs:
    """The pairs of one side of a batch: the key of each, where its positions begin, and how many
    it has."""

    keys: Ids
    starts: Ids
    lengths: Ids
    positions: Ids

    @classmethod
    def of(cls, segment_ids: Tensor) -> _Pairs:
        """The pairs in the order of rows, and the positions of each in their order."""
        numbers = segment_ids.numpy()
        positions = np.flatnonzero(numbers)
        row, number = positions // max(1, numbers.shape[1]), numbers.reshape(-1)[positions]
        keys, starts, lengths = np.unique(row << 32 | number, return_index=True, return_counts=True)
        return cls(keys, starts, lengths, positions)

    def places(self, pairs: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Positions of some pairs [P, longest], with -1 for padding, and which of them are real."""
        lengths = self.lengths[pairs, None]
        number = np.arange(lengths.max())
        real = number < lengths
        at = np.minimum(self.starts[pairs, None] + number, len(self.positions) - 1)
        return np.where(real, self.positions[at], -1), real


def have_same_pairs(queries: Tensor, keys: Tensor) -> bool:
    """Whether every pair of these segment ids has both queries and keys."""
    return np.array_equal(_Pairs.of(queries).keys, _Pairs.of(keys).keys)


@contextmanager
def packed_attention(
    masks: list[tuple[Tensor, Tensor, Tensor, bool]], masked: float
) -> Iterator[None]:
    """Context in which the CPU functions attend pair by pair when they are given one of ``masks``.

    Args:
        masks: each an additive mask [R, 1, T, S], the segment ids of queries and of keys that it
            was made from, and whether it is causal.
        masked: added to scores that must not count.
    """
    memory = active()
    if memory is None:
        yield
        return
    memory.packed_attention = [
        (mask, PackedAttention(queries, keys, causal=causal, masked=masked))
        for mask, queries, keys, causal in masks
        if have_same_pairs(queries, keys)
    ]
    try:
        yield
    finally:
        memory.packed_attention = []
