"""Functions of the tests on several ranks: one way there and back, a hard limit on the time.

A test calls ``run_ranks("MODULE:FUNCTION", job, …)``. Each rank is ``python -m tests.support.worker
MODULE:FUNCTION FOLDER``: it opens the job's backend, calls ``FUNCTION(backend, job, folder)``,
writes what that returned as JSON, and closes the backend. An exception ends the rank with its
traceback and code 1.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import ranks as processes

LIMIT_SECONDS = 180.0
FAILED_SECONDS = 10.0
"""How long the others have left once a rank has failed."""
JOBS = "jobs.json"


def run_ranks(work: str, job: Mapping[str, Any], *, folder: Path, **more: Any) -> list[Any]:
    """``work`` on so many ranks; what it returned on each. ``more``: as for ``run_jobs``."""
    return [results["."] for results in run_jobs(work, {".": job}, folder=folder, **more)]


def run_jobs(
    work: str,
    jobs: Mapping[str, Mapping[str, Any]],
    *,
    folder: Path,
    ranks: int = 1,
    limit: float = LIMIT_SECONDS,
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> list[dict[str, Any]]:
    """Several jobs, one after the other, in the same processes: starting one costs more than a job.

    Args:
        work: ``MODULE:FUNCTION``; called with the backend, the job and ``folder / its name``, which
            need not exist. What it returns must go into JSON.
        jobs: name -> job, which must go into JSON. ``backend`` in it is one of ours, with ``:AXIS``
            for a mesh of one axis (else "local"); ``device`` is where it computes (else "cpu").
        folder: gets the logs and results of the ranks.
        limit: seconds until all ranks are ended.
        environment: variables beside those of this process and of the launcher.
        python: an interpreter that is started anew for each rank, instead of a fork.

    Returns:
        Of each rank, name -> what the function returned there.

    Raises:
        AssertionError: a rank failed or ran too long; the message holds what each had printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOBS).write_text(json.dumps(jobs), encoding="utf-8")
    started = processes.start(
        "tests.support.worker",
        [work, folder.resolve()],
        ranks=ranks,
        folder=folder,
        environment=environment,
        python=python,
    )
    codes = processes.wait(started, limit=limit, grace=FAILED_SECONDS)
    assert codes == [0] * ranks, "\n".join(
        f"rank {number} ended with {code}:\n{rank.text}"
        for number, (rank, code) in enumerate(zip(started, codes, strict=True))
    )
    files = [folder / f"rank-{number}.json" for number in range(ranks)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def main(work: str, folder: Path) -> None:
    """Do the jobs in ``folder`` on this rank, each under its backend, which is opened once."""
    from s2s_scale.backends import Backend, make_backend
    from s2s_scale.doctor.compat import forget_accelerate_settings

    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    jobs: dict[str, dict[str, Any]] = json.loads((folder / JOBS).read_text(encoding="utf-8"))
    backends: dict[tuple[str, str], Backend] = {}
    results = {}
    try:
        for name, job in jobs.items():
            wanted = job.get("backend", "local"), job.get("device", "cpu")
            if wanted not in backends:
                kind, _, axis = wanted[0].partition(":")
                backend = make_backend(kind, wanted[1], {axis: -1} if axis else None)
                assert (problems := list(backend.problems())) == [], problems
                backend.prepare_process()
                backends[wanted] = backend
            # What a job leaves in this process and would make the next one another kind of run.
            forget_accelerate_settings()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
            gc.collect()
            results[name] = function(backends[wanted], job, folder / name)
        (folder / f"rank-{os.environ['RANK']}.json").write_text(
            json.dumps(results), encoding="utf-8"
        )
    finally:
        for backend in backends.values():
            backend.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
