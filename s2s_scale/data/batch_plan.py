"""Which rows make each optimizer step: pure functions of lengths, seed, epoch and step size.

Nothing here knows of ranks, devices or torch: the plan of an epoch is the same on one process
and on sixty-four, and a run resumes at another world size with the rows it would have had.
``divide_step`` then spreads the rows of a step over ranks and micro-batches.

Random numbers come from numpy's ``RandomState``, whose stream is frozen: the same seed gives the
same plan under every numpy version.

Source and target lengths of a data set's rows, read the cheapest way it offers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

ROWS_OF_GROUP = 16
_SOURCES = ("source_length", "length", "input_ids")

Lengths = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


def row_lengths(dataset: Any, *, length_column: str = "length") -> Lengths:
    """Tokens in source and target of every row: two int32 arrays [rows].

    Taken from the arrays saved beside tokenised data (no row is read), else from the columns
    source_length and target_length, else from ``length_column`` (the source; the target is then
    counted, or 0 without labels), else counted in input_ids and labels. ``dataset`` may be any
    map-style data set of mappings. Raises ``UserError`` where a row has none of these.
    """
    entry = entry_of(dataset)
    if entry is not None:
        return read_lengths(entry)
    if hasattr(dataset, "select_columns") and hasattr(dataset, "with_format"):
        return _of_arrow(dataset, length_column=length_column)
    pairs = [_of_row(dataset[row], length_column=length_column) for row in range(len(dataset))]
    lengths = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return lengths[:, 0].copy(), lengths[:, 1].copy()


def has_length_columns(dataset: Any) -> bool:
    """Whether lengths can be had from columns, without reading row after row."""
    columns = getattr(dataset, "column_names", None) or ()
    return any(name in columns for name in _SOURCES)


def usual_tokens_per_step(lengths: Lengths) -> int:
    """Real tokens of a step where none are given: few enough for some hundred steps an epoch.

    There is room for four groups with the longest row.
    """
    total = sum(int(side.sum(dtype=np.int64)) for side in lengths)
    least = max(LEAST_TOKENS_PER_STEP, LEAST_GROUPS_PER_STEP * _longest_pair(lengths))
    return max(least, min(DEFAULT_TOKENS_PER_STEP, total // DEFAULT_STEPS_PER_EPOCH))


def usual_groups_per_step(lengths: Lengths, tokens_per_step: int, *, fixed_shapes: bool) -> int:
    """Groups of a step where no number is given: as many as have room for the longest row.

    With ``fixed_shapes``, where short groups are filled up, they also hold some rows of mean
    length.
    """
    groups = tokens_per_step // max(1, _longest_pair(lengths))
    if fixed_shapes:
        mean = sum(float(side.mean()) for side in lengths) if len(lengths[0]) else 1.0
        groups = min(
            groups, max(LEAST_GROUPS_PER_STEP, int(tokens_per_step / (ROWS_OF_GROUP * mean)))
        )
    return max(1, min(DEFAULT_GROUPS_PER_STEP, groups))


def _longest_pair(lengths: Lengths) -> int:
    return int((lengths[0] + lengths[1]).max(initial=0))


def _of_arrow(dataset: Any, *, length_column: str) -> Lengths:
    names = dataset.column_names
    source = next((n for n in ("source_length", length_column, "input_ids") if n in names), None)
    target = next((n for n in ("target_length", "labels") if n in names), None)
    if source is None:
        raise _no_length(names, length_column=length_column)
    first = _column(dataset, source)
    return first, np.zeros_like(first) if target is None else _column(dataset, target)


def _column(dataset: Any, name: str) -> npt.NDArray[np.int32]:
    """A column of numbers, or the lengths of a column of lists, without a Python row."""
    import pyarrow.compute as pc

    parts = [np.empty(0, dtype=np.int32)]
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=100_000):
        column = table.column(0)
        if name in ("input_ids", "labels"):
            column = pc.list_value_length(column)
        parts.append(column.to_numpy().astype(np.int32))
    return np.concatenate(parts)


def _of_row(row: Mapping[str, Any], *, length_column: str) -> tuple[int, int]:
    if "source_length" in row:
        source = int(row["source_length"])
    elif length_column in row:
        source = int(row[length_column])
    elif "input_ids" in row:
        source = len(row["input_ids"])
    else:
        raise _no_length(list(row), length_column=length_column)
    if "target_length" in row:
        return source, int(row["target_length"])
    return source, len(row["labels"]) if row.get("labels") is not None else 0


def _no_length(names: list[str], *, length_column: str) -> UserError:
    return UserError(
        f"batching by length: found rows with {', '.join(names)}; expected input_ids or a column "
        f"'source_length' or '{length_column}'; add one, or use --batching fixed"
    )


__all__ = [
    "EpochPlan",
    "Lengths",
    "count_rows",
    "deal_batches",
    "divide_step",
    "evaluation_batches",
    "micro_batches_of_step",
    "plan_epoch",
    "row_lengths",
    "steps_per_epoch",
]

Mode = Literal["fixed", "sortish", "sequential"]
Rows = npt.NDArray[np.int64]
Rows32 = npt.NDArray[np.int32]
Keys = npt.NDArray[np.int32] | npt.NDArray[np.int64]

STEPS_PER_CHUNK = 50  # fastai's SortishSampler sorts inside random chunks of 50 batches
LARGE_PERMUTATION = 2**16


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

    Every step has ``rows_per_step`` rows, except the last one, which has what is left over
    (``drop_last`` leaves it out). ``fixed``: a random permutation. ``sequential``: data order.
    ``sortish``: rows of like length in a step, longest first (see ``_sortish_order``).

    ``lengths`` (source, target in tokens) may be None where the mode is not sortish; ``n_rows``
    is then required. Raises ``ValueError`` for a step size below 1, an unknown mode, and missing
    or contradicting lengths.
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
    """Optimizer steps that a plan of so many rows has."""
    return n_rows // rows_per_step if drop_last else -(-n_rows // rows_per_step)


def count_rows(lengths: Lengths | None, n_rows: int | None) -> int:
    """Rows to plan for; ``ValueError`` where neither is given or the numbers differ."""
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
    """The random numbers of an epoch's plan."""
    sequence = np.random.SeedSequence([seed % 2**64, epoch])
    return np.random.RandomState(np.random.MT19937(sequence))


