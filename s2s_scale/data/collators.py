"""Collators: rows of token ids as padded tensors, one pair per row or several packed into one.

Shapes: B rows, S the longest source, T the longest target, both rounded up to the requested
multiple; R packed rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from s2s_scale.data.samplers import MicroBatch
from s2s_scale.utils import IGNORE_INDEX

TARGET_SIDE = ("labels", "decoder_input_ids", "decoder_attention_mask")
SEGMENT_IDS = ("source_segment_ids", "target_segment_ids")
"""Names of the tensors that number the pairs of a packed row (see ``models.packed_attention``)."""

Collate = Callable[[Sequence[Mapping[str, Any]]], Any]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def column_of(rows: Sequence[Any], name: str) -> list[Any] | None:
    """A column of all rows; None if no row has it, ``ValueError`` if only some have it."""
    values = [row.get(name) for row in rows]
    missing = sum(value is None for value in values)
    if missing == len(values):
        return None
    if missing:
        raise ValueError(f"'{name}' is missing in {missing} of {len(values)} rows")
    return values


def flat_ids(values: Sequence[Any]) -> Ids:
    """Token ids given as lists, arrays or 1-D tensors, one after the other."""
    if all(isinstance(value, list) for value in values):
        count = sum(map(len, values))
        return np.fromiter(itertools.chain.from_iterable(values), dtype=np.int64, count=count)
    return np.concatenate([np.asarray(value, dtype=np.int64) for value in values])


def pad(ids: Ids, mask: Mask, value: int) -> Ids:
    """``ids`` at the places where ``mask`` [rows, width] is true, row by row, else ``value``.

    One flat fill, which is many times as fast as padding row by row.
    """
    padded = np.full(mask.shape, value, dtype=np.int64)
    padded[mask] = ids
    return padded


class Seq2SeqCollator:
    """Makes batches: input_ids and attention_mask [B, S], labels [B, T], all int64.

    A column that no row has is left out, and so are other columns, such as the text.
    decoder_input_ids, decoder_attention_mask and a given attention_mask are padded and kept.
    Values may be lists, numpy arrays or 1-D tensors.

    Args:
        pad_token_id: for input_ids and decoder_input_ids.
        label_pad_id: for labels.
        pad_to_multiple_of: S and T are multiples of this.
        padding_side: ``right`` or ``left``.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        label_pad_id: int = IGNORE_INDEX,
        pad_to_multiple_of: int | None = None,
        padding_side: str = "right",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: expected 'left' or 'right'")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of}: expected at least 1")
        self.pad_token_id = pad_token_id
        self.label_pad_id = label_pad_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_side = padding_side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises ``ValueError`` for no rows and for columns that only some rows have."""
        if not rows:
            raise ValueError("cannot make a batch of no rows")
        pads = {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "labels": self.label_pad_id,
            "decoder_input_ids": self.pad_token_id,
            "decoder_attention_mask": 0,
        }
        batch = {}
        for name, value in pads.items():
            column = column_of(rows, name)
            if column is None:
                continue
            mask = self._mask(column)
            batch[name] = pad(flat_ids(column), mask, value)
            if name == "input_ids":
                batch["attention_mask"] = mask.astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _mask(self, values: Sequence[Any]) -> Mask:
        """The places of the values once they are padded to one width."""
        lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
        multiple = self.pad_to_multiple_of or 1
        width = max(1, -(-int(lengths.max()) // multiple)) * multiple
        places = np.arange(width)
        if self.padding_side == "right":
            return places < lengths[:, None]
        return places >= width - lengths[:, None]


class PadToWidths:
    """A collator that pads the batches of another one to the widths of their micro-batch.

    Batches that are no ``MicroBatch``, or one without widths, are left unchanged. Columns of the
    target side get the target's width, all other columns of two dimensions the source's.
    """

    def __init__(self, collate: Collate, *, pad_token_id: int, padding_side: str = "right") -> None:
        self.collate = collate
        self.pads = {
            "input_ids": pad_token_id,
            "labels": IGNORE_INDEX,
            "decoder_input_ids": pad_token_id,
        }
        self.padding_side = padding_side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Raises ``ValueError`` for a batch that is wider than its widths."""
        batch = self.collate(rows)
        widths = rows.widths if isinstance(rows, MicroBatch) else None
        if widths is None:
            return batch
        for name, tensor in batch.items():
            if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
                continue
            width = widths[1] if name in TARGET_SIDE else widths[0]
            missing = width - tensor.shape[1]
            if missing < 0:
                raise ValueError(
                    f"'{name}' has {tensor.shape[1]} columns; expected at most {width}, the shape "
                    "that was planned from the rows' lengths: the lengths are wrong, or the "
                    "collator pads on its own; let it pad to the longest row"
                )
            sides = (missing, 0) if self.padding_side == "left" else (0, missing)
            batch[name] = torch.nn.functional.pad(tensor, sides, value=self.pads.get(name, 0))
        return batch


