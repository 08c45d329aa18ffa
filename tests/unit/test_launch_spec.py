"""Ranks that MPI or Slurm has started know themselves by other names."""

from __future__ import annotations

import pytest

from s2s_scale.launch.spec import RANK_VARIABLES, STARTED_BY, set_rank_env


@pytest.mark.parametrize("runner", sorted(RANK_VARIABLES))
def test_a_runners_names_become_ours(runner):
    environ = {
        STARTED_BY: runner,
        **dict(zip(RANK_VARIABLES[runner], ("3", "1", "8"), strict=True)),
    }
    set_rank_env(environ)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("3", "1", "8")


def test_a_batch_script_is_no_rank():
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    set_rank_env(environ)
    assert "RANK" not in environ


def test_what_is_there_stays():
    environ = {STARTED_BY: "slurm", "SLURM_PROCID": "3", "RANK": "0"}
    set_rank_env(environ)
    assert environ["RANK"] == "0"