def _permutation(random: np.random.RandomState, count: int) -> Rows:
    """A random permutation of ``count`` numbers.

    Many of them are sorted by random keys: swapping numbers all over the memory misses the cache.
    Key and number share 64 bits, so a key has 40 of them for ten million numbers.
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

    A random permutation is cut into chunks of 50 steps; each chunk is sorted by (source, target)
    length, longest first, and cut into steps; the steps are shuffled, but the one with the
    longest row of all comes first, so that memory runs out at once or never.

    Two differences from fastai, both because a step's size must not change inside an epoch. The
    short step stays last. And the longest row is put into the first chunk (it swaps places in the
    permutation with the row there), where it lands in a full step if there is one; in fastai it
    can land in the short batch, which then comes first and shifts the cuts of all later ones.
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
    """A key for each row by which longer ones come first, the source before the target; its bits.

    As narrow as it can be: rows are looked up in a random order, which the cache should bear.
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

    Where key and place share 64 bits, sorting those is several times as fast.
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
    """Micro-batches that every rank runs for a step of so many rows."""
    return -(-n_rows // (world_size * rows_per_device))


def divide_step(rows: Rows, *, world_size: int, rows_per_device: int) -> list[list[Rows]]:
    """Divide a step: ``result[micro_batch][rank]`` are the rows of that rank.

    Every rank has the same number of micro-batches, the fewest that hold the rows. A full step
    gives every rank ``rows_per_device`` rows in each. In the short last step the sizes within a
    micro-batch differ by at most 1; a rank has none only where fewer rows than ranks are left.
    Rows stay in their order, so neighbours in length stay together.
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
    else:  # one row a device: an even spread would leave ranks idle before the rows run out
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

    Sorting wastes few pads and meets the largest batch at once; whoever uses the batches puts
    results back into data order by the row ids. With ``max_tokens`` a batch holds as many rows, up
    to ``rows_per_batch``, as have no more source and target tokens, pads included; as many in each
    of ``world_size`` batches that follow one another, but for the last.
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

    In a round every rank has the same number of rows, as collective operations need; in the last
    one, ids below 0 (``~row``) fill up and stand for rows that count nothing (see ``FillerRows``).
    With ``rows_per_rank`` every rank has exactly so many rows in every round.
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