@dataclass(frozen=True)
class DecoderStart:
    """The decoder's first token of each pair: ``token``, or the pair's last label if None."""

    token: int | None


class PackedCollator:
    """Makes batches of packed rows, all int64: input_ids, attention_mask and source_segment_ids
    [R, S]; labels, decoder_input_ids and target_segment_ids [R, T].

    Segment ids are 1, 2, … along a row, and 0 for pads. Decoder inputs are the labels of each pair,
    shifted by one within it, unless the pairs bring their own. Positions that a pair's own
    attention_mask or decoder_attention_mask excludes count as pads.
    """

    def __init__(self, pad_token_id: int, *, start: DecoderStart) -> None:
        self.pad_token_id = pad_token_id
        self.start = start

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises ``ValueError`` for pairs without input_ids or labels, or with empty ones."""
        assert isinstance(pairs, MicroBatch), "expected a micro-batch of PackedSampler"
        assert pairs.counts is not None, "expected the number of pairs in each row"
        widths = pairs.widths or (None, None)
        source = _PackedSide(pairs, "input_ids", pairs.counts, widths[0])
        target = _PackedSide(pairs, "labels", pairs.counts, widths[1])
        segment_ids = source.segment_ids(pairs, "attention_mask")
        given = column_of(pairs, "decoder_input_ids")
        decoder_inputs = self._shifted(target) if given is None else flat_ids(given)
        batch = {
            "input_ids": pad(source.ids, source.mask, self.pad_token_id),
            "attention_mask": (segment_ids > 0).astype(np.int64),
            "labels": pad(target.ids, target.mask, IGNORE_INDEX),
            "decoder_input_ids": pad(decoder_inputs, target.mask, self.pad_token_id),
            SEGMENT_IDS[0]: segment_ids,
            SEGMENT_IDS[1]: target.segment_ids(pairs, "decoder_attention_mask"),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _shifted(self, target: _PackedSide) -> Ids:
        """The labels of each pair, shifted right by one."""
        clean = np.where(target.ids == IGNORE_INDEX, self.pad_token_id, target.ids)
        shifted = np.roll(clean, 1)
        if self.start.token is not None:
            shifted[target.starts] = self.start.token
        elif len(clean):
            last = np.add.reduceat(clean != self.pad_token_id, target.starts) - 1
            shifted[target.starts] = clean[target.starts + np.maximum(last, 0)]
        return shifted


class _PackedSide:
    """One side of packed rows: flat ids, the start of each pair, and the mask [R, width]."""

    def __init__(
        self, pairs: Sequence[Any], name: str, counts: Sequence[int], width: int | None
    ) -> None:
        values = column_of(pairs, name)
        if values is None and len(pairs):
            raise ValueError(f"packed rows need '{name}' in every pair; these have none")
        values = values or []
        self.ids = flat_ids(values)
        lengths = np.array([len(value) for value in values], dtype=np.int64)
        if (lengths == 0).any():
            raise ValueError(f"a pair has an empty '{name}': it cannot be part of a packed row")
        self.starts = np.cumsum(lengths) - lengths
        per_row = np.array(counts, dtype=np.int64)
        row_ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum(per_row)]
        filled = np.diff(row_ends, prepend=0)
        widest = max(1, int(filled.max(initial=0)))
        if width is not None and widest > width:
            raise ValueError(
                f"'{name}' has {widest} tokens in a packed row; expected at most {width}, as "
                "planned from the rows' lengths: these are wrong"
            )
        self.mask = np.arange(width or widest) < filled[:, None]
        numbers = np.arange(len(pairs)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        self._numbers = np.repeat(numbers + 1, lengths)

    def segment_ids(self, pairs: Sequence[Any], mask_name: str) -> Ids:
        """Each place's pair in its row, from 1; 0 for pads and where the pair's mask is 0."""
        mask = column_of(pairs, mask_name)
        return pad(self._numbers if mask is None else self._numbers * flat_ids(mask), self.mask, 0)


def count_pads(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Real source and target tokens of a batch, and their number with pads.

    Rows without a label count as pads. (0, 0) for a batch without attention_mask or labels.
    """
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not isinstance(mask, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return 0, 0
    counted = labels != IGNORE_INDEX
    real = mask[counted.any(dim=1)].sum() + counted.sum()
    return int(real), mask.numel() + labels.numel()
