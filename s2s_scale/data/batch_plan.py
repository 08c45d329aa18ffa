"""The batch plan: which rows make each optimizer step, as pure functions of lengths and seed.

The plan of an epoch depends on the lengths of the rows, the seed, the epoch and the step size, and
on nothing else: ranks and devices play no part. It is the same for one process and for sixty-four,
and a run that resumes with another number of ranks gets the rows that it would have had.
``divide_step`` then divides the rows of a step over ranks and micro-batches.

Random numbers come from numpy's ``RandomState``, whose stream is frozen: the same seed gives the
same plan under every numpy version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from s2s_scale.config import (
    DEFAULT_GROUPS_PER_STEP,
    DEFAULT_STEPS_PER_EPOCH,
    DEFAULT_TOKENS_PER_STEP,
    LEAST_GROUPS_PER_STEP,
    LEAST_TOKENS_PER_STEP,
)
from s2s_scale.data.cache import entry_of, read_lengths
from s2s_scale.errors import UserError

STEPS_PER_CHUNK = 50  # fastai's SortishSampler sorts inside random chunks of 50 batches
LARGE_PERMUTATION = 2**16
ROWS_OF_FULL_BUCKET = 16
"""Rows of mean length that a bucket of fixed shape should hold, so that few of them are fillers."""

Mode = Literal["fixed", "sortish", "sequential"]
Lengths = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Source and target tokens of each row: two arrays [rows]."""
Rows = npt.NDArray[np.int64]
Rows32 = npt.NDArray[np.int32]
Keys = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def row_lengths(dataset: Any, *, length_column: str = "length") -> Lengths:
    """Source and target tokens of every row: two int32 arrays [rows].

    Taken from the arrays saved beside tokenised data (no row is read), else from the columns
    source_length and target_length, else from ``length_column`` (the source; the target is then
    counted, or 0 without labels), else counted in input_ids and labels. ``dataset`` may be any
    map-style data set of mappings. Raises ``UserError`` where a row has none of these.
    """
    entry = entry_of(dataset)
    if entry is not None:
        return read_lengths(entry)
    names = ("source_length", length_column, "input_ids"), ("target_length", "labels")
    if hasattr(dataset, "select_columns") and hasattr(dataset, "with_format"):
        columns = [_present(dataset.column_names, side) for side in names]
        if columns[0] is None:
            raise _no_length(dataset.column_names, length_column=length_column)
        source = _column(dataset, columns[0])
        target = np.zeros_like(source) if columns[1] is None else _column(dataset, columns[1])
        return source, target
    lengths = np.zeros((2, len(dataset)), dtype=np.int32)
    for number in range(len(dataset)):
        row = dataset[number]
        for side, name in enumerate(_present(row, side) for side in names):
            if name is not None and row[name] is not None:
                value = row[name]
                lengths[side, number] = len(value) if name in _COUNTED else int(value)
            elif side == 0:
                raise _no_length(list(row), length_column=length_column)
    return lengths[0], lengths[1]


_COUNTED = ("input_ids", "labels")


def _present(names: Any, wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _column(dataset: Any, name: str) -> npt.NDArray[np.int32]:
    """A column of numbers, or the lengths of a column of lists, without a Python row."""
    import pyarrow.compute as pc

    parts = [np.empty(0, dtype=np.int32)]
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=100_000):
        column = table.column(0)
        if name in _COUNTED:
            column = pc.list_value_length(column)
        parts.append(column.to_numpy().astype(np.int32))
    return np.concatenate(parts)


def _no_length(names: list[str], *, length_column: str) -> UserError:
    return UserError(
        f"batching by length: found rows with {', '.join(names)}; expected input_ids or a column "
        f"'source_length' or '{length_column}'; add one, or use --batching fixed"
    )


def has_length_columns(dataset: Any) -> bool:
    """Whether lengths can be read from columns, without reading every row."""
    columns = getattr(dataset, "column_names", None) or ()
    return _present(columns, ("source_length", "length", "input_ids")) is not None


