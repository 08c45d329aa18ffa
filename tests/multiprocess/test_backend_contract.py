"""Every registered backend keeps what ``Backend`` promises, in one process and on two ranks."""

from __future__ import annotations

import pytest

from s2s_scale.backends import BACKENDS
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_contract(tmp_path, name, ranks):
    words = ["-m", "tests.support.contract_worker", name, str(tmp_path)]
    for rank, result in enumerate(run_ranks(words, ranks=ranks, folder=tmp_path)):
        assert result.code == 0, f"rank {rank}:\n{result.output}"
