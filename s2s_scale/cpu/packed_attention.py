"""Attention of packed rows, pair by pair instead of over whole rows.

A row of some 300 tokens that holds ten pairs has ten times as many scores as the pairs themselves,
and all but a tenth are masked. Here the pairs are taken out of their rows, put beside pairs of like
length, and attended to as ordinary padded rows; what comes out goes back to its place.

Shapes: R rows, T queries and S keys of a row, H heads, E a head's width; P pairs of like length.
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
"""Pairs attended to together are at most so many times as long as one another."""


@dataclass(frozen=True)
class Moves:
    """Where rows of one order stand in another; -1: nowhere, so that a row of zeros is put there.

    ``forth``: int64, for each place of the new order one of the old; ``back``: the other way round.
    ``empty``, ``empty_back``: the places with -1.
    """

    forth: Tensor
    back: Tensor
    empty: Tensor
    empty_back: Tensor

    @classmethod
    def of(cls, forth: Ids, count: int) -> Moves:
        """From the new places of ``count`` old rows, each of which is at most once among them."""
        there = np.flatnonzero(forth >= 0)
        back = np.full(count, -1, dtype=np.int64)
        back[forth[there]] = there
        empty, empty_back = (np.flatnonzero(order < 0) for order in (forth, back))
        moves = (np.maximum(forth, 0), np.maximum(back, 0), empty, empty_back)
        return cls(*(torch.from_numpy(array) for array in moves))

    def reversed(self) -> Moves:
        return Moves(self.back, self.forth, self.empty_back, self.empty)


class _Moved(torch.autograd.Function):
    """Rows [n, D] in another order; the gradient comes back in theirs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return _moved(rows, moves.forth, moves.empty)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_rows: Tensor) -> tuple[Tensor, None]:
        return _moved(by_rows, ctx.moves.back, ctx.moves.empty_back), None


def _moved(rows: Tensor, order: Tensor, empty: Tensor) -> Tensor:
    moved = rows.index_select(0, order)
    return moved.index_fill_(0, empty, 0) if len(empty) else moved


class _Group(NamedTuple):
    """P pairs of like length: positions of queries [P, T] and of keys [P, S], -1 where there is
    none; ``mask`` [P, 1, T, S] is added to scores."""

    queries: Ids
    keys: Ids
    mask: Tensor

    @property
    def at(self) -> tuple[Ids, Ids]:
        return self.queries, self.keys


class SegmentedAttention:
    """How queries [R, T] of a packed batch find their keys [R, S].

    Made once for a batch and used by all layers. ``queries`` and ``keys``: segments, as in
    ``models.packed``; ``causal``: a query sees no later key, both being the same positions.
    A pair on one side alone is for ``have_the_same_pairs`` to find.
    """

    def __init__(self, queries: Tensor, keys: Tensor, *, causal: bool, masked: float) -> None:
        sides = _Pairs.of(queries), _Pairs.of(keys)
        self._groups: list[_Group] = []
        self._sizes = queries.numel(), keys.numel()
        self._moves: dict[int, list[Moves]] = {}
        for pairs in _alike(np.maximum(sides[0].lengths, sides[1].lengths)):
            (q_at, q_there), (k_at, k_there) = (side.places(pairs) for side in sides)
            seen = np.broadcast_to(k_there[:, None, :], (*q_there.shape, k_there.shape[1]))
            mask = torch.from_numpy(np.tril(seen) if causal else np.array(seen)).unsqueeze(1)
            added = torch.zeros(mask.shape).masked_fill_(~mask, masked)
            self._groups.append(_Group(q_at, k_at, added))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Attention [R, H, T, E], computed by ``attend`` (query, key, value, mask) for each group.

        What ``attend`` gets is at least fp32: products of so few rows are no faster in bf16, and
        oneDNN would compile each of their shapes. 0 at positions of no pair.
        """
        rows, heads, _, _ = query.shape
        of_queries, of_keys = self._of_heads(heads)
        found = [
            attend(queries, keys, values, group.mask)
            for group, queries, keys, values in zip(
                self._groups,
                self._taken(query, of_queries, 0),
                self._taken(key, of_keys, 1),
                self._taken(value, of_keys, 1),
                strict=True,
            )
        ]
        if not found:
            return torch.zeros_like(query)
        flat = torch.cat([part.reshape(-1, value.shape[3]) for part in found]).to(query.dtype)
        whole: Tensor = _Moved.apply(flat, of_queries.reversed())
        return whole.view(rows, -1, heads, value.shape[3]).transpose(1, 2)

    def _of_heads(self, heads: int) -> list[Moves]:
        """Queries' and keys' way from [R, T, H] to all groups' [P, H, T]."""
        if heads not in self._moves:
            self._moves[heads] = [
                Moves.of(np.concatenate([_by_head(at, heads) for at in places]), size * heads)
                for size, *places in zip(
                    self._sizes, *(group.at for group in self._groups), strict=True
                )
                if places
            ] or [Moves.of(np.empty(0, dtype=np.int64), size * heads) for size in self._sizes]
        return self._moves[heads]

    def _taken(self, side: Tensor, moves: Moves, number: int) -> list[Tensor]:
        """Each group's [P, H, length, E] out of ``side`` [R, H, T, E], at least fp32."""
        _, heads, _, width = side.shape
        flat = _Moved.apply(side.transpose(1, 2).reshape(-1, width), moves)
        exact = flat.to(torch.promote_types(flat.dtype, torch.float32))
        shapes = [group.at[number].shape for group in self._groups]
        parts = exact.split([pairs * heads * length for pairs, length in shapes])
        return [
            part.view(pairs, heads, length, width)
            for part, (pairs, length) in zip(parts, shapes, strict=True)
        ]