def default_tokens_per_step(lengths: Lengths) -> int:
    """Real tokens of a step if none are given: few enough for some hundred steps an epoch.

    At least as many as four buckets with the longest row need.
    """
    tokens = sum(int(side.sum(dtype=np.int64)) for side in lengths)
    least = max(LEAST_TOKENS_PER_STEP, LEAST_GROUPS_PER_STEP * _longest_pair(lengths))
    return max(least, min(DEFAULT_TOKENS_PER_STEP, tokens // DEFAULT_STEPS_PER_EPOCH))


def default_buckets_per_step(lengths: Lengths, tokens_per_step: int, *, fixed_shapes: bool) -> int:
    """Buckets of a step if no number is given: as many as have room for the longest row.

    With ``fixed_shapes``, where filler rows complete short buckets, each also has room for
    ``ROWS_OF_FULL_BUCKET`` rows of mean length.
    """
    buckets = tokens_per_step // max(1, _longest_pair(lengths))
    if fixed_shapes:
        mean = sum(float(side.mean()) for side in lengths) if len(lengths[0]) else 1.0
        full = int(tokens_per_step / (ROWS_OF_FULL_BUCKET * mean))
        buckets = min(buckets, max(LEAST_GROUPS_PER_STEP, full))
    return max(1, min(DEFAULT_GROUPS_PER_STEP, buckets))


def _longest_pair(lengths: Lengths) -> int:
    return int((lengths[0] + lengths[1]).max(initial=0))


@dataclass(frozen=True)
class EpochPlan:
    """The rows of every optimizer step of one epoch.

    ``order``: row ids, int64 [rows]. ``offsets``: int64 [steps + 1]; step ``s`` has the rows
    ``order[offsets[s]:offsets[s + 1]]``.
    """

    order: Rows
    offsets: Rows

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.offsets) - 1

    def rows(self, step: int) -> Rows:
        """Row ids of a step, counted from 0; ``IndexError`` beyond the last one."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan with {self.steps} steps")
        return self.order[self.offsets[step] : self.offsets[step + 1]]

    def __iter__(self) -> Iterator[Rows]:
        return (self.rows(step) for step in range(self.steps))


def plan_epoch(
    lengths: Lengths | None,
    *,
    rows_per_step: int,
    seed: int,
    epoch: int,
    mode: Mode = "fixed",
    drop_last: bool = False,
    n_rows: int | None = None,
) -> EpochPlan:
    """The plan of one epoch. Every row is in exactly one step.

    Args:
        lengths: source and target tokens; may be None unless ``mode`` is sortish.
        rows_per_step: rows of every step but the last, which has the remainder.
        seed: of the plans of all epochs.
        epoch: counted from 0.
        mode: ``fixed``: a random permutation; ``sequential``: the order of the data; ``sortish``:
            rows of like length in a step, longest first (see ``_sortish_order``).
        drop_last: leave out a short last step.
        n_rows: number of rows; required without ``lengths``.

    Raises:
        ValueError: a step size below 1, an unknown mode, or lengths that are missing or disagree
            with ``n_rows``.
    """
    if rows_per_step < 1:
        raise ValueError(f"rows_per_step={rows_per_step}: expected at least 1")
    count = count_rows(lengths, n_rows)
    if mode == "sortish":
        if lengths is None:
            raise ValueError("mode='sortish' needs the lengths of the rows")
        order = _sortish_order(lengths, rows_per_step, random_state(seed, epoch))
    elif mode == "fixed":
        order = _permutation(random_state(seed, epoch), count)
    elif mode == "sequential":
        order = np.arange(count)
    else:
        raise ValueError(f"mode={mode!r}: expected 'fixed', 'sortish' or 'sequential'")
    offsets = np.arange(0, count + 1, rows_per_step)
    if not drop_last and offsets[-1] < count:
        offsets = np.append(offsets, count)
    order = order[: offsets[-1]].astype(np.int64, copy=False)
    return EpochPlan(order, offsets.astype(np.int64, copy=False))


def steps_per_epoch(n_rows: int, *, rows_per_step: int, drop_last: bool = False) -> int:
    """Optimizer steps of a plan with ``n_rows`` rows."""
    return n_rows // rows_per_step if drop_last else -(-n_rows // rows_per_step)


def count_rows(lengths: Lengths | None, n_rows: int | None) -> int:
    """Number of rows; ``ValueError`` if neither argument is given or they disagree."""
    if lengths is None:
        if n_rows is None:
            raise ValueError("give lengths, or n_rows where the plan needs no lengths")
        return n_rows
    source, target = lengths
    if len(source) != len(target) or (n_rows is not None and n_rows != len(source)):
        raise ValueError(
            f"{len(source)} source lengths, {len(target)} target lengths, n_rows={n_rows}: "
            f"expected the same number"
        )
    return len(source)


def random_state(seed: int, epoch: int) -> np.random.RandomState:
    """The generator of an epoch's plan."""
    sequence = np.random.SeedSequence([seed % 2**64, epoch])
    return np.random.RandomState(np.random.MT19937(sequence))


def _permutation(random: np.random.RandomState, count: int) -> Rows:
    """A random permutation of ``count`` numbers.

    A large one comes from sorting by random keys, since swaps all over memory miss the cache. Key
    and number share 64 bits; for ten million numbers, 40 of them are the key's.
    """
    if count < LARGE_PERMUTATION:
        return random.permutation(count)
    bits = count.bit_length()
    keys = np.empty(count, dtype=np.int64)
    for start in range(0, count, LARGE_PERMUTATION):  # each part stays in the cache meanwhile
        part = keys[start : start + LARGE_PERMUTATION]
        part[:] = random.randint(0, 2**63 >> bits, len(part), dtype=np.int64)
        part <<= bits
        part |= np.arange(start, start + len(part))
    keys.sort()
    keys &= (1 << bits) - 1
    return keys


def _sortish_order(lengths: Lengths, rows_per_step: int, random: np.random.RandomState) -> Rows:
    """fastai's SortishSampler: like lengths together, but different ones every epoch.

    A random permutation is split into chunks of 50 steps. Each chunk is sorted by (source, target)
    length, longest first, and split into steps. The steps are shuffled, except that the one with
    the longest row of all comes first, so that memory runs out at once or never.

    There are two differences from fastai, both because a step's size must not change within an
    epoch. The short step stays last. And the longest row is moved to the first chunk (it swaps
    places with a row there), where it lands in a full step if there is one. In fastai it can land
    in the short batch, which then comes first and shifts all later ones.
    """
    source, target = lengths
    count = len(source)
    order = _permutation(random, count)
    if count == 0:
        return order
    key, bits = _longest_first(source, target)
    longest = np.flatnonzero(key == key.min())[-1]
    place = int(np.argmax(order == longest))
    order[[0, place]] = order[[place, 0]]
    size = STEPS_PER_CHUNK * rows_per_step
    for start in range(0, count, size):
        rows = order[start : start + size]
        order[start : start + size] = rows[_stable_order(key[rows], bits)]
    full = count // rows_per_step
    if full > 1:
        steps = order[: full * rows_per_step].reshape(full, rows_per_step)  # a view
        steps[1:] = steps[1:][random.permutation(full - 1)]
    return order


def _longest_first(source: Rows32, target: Rows32) -> tuple[Keys, int]:
    """A sort key for each row, longest first, the source before the target; and its bits.

    As narrow as possible, because keys are read in random order and should stay in the cache.
    """
    most = int(source.max()), int(target.max())
    bits = [side.bit_length() for side in most]
    kind = np.int32 if sum(bits) < 32 else np.int64
    key: Keys = (most[0] - source).astype(kind)
    key <<= bits[1]
    key |= (most[1] - target).astype(kind)
    return key, sum(bits)


def _stable_order(keys: Keys, bits: int) -> Rows:
    """``np.argsort(keys, kind="stable")`` of keys from 0 to 2**bits - 1.

    If key and place fit into 64 bits, sorting these is several times as fast.
    """
    place_bits = len(keys).bit_length()
    if bits + place_bits > 63:
        return np.argsort(keys, kind="stable")
    both = keys.astype(np.int64) << place_bits
    both |= np.arange(len(keys))
    both.sort()
    both &= (1 << place_bits) - 1
    return both


def micro_batches_of_step(n_rows: int, *, world_size: int, rows_per_device: int) -> int:
    """Micro-batches that every rank runs for a step of ``n_rows`` rows."""
    return -(-n_rows // (world_size * rows_per_device))


def divide_step(rows: Rows, *, world_size: int, rows_per_device: int) -> list[list[Rows]]:
    """Divide a step: ``result[micro_batch][rank]`` are the rows of that rank.

    Every rank has the same number of micro-batches, the fewest that hold the rows. In a full step
    each has ``rows_per_device`` rows. In the short last step the sizes within a micro-batch differ
    by at most 1, and a rank has no row only if fewer rows than ranks are left. Rows keep their
    order, so that neighbours in length stay together.
    """
    if world_size < 1 or rows_per_device < 1:
        raise ValueError(
            f"world_size={world_size}, rows_per_device={rows_per_device}: expected at least 1"
        )
    capacity = world_size * rows_per_device
    count = micro_batches_of_step(len(rows), world_size=world_size, rows_per_device=rows_per_device)
    if count == 0:
        return []
    if len(rows) // count >= world_size:
        parts = np.array_split(rows, count)
    else:  # an even split would leave ranks without a row in more than one micro-batch
        parts = np.split(rows, range(capacity, len(rows), capacity))
    return [np.array_split(part, world_size) for part in parts]


def evaluation_batches(
    lengths: Lengths | None,
    *,
    n_rows: int,
    rows_per_batch: int,
    max_tokens: int | None = None,
    world_size: int = 1,
) -> list[Rows]:
    """Batches of row ids for evaluation: longest rows first, or data order without lengths.

    Sorted batches have few pads, and the largest one comes first. Results can be put back into
    data order by the row ids. With ``max_tokens`` a batch has as many rows, up to
    ``rows_per_batch``, as fit into that many source and target tokens, pads included; the
    ``world_size`` batches of a round have the same number of rows, except in the last round.
    """
    if rows_per_batch < 1:
        raise ValueError(f"rows_per_batch={rows_per_batch}: expected at least 1")
    count = count_rows(lengths, n_rows)
    order = np.arange(count, dtype=np.int64)
    if lengths is None:
        return [order[start : start + rows_per_batch] for start in range(0, count, rows_per_batch)]
    source, target = (side.astype(np.int64) for side in lengths)
    order = np.lexsort((order, -target, -source))
    batches, start = [], 0
    while start < count:
        size = rows_per_batch
        if max_tokens is not None:
            rows = order[start : start + rows_per_batch * world_size]
            width = source[rows[0]] + np.maximum.accumulate(target[rows])
            each = np.arange(len(rows)) // world_size + 1
            # The padded tokens of a batch only grow with its rows.
            fit = int((each * width <= max_tokens).sum())
            size = max(1, fit // world_size if fit < len(rows) else -(-fit // world_size))
        for _ in range(world_size):
            batches.append(order[start : start + size])
            start += size
    return [batch for batch in batches if len(batch)]


def deal_batches(
    batches: Sequence[Rows], *, world_size: int, rows_per_rank: int | None = None
) -> list[list[Rows]]:
    """Deal evaluation batches to ranks: ``result[round][rank]`` are the rows of that rank.

    In a round every rank has the same number of rows, as collective operations need. In the last
    one, filler rows complete it: ids below 0 (``~row``), which count nothing (see ``FillerRows``).
    With ``rows_per_rank`` every rank has exactly that many rows in every round.
    """
    rounds = []
    for start in range(0, len(batches), world_size):
        rows = np.concatenate(batches[start : start + world_size])
        missing = -len(rows) % world_size
        if rows_per_rank is not None:
            missing = rows_per_rank * world_size - len(rows)
        filled = np.concatenate([rows, np.repeat(~rows[-1:], missing)])
        rounds.append(np.split(filled, world_size))
    return rounds
