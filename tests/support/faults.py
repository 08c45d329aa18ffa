"""Makes rank 1 of a run fail or hang when it gets a signal; the product knows nothing of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

RAISE, HANG = signal.SIGRTMIN, signal.SIGUSR2
MESSAGE = "made to fail"

# Python imports a module of this name at its start, if it finds one.
_SITECUSTOMIZE = f"""
import os, signal, time

def fail(number, frame):
    raise RuntimeError({MESSAGE!r})

def hang(number, frame):
    # In a training step: anywhere else, a save say, a rank may take its time.
    inside = frame
    while inside is not None and inside.f_code.co_name != "training_step":
        inside = inside.f_back
    if inside is None:
        signal.signal(signal.SIGALRM, hang)
        signal.setitimer(signal.ITIMER_REAL, 0.005)
    else:
        time.sleep(3600)

if os.environ.get("RANK") == "1":
    signal.signal({int(RAISE)}, fail)
    signal.signal({int(HANG)}, hang)
"""


def faulty_path(folder: Path) -> str:
    """A PYTHONPATH under which rank 1 takes both signals."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE, encoding="utf-8")
    before = os.environ.get("PYTHONPATH")
    return f"{folder}{os.pathsep}{before}" if before else str(folder)
