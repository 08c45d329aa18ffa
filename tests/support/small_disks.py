"""Runs commands on disks that are too small, or that turn read-only while they are written to.

    unshare -rm python -m tests.support.small_disks SPEC

``SPEC`` is a JSON file: ``folder`` is where each disk is mounted, ``runs`` is a list of ``name``,
``words`` (the command line), ``size_kib``, and ``lock`` (turn read-only once this path is there).
Of each run the exit code and the output go to ``<SPEC's folder>/<name>.json`` and what was on the
disk to the folder ``<name>`` beside it. All runs share a process, since starting one is dear; the
mounts are seen by it alone and are gone when it ends.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from s2s_scale import cli


def main(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    disk = Path(spec["folder"])
    for run in spec["runs"]:
        result = _run(disk, run)
        (spec_file.parent / f"{run['name']}.json").write_text(json.dumps(result), encoding="utf-8")
        shutil.copytree(disk, spec_file.parent / run["name"])
        subprocess.run(["umount", str(disk)], check=True)


def _run(disk: Path, run: dict[str, Any]) -> dict[str, Any]:
    size = f"size={run['size_kib']}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(disk)], check=True)
    over = threading.Event()
    if "lock" in run:
        threading.Thread(target=_lock, args=(disk, Path(run["lock"]), over), daemon=True).start()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(run["words"])
    over.set()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def _lock(disk: Path, sign: Path, over: threading.Event) -> None:
    """Turn the disk read-only once ``sign`` is there.

    Its own mount stays writable for files that are open, as the run's lock is all the time: it is
    covered by a second one that is not.
    """
    while not over.is_set():
        if sign.exists():
            subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
            return
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