def _by_head(at: Ids, heads: int) -> Ids:
    """Places of rows of heads, in the order [P, H, length], from those of positions [P, length]."""
    places = at[:, None, :] * heads + np.arange(heads)[:, None]
    return np.where(at[:, None, :] < 0, -1, places).reshape(-1)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of one side of a batch: a name for each, where its positions begin, how many."""

    names: Ids
    starts: Ids
    lengths: Ids
    positions: Ids

    @classmethod
    def of(cls, segments: Tensor) -> _Pairs:
        """Positions of a pair in their order, pairs in the order of rows."""
        numbers = segments.numpy()
        positions = np.flatnonzero(numbers)
        row, number = positions // max(1, numbers.shape[1]), numbers.reshape(-1)[positions]
        names, starts, lengths = np.unique(
            row << 32 | number, return_index=True, return_counts=True
        )
        return cls(names, starts, lengths, positions)

    def places(self, pairs: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Positions of some pairs [P, longest], -1 behind the shorter ones; and where they are."""
        lengths = self.lengths[pairs, None]
        number = np.arange(lengths.max())
        there = number < lengths
        at = np.minimum(self.starts[pairs, None] + number, len(self.positions) - 1)
        return np.where(there, self.positions[at], -1), there


def _alike(lengths: Ids) -> list[Ids]:
    """The numbers of the pairs, those of like length together."""
    groups, order = [], np.argsort(lengths, kind="stable")
    while len(order):
        most = np.searchsorted(lengths[order], lengths[order[0]] * _RATIO, side="right")
        groups.append(order[:most])
        order = order[most:]
    return groups


def have_the_same_pairs(queries: Tensor, keys: Tensor) -> bool:
    """Whether no pair has queries without keys, or keys without queries."""
    return np.array_equal(_Pairs.of(queries).names, _Pairs.of(keys).names)


@contextmanager
def attended_by_pairs(
    masks: list[tuple[Tensor, Tensor, Tensor, bool]], masked: float
) -> Iterator[None]:
    """While this lasts, our functions attend by pairs where they meet one of these masks.

    Args:
        masks: each an additive mask [R, 1, T, S], the segments of queries and of keys that it was
            made from, and whether it is causal.
        masked: what is added to scores that must not count.
    """
    memory = active()
    if memory is None:
        yield
        return
    memory.segmented = [
        (mask, SegmentedAttention(q, k, causal=causal, masked=masked))
        for mask, q, k, causal in masks
        if have_the_same_pairs(q, k)
    ]
    try:
        yield
    finally:
        memory.segmented = []
