"""Lays pairs out in packed rows, as tensors.

Shapes: R packed rows, S source tokens and T target tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from s2s_scale.data.collate import LABEL_PAD, flat_ids
from s2s_scale.data.packed_sampler import PackedExamples

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
