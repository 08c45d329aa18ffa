"""The packing plan: each pair once, no row over its room, few pads."""

import time

import numpy as np
import pytest

from s2s_scale.data.packing import lay_out, pack, widths_for
from tests.support.lengths import long_tailed, share_of_pads_at_random


def share_of_pads(lengths, rows, widths):
    real = sum(int(side.sum()) for side in lengths)
    return 1 - real / (len(rows) * sum(widths))


@pytest.mark.parametrize("tokens", [1_024, 2_048])
def test_long_tailed_pairs_leave_at_most_two_percent_pads(tokens):
    lengths = long_tailed(4_000)
    widths = widths_for(lengths, tokens)
    started = time.process_time()
    rows = pack(lengths, source_width=widths[0], target_width=widths[1])
    seconds = time.process_time() - started
    assert sorted(np.concatenate(rows).tolist()) == list(range(4_000))
    for row in rows:
        assert lengths[0][row].sum() <= widths[0] and lengths[1][row].sum() <= widths[1]
    pads, random = share_of_pads(lengths, rows, widths), share_of_pads_at_random(lengths)
    print(f"{tokens}: {len(rows)} rows of {widths}, {100 * pads:.2f} % pads, {seconds:.2f} s")
    assert pads < 0.02 < 0.6 < random


def test_the_plan_depends_on_the_lengths_alone():
    lengths = long_tailed(300)
    first = pack(lengths, source_width=400, target_width=400)
    again = pack(lengths, source_width=400, target_width=400)
    assert [row.tolist() for row in first] == [row.tolist() for row in again]


def test_pairs_that_fill_a_row_exactly_share_it():
    lengths = np.array([6, 4, 10]), np.array([2, 8, 10])
    rows = pack(lengths, source_width=10, target_width=10)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 1], [2]]


def test_a_pair_without_room_is_named():
    with pytest.raises(ValueError, match="pair 1 has 3 source and 9 target tokens"):
        pack((np.array([2, 3]), np.array([2, 9])), source_width=8, target_width=8)


def test_rows_are_laid_out_with_their_segments():
    tokens, segments = lay_out([[[5, 6, 2], [7, 2]], [[8, 2]]], padding=1, width=6)
    assert tokens.tolist() == [[5, 6, 2, 7, 2, 1], [8, 2, 1, 1, 1, 1]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
