"""``doctor --parity``: the profile's launcher, its backend, and the table."""

from __future__ import annotations

import pytest

from tests.support.command import run_command


@pytest.mark.parametrize("profile", ["cpu-ddp", "cpu-zero3"])
def test_a_profile_computes_what_one_process_computes(tmp_path, profile):
    outcome = run_command("doctor", "--profile", profile, "--parity", "--output_dir", tmp_path)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "10 steps on 2 ranks against one process" in outcome.out
    assert "problem" not in outcome.out
    assert list(tmp_path.iterdir()) == []
