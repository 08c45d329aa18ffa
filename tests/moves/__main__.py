"""``python -m tests.moves``: every backend's checkpoint, continued under every backend.

Prints the largest relative deviation of loss, gradient norm and final weights of steps 11 to 20
from the run that was never interrupted. Exit code 1 where one is above 1e-5. With ``--xla_python``,
the interpreter of an environment with torch-xla, also under the XLA profiles, on virtual devices.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.moves.matrix import (
    BOUND,
    SOURCES,
    TARGETS,
    XLA_SOURCES,
    XLA_TARGETS,
    Move,
    moves,
)


def main() -> int:
    """Run the matrix and print it as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.moves", description=__doc__)
    parser.add_argument("--xla_python", help="such as .venv-xla/bin/python (make install-xla)")
    xla_python = parser.parse_args().xla_python
    sides = (SOURCES, TARGETS)
    if xla_python:
        sides = ((*SOURCES, *XLA_SOURCES), (*TARGETS, *XLA_TARGETS))
    found: list[Move] = []
    with tempfile.TemporaryDirectory(prefix="s2s-scale-moves-") as scratch:
        running = moves(
            Path(scratch),
            sources=sides[0],
            targets=sides[1],
            xla_python=xla_python or sys.executable,
        )
        for move in running:
            print(_side(move.source), _side(move.target), f"{move.worst:.0e}", file=sys.stderr)
            found.append(move)
    sources = list(dict.fromkeys(move.source for move in found))
    targets = list(dict.fromkeys(move.target for move in found))
    cells = {(move.source, move.target): f"{move.worst:.0e}" for move in found}
    rows = [["read by \\ written by", *map(_side, sources)], ["---"] * (len(sources) + 1)]
    rows += [[_side(t), *(cells[s, t] for s in sources)] for t in targets]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    good = all(move.worst <= BOUND for move in found)
    print(f"{len(found)} moves, all within {BOUND:g}: {'yes' if good else 'NO'}")
    return 0 if good else 1


def _side(side: tuple[str, int]) -> str:
    return f"{side[0]} x {side[1]}"


if __name__ == "__main__":
    sys.exit(main())
