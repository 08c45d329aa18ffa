"""The variables by which a rank knows itself, whichever program has started it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

STARTED_BY = "S2S_SCALE_STARTED_BY"
"""Environment variable: the runner whose variables name the rank. Without it they are left alone:
a batch script under Slurm is no rank, but has SLURM_PROCID."""

ALONE = "S2S_SCALE_ALONE"
"""Environment variable: this is a run's only process, which another one starts again if it dies."""

# Runner -> what it calls RANK, LOCAL_RANK and WORLD_SIZE.
NAMES = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mvapich": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
}


def adopt(environ: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE from the runner's own names, where it did not."""
    names = NAMES.get(environ.get(STARTED_BY, ""))
    if names is None or "RANK" in environ or names[0] not in environ:
        return
    for ours, theirs in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), names, strict=True):
        if theirs in environ:
            environ[ours] = environ[theirs]


def reporting_rank(environ: Mapping[str, str]) -> int | None:
    """As which rank this process says that it is done; None where nobody waits for that."""
    rank = environ.get("RANK") or ("0" if ALONE in environ else "")
    return int(rank) if rank.isdigit() else None
