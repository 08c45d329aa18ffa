"""Pads rows of token ids into tensors.

Shapes: B rows, S the longest source, T the longest target, both rounded up to the multiple asked
for.

Lays pairs out in packed rows, as tensors.

Shapes: R packed rows, S source tokens and T target tokens of the longest row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from s2s_scale.data.packing import PackedExamples

LABEL_PAD = -100
TARGET_SIDE = ("labels", "decoder_input_ids", "decoder_attention_mask")

Collate = Callable[[Sequence[Mapping[str, Any]]], Any]


class Seq2SeqCollator:
    """Makes a batch: input_ids and attention_mask [B, S], labels [B, T], all int64.

    Only the columns that the rows have are made; others, such as the text, are left out.
    decoder_input_ids, decoder_attention_mask and a given attention_mask are padded and kept.
    Values may be lists, numpy arrays or 1-D tensors. One flat numpy fill for each column, which is
    many times faster than padding row by row.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        label_pad_id: int = -100,
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
        for name, pad in pads.items():
            values = [row.get(name) for row in rows]
            missing = sum(value is None for value in values)
            if missing == len(values):
                continue
            if missing:
                raise ValueError(f"'{name}' is missing in {missing} of {len(values)} rows")
            batch[name], mask = self._pad(values, pad)
            if name == "input_ids":
                batch["attention_mask"] = mask.astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _pad(
        self, values: Sequence[Any], pad: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The values padded to one width, and where they stand."""
        lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
        multiple = self.pad_to_multiple_of or 1
        width = max(1, -(-int(lengths.max()) // multiple)) * multiple
        places = np.arange(width)
        if self.padding_side == "right":
            mask = places < lengths[:, None]
        else:
            mask = places >= width - lengths[:, None]
        array = np.full((len(values), width), pad, dtype=np.int64)
        array[mask] = flat_ids(values, int(lengths.sum()))
        return array, mask


def count_pads(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Real source and target tokens of a batch, and their number with pads.

    Rows without a label hold pads alone. (0, 0) for a batch without attention_mask or labels.
    """
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not isinstance(mask, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return 0, 0
    counted = labels != LABEL_PAD
    real = mask[counted.any(dim=1)].sum() + counted.sum()
    return int(real), mask.numel() + labels.numel()


class PadToWidths:
    """A collator that pads what another one made to the widths its rows came with.

    Rows without widths (see ``ShapedRows``) are left as the other collator made them. Columns of
    the target side get the target's width, all others of two dimensions the source's.
    """

    def __init__(self, collate: Collate, *, pad_token_id: int, padding_side: str = "right") -> None:
        self.collate = collate
        self.pads = {
            "input_ids": pad_token_id,
            "labels": LABEL_PAD,
            "decoder_input_ids": pad_token_id,
        }
        self.padding_side = padding_side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Raises ``ValueError`` for a batch that is wider than its widths."""
        batch = self.collate(rows)
        widths = getattr(rows, "widths", None)
        if widths is None:
            return batch
        for name, tensor in batch.items():
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2:
                width = widths[1] if name in TARGET_SIDE else widths[0]
                batch[name] = self._padded(name, tensor, width)
        return batch

    def _padded(self, name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
        missing = width - tensor.shape[1]
        if missing < 0:
            raise ValueError(
                f"'{name}' has {tensor.shape[1]} columns; expected at most {width}, the shape that "
                "was planned from the rows' lengths: those do not tell the truth, or the collator "
                "pads by itself; let it pad to the longest row"
            )
        sides = (missing, 0) if self.padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(tensor, sides, value=self.pads.get(name, 0))


def flat_ids(values: Sequence[Any], count: int) -> npt.NDArray[np.int64]:
    """Lists, arrays or 1-D tensors of token ids, ``count`` ids in all, in one row."""
    if all(isinstance(value, list) for value in values):
        return np.fromiter(itertools.chain.from_iterable(values), dtype=np.int64, count=count)
    return np.concatenate([np.asarray(value, dtype=np.int64) for value in values])


SEGMENTS = ("source_segments", "target_segments")
"""Names of the tensors that say which pair each position belongs to (see ``models.packed``)."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DecoderStart:
    """The decoder's first token of each pair: ``token``, or the pair's last label where None."""

    token: int | None


class PackedCollator:
    """Makes a batch of packed rows, all int64: input_ids, attention_mask and source_segments
    [R, S]; labels, decoder_input_ids and target_segments [R, T].

    Segments are 1, 2, … along a row, and 0 for pads. Decoder inputs are the labels of each pair,
    shifted by one inside it, unless the pairs bring their own. Positions that a pair's own
    attention_mask or decoder_attention_mask leaves out count as pads.
    """

    def __init__(self, pad_token_id: int, *, start: DecoderStart) -> None:
        self.pad_token_id = pad_token_id
        self.start = start

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises ``ValueError`` for pairs without input_ids or labels, or with empty ones."""
        assert isinstance(pairs, PackedExamples), "the packed plan's sampler says the rows"
        counts = np.array(pairs.counts, dtype=np.int64)
        widths = pairs.widths or (None, None)
        source = _Side(pairs, "input_ids", counts, width=widths[0])
        target = _Side(pairs, "labels", counts, width=widths[1])
        segments = source.segments(_column(pairs, "attention_mask"))
        batch = {
            "input_ids": source.laid_out(source.ids, self.pad_token_id),
            "attention_mask": (segments > 0).astype(np.int64),
            "labels": target.laid_out(target.ids, LABEL_PAD),
            "decoder_input_ids": target.laid_out(
                self._decoder_inputs(pairs, target), self.pad_token_id
            ),
            SEGMENTS[0]: segments,
            SEGMENTS[1]: target.segments(_column(pairs, "decoder_attention_mask")),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _decoder_inputs(self, pairs: PackedExamples, target: _Side) -> Ids:
        given = _column(pairs, "decoder_input_ids")
        if given is not None:
            return given
        clean = np.where(target.ids == LABEL_PAD, self.pad_token_id, target.ids)
        shifted = np.roll(clean, 1)
        if self.start.token is not None:
            shifted[target.starts] = self.start.token
        elif len(clean):
            last = np.add.reduceat(clean != self.pad_token_id, target.starts) - 1
            shifted[target.starts] = clean[target.starts + np.maximum(last, 0)]
        return shifted


class _Side:
    """Where the tokens of one side stand: all pairs' ids in a row, and the place of each."""

    def __init__(
        self, pairs: Sequence[Any], name: str, counts: Ids, *, width: int | None = None
    ) -> None:
        ids = _column(pairs, name)
        if ids is None and len(pairs):
            raise ValueError(f"packed rows need '{name}' in every pair; these have none")
        self.ids = ids if ids is not None else np.zeros(0, np.int64)
        lengths = np.array([len(pair[name]) for pair in pairs], dtype=np.int64)
        if (lengths == 0).any():
            raise ValueError(f"a pair has an empty '{name}': it cannot stand in a packed row")
        self.starts = np.cumsum(lengths) - lengths
        row_ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum(counts)]
        filled = np.diff(row_ends, prepend=0)
        widest = max(1, int(filled.max(initial=0)))
        if width is not None and widest > width:
            raise ValueError(
                f"'{name}' has {widest} tokens in a packed row; expected at most {width}, as "
                "planned from the rows' lengths: those do not tell the truth"
            )
        self.places = np.arange(width or widest) < filled[:, None]
        numbers = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._numbers = np.repeat(numbers + 1, lengths)

    def laid_out(self, values: Ids, padding: int) -> Ids:
        """One value for each token, at the tokens' places, and ``padding`` elsewhere."""
        array = np.full(self.places.shape, padding, dtype=np.int64)
        array[self.places] = values
        return array

    def segments(self, mask: Ids | None) -> Ids:
        """The pair's number in its row at each place; 0 for pads and where ``mask`` is 0."""
        return self.laid_out(self._numbers if mask is None else self._numbers * mask, 0)


def _column(pairs: Sequence[Any], name: str) -> Ids | None:
    """A column of all pairs, one after the other; None where none has it."""
    values = [pair[name] for pair in pairs if pair.get(name) is not None]
    if not values:
        return None
    if len(values) < len(pairs):
        missing = len(pairs) - len(values)
        raise ValueError(f"'{name}' is missing in {missing} of {len(pairs)} pairs")
    return flat_ids(values, sum(map(len, values)))
