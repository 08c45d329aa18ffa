"""Packing: several pairs in one row, with all rows of an epoch nearly equally full.

The steps of an epoch determine how many rows it has, and the pairs are distributed so that the
fullest row is hardly fuller than the mean. Long pairs go first. The next ones always go to the
emptiest rows, and among these a row with more source than target gets a pair with more target than
source. Thousands of rows are served at once, so that a million pairs take tenths of a second.

The number of rows and their widths depend on the lengths alone; seed and epoch decide which pairs
share a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from s2s_scale.config import DEFAULT_PACKED_TOKENS, DEFAULT_TOKENS_PER_ROW
from s2s_scale.data.batch_plan import EpochPlan, Lengths, Rows, random_state
from s2s_scale.data.samplers import EpochSampler, MicroBatch
from s2s_scale.errors import UserError

ROWS_STEP = 8
"""A step with at least this many rows has a multiple of it, so that 2, 4 or 8 ranks share them
evenly."""
CHUNK_PAIRS = 65_536
"""Pairs that are distributed together, bounded for the sake of memory and cache."""
ATTEMPTS = 8
MARGIN = 1
"""Tokens by which rows are wider than the fullest one of the base epoch."""
CLASS_BITS = 6
"""Leading binary digits of a pair's number of tokens that make its class. Pairs of a class, which
are shuffled between epochs, have equal numbers below 64, and differ by at most 1/32 above."""

_BASE = (0, 0)
"""Seed and epoch of the plan that decides the widths."""


@dataclass(frozen=True)
class PackedLayout:
    """What the packed plans of all epochs have in common.

    ``pairs``: int64 [pairs], all pairs from long to short. ``cells``: int64 [cells + 1], offsets of
    the classes of like length in ``pairs``. ``rows_per_step``: of each of the ``steps`` steps.
    ``widths``: source and target tokens that no row exceeds in any epoch.
    """

    lengths: Lengths
    pairs: Rows
    cells: Rows
    steps: int
    rows_per_step: int
    widths: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PackedPlan(EpochPlan):
    """The pairs of every step of one epoch, by packed rows.

    ``row_offsets``: int64 [rows + 1] into ``order``; step ``s`` has the rows from
    ``s * rows_per_step`` on. A row may be empty if there are few pairs.
    """

    row_offsets: Rows
    rows_per_step: int

    def rows_of(self, step: int) -> list[Rows]:
        """The pairs of each packed row of a step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan with {self.steps} steps")
        first = step * self.rows_per_step
        ends = self.row_offsets[first : first + self.rows_per_step + 1]
        return [self.order[start:end] for start, end in itertools.pairwise(ends.tolist())]


def packed_layout(
    lengths: Lengths, *, tokens_per_step: int, tokens_per_row: int | None = None
) -> PackedLayout:
    """Steps of at most ``tokens_per_step`` real tokens, in rows of about ``tokens_per_row``.

    There are as few steps as possible, all of the same size. Without ``tokens_per_row`` rows are
    wide enough for the longest pair, and a step has at least 8 of them if possible.

    Raises:
        UserError: the longest pair does not fit into a step, or into a row.
    """
    n_pairs = len(lengths[0])
    if n_pairs == 0:
        none = np.zeros(1, np.int64)
        return PackedLayout(lengths, none[:0], none, 0, 1)
    tokens = np.array([int(side.sum(dtype=np.int64)) for side in lengths])
    longest = np.array([int(side.max()) for side in lengths])
    _check_sizes(int((lengths[0] + lengths[1]).max()), longest, tokens_per_step, tokens_per_row)
    steps = -(-int(tokens.sum()) // tokens_per_step)
    rows = _rows_per_step(tokens / steps, longest, tokens_per_row)
    rows = max(1, min(rows, n_pairs // steps))
    classes = _classes(lengths)
    counts = np.bincount(classes)
    # From long to short; 16-bit keys: numpy's radix sort, in linear time.
    pairs = np.argsort(np.uint16(len(counts) - 1) - classes, kind="stable")
    cells = np.concatenate([[0], np.cumsum(counts[::-1][counts[::-1] > 0])])
    layout = PackedLayout(lengths, pairs, cells, int(steps), rows)
    chunks = _packed_chunks(layout, random_state(*_BASE))
    source, target = np.max([loads.max(axis=0) for _, _, loads in chunks], axis=0).tolist()
    return replace(layout, widths=(source + MARGIN, target + MARGIN))


def _check_sizes(
    pair: int, longest: Rows, tokens_per_step: int, tokens_per_row: int | None
) -> None:
    """Raise ``UserError`` unless the longest ``pair`` fits into a step and into a row."""
    need = int(longest.sum())
    if tokens_per_row is not None and tokens_per_row < need:
        raise UserError(
            f"tokens_per_row={tokens_per_row}: expected at least {need}, the longest source and "
            f"the longest target ({longest[0]} and {longest[1]} tokens); raise --tokens_per_row, "
            "or lower --max_source_length or --max_target_length"
        )
    least = max(pair, tokens_per_row or 0)
    if tokens_per_step < least:
        what = "one row (--tokens_per_row)" if least > pair else "the longest pair"
        raise UserError(
            f"tokens_per_step={tokens_per_step}: expected at least {least}, {what}; raise "
            "--tokens_per_step, or lower --max_source_length or --max_target_length"
        )


def _rows_per_step(
    per_step: npt.NDArray[np.float64], longest: Rows, tokens_per_row: int | None
) -> int:
    """Number of rows for ``per_step`` source and target tokens."""
    # More rows would be less full than the longest pair.
    most = int((per_step / np.maximum(longest, 1)).min())
    if tokens_per_row is None:
        wanted = per_step.sum() / DEFAULT_TOKENS_PER_ROW
        wanted = max(wanted, min(most, ROWS_STEP))
    else:
        wanted = per_step.sum() / tokens_per_row
    rows = min(round(wanted), most)
    if rows >= ROWS_STEP:
        rows = min(round(wanted / ROWS_STEP), most // ROWS_STEP) * ROWS_STEP
    return max(1, rows)


def _classes(lengths: Lengths) -> npt.NDArray[np.uint16]:
    """Class of each pair by its tokens, source and target together; longer ones have higher."""
    tokens = lengths[0] + lengths[1]
    values = np.arange(int(tokens.max()) + 1)
    bits = np.frexp(values)[1]  # exact, as a logarithm is not
    shift = np.maximum(bits - CLASS_BITS, 0)
    table = (shift << (CLASS_BITS - 1)) + (values >> shift)
    return table.astype(np.uint16)[tokens]


def plan_packed(layout: PackedLayout, *, seed: int, epoch: int) -> PackedPlan:
    """The plan of one epoch: every pair is in exactly one row, every row in one step.

    Pairs of a class are shuffled between epochs, and so are rows.
    """
    random = random_state(seed, epoch)
    chunks = _chunks_within_widths(layout, random)
    if chunks is None:  # the base plan, which decided the widths, always fits
        chunks = list(_packed_chunks(layout, random_state(*_BASE)))
    order, counts = [layout.pairs[:0]], [layout.pairs[:0]]
    for number in random.permutation(len(chunks)):
        pairs, rows, loads = chunks[number]
        n_rows = len(loads)
        rows = random.permutation(n_rows)[rows]
        keys = rows.astype(np.uint16) if n_rows <= 2**16 else rows  # for a radix sort
        order.append(pairs[np.argsort(keys, kind="stable")])
        counts.append(np.bincount(rows, minlength=n_rows))
    row_offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    offsets = row_offsets[:: layout.rows_per_step]
    return PackedPlan(np.concatenate(order), offsets, row_offsets, layout.rows_per_step)


_Chunk = tuple[Rows, Rows, Rows]
"""Pairs, the row of each (from 0), and the source and target tokens of each row, [rows, 2]."""


def _chunks_within_widths(
    layout: PackedLayout, random: np.random.RandomState
) -> list[_Chunk] | None:
    """The chunks of an epoch; None if one does not fit the widths after several attempts."""
    chunks = list(_packed_chunks(layout, random))
    for number, (pairs, _, loads) in enumerate(chunks):
        attempt = 0
        while (loads > layout.widths).any():
            attempt += 1
            if attempt == ATTEMPTS:
                return None
            pairs = random.permutation(pairs)
            chunks[number] = _packed(layout.lengths, pairs, len(loads))
            loads = chunks[number][2]
    return chunks


def _packed_chunks(layout: PackedLayout, random: np.random.RandomState) -> Iterator[_Chunk]:
    """Pairs, shuffled within their classes, dealt to chunks of steps and distributed over rows.

    Each chunk gets its share of every length, so that all of them are equally full.
    """
    if layout.steps == 0:
        return
    pairs = layout.pairs.copy()
    # Class by class, so that memory is read in order: one permutation of many takes longer.
    for start, end in zip(layout.cells[:-1].tolist(), layout.cells[1:].tolist(), strict=True):
        random.shuffle(pairs[start:end])
    lines = -(-len(pairs) // layout.steps)
    dealt = np.full(lines * layout.steps, -1, dtype=np.int64)
    dealt[: len(pairs)] = pairs
    columns = dealt.reshape(lines, layout.steps)
    n_chunks = min(layout.steps, -(-len(pairs) // CHUNK_PAIRS))
    for steps in np.array_split(np.arange(layout.steps), n_chunks):
        chunk = columns[:, steps[0] : steps[-1] + 1].reshape(-1)
        yield _packed(layout.lengths, chunk[chunk >= 0], len(steps) * layout.rows_per_step)


def _packed(lengths: Lengths, pairs: Rows, n_rows: int) -> _Chunk:
    sizes = np.stack([side[pairs] for side in lengths]).astype(np.float64)
    rows = distribute(sizes, n_rows)
    loads = [np.bincount(rows, weights=side, minlength=n_rows) for side in sizes]
    return pairs, rows, np.stack(loads, axis=1).astype(np.int64)


def distribute(sizes: npt.NDArray[np.float64], n_rows: int) -> Rows:
    """A row for each pair, int64 [pairs], such that all ``n_rows`` rows are about equally full.

    ``sizes``: source and target tokens, [2, pairs].
    """
    shares = sizes / np.maximum(sizes.sum(axis=1, keepdims=True), 1)
    size, tilt = shares.sum(axis=0), shares[0] - shares[1]
    longest_first = np.argsort(-size, kind="stable")
    load, tilted = np.zeros(n_rows), np.zeros(n_rows)
    rows = np.empty(len(size), dtype=np.int64)
    place = 0
    while place < len(size):
        fullest = load + np.abs(tilted)  # twice the fuller side
        by_load = np.argsort(fullest, kind="stable")
        # A fuller row would get a pair only after the emptiest one has a second.
        limit = fullest[by_load[0]] + size[longest_first[place]]
        count = int(np.searchsorted(fullest[by_load], limit, side="right"))
        pairs = longest_first[place : place + count]
        chosen = by_load[: len(pairs)]
        pairs = pairs[np.argsort(-tilt[pairs], kind="stable")]
        chosen = chosen[np.argsort(tilted[chosen], kind="stable")]
        rows[pairs] = chosen
        load[chosen] += size[pairs]
        tilted[chosen] += tilt[pairs]
        place += len(pairs)
    return rows


class PackedSampler(EpochSampler):
    """Steps of about ``tokens_per_step`` real tokens in packed rows (see ``plan_packed``).

    The rows of a step are divided evenly over ranks, and those of a rank over micro-batches of at
    most ``max_tokens`` padded tokens. With ``one_shape`` every micro-batch has the same number of
    rows, a multiple of ``rows_multiple``, and the same widths; rows without pairs complete it.

    Raises:
        UserError: the longest pair does not fit into a step or a row, or a row not into a
            micro-batch.
    """

    plan: PackedPlan
    lengths: Lengths

    def __init__(
        self,
        lengths: Lengths,
        *,
        tokens_per_step: int,
        tokens_per_row: int | None = None,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        one_shape: bool = False,
        rows_multiple: int = 1,
    ) -> None:
        super().__init__(rank=rank, world_size=world_size, seed=seed)
        self.lengths = lengths
        self.tokens_per_step = tokens_per_step
        self.tokens_per_row = tokens_per_row
        self.drop_last = drop_last  # no step is shorter than the others
        self.layout = packed_layout(
            lengths, tokens_per_step=tokens_per_step, tokens_per_row=tokens_per_row
        )
        width = sum(self.layout.widths)
        need = max(1, width) * rows_multiple
        if max_tokens is None:
            max_tokens = max(need, DEFAULT_PACKED_TOKENS * rows_multiple)
        if max_tokens < need:
            raise UserError(
                f"max_tokens_per_device={max_tokens // rows_multiple}: expected at least {width}, "
                "one packed row; raise --max_tokens_per_device, or lower --tokens_per_row"
            )
        self.accumulation, rows = _cut_evenly(
            -(-self.layout.rows_per_step // world_size),
            most=max_tokens // need * rows_multiple,
            multiple=rows_multiple if one_shape else 1,
        )
        self.rows = rows if one_shape else None

    def _make_plan(self, epoch: int) -> PackedPlan:
        return plan_packed(self.layout, seed=self.seed, epoch=epoch)

    def divide(self, step: int) -> Iterator[list[MicroBatch]]:
        rows = [row.tolist() for row in self.plan.rows_of(step)]
        shares = [
            np.array_split(np.array(share, dtype=np.int64), self.accumulation)
            for share in np.array_split(np.arange(len(rows)), self.world_size)
        ]
        widths = None if self.rows is None else self.layout.widths
        for numbers in zip(*shares, strict=True):
            batches = []
            for part in numbers:
                packed = [rows[number] for number in part]
                packed += [[]] * (max(1, self.rows or 1) - len(packed))
                pairs = itertools.chain.from_iterable(packed)
                batches.append(MicroBatch(pairs, widths, [len(row) for row in packed]))
            yield batches

    @property
    def steps(self) -> int:
        return self.layout.steps

    @property
    def n_micro_batches(self) -> int:
        return self.layout.steps * self.accumulation


def _cut_evenly(rows: int, *, most: int, multiple: int) -> tuple[int, int]:
    """Number of parts, and rows of each, that hold ``rows`` rows with the fewest fillers.

    As few parts as possible, or up to twice as many if that needs fewer fillers.
    """
    fewest = -(-rows // most)
    sizes = {parts: -(-rows // (parts * multiple)) * multiple for parts in range(1, 2 * fewest + 1)}
    parts = min(range(fewest, 2 * fewest + 1), key=lambda parts: parts * sizes[parts])
    return parts, sizes[parts]
