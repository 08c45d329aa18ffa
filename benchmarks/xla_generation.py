"""Generation on XLA, ours and transformers': ``python -m benchmarks.xla_generation``.

For each search: seconds until the first batch is there, the compilations that it took, and rows per
second over the batches after it, which are of the same shape. Needs torch-xla; runs on virtual
devices on the CPU unless PJRT_DEVICE says otherwise. Each line is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_for

ROWS, WIDTH, NEW_TOKENS, LATER_BATCHES = 8, 16, 12, 5
SEARCHES = {"greedy": 1, "4 beams": 4}
WAYS = ("s2s-scale", "transformers")


def measure(way: str, num_beams: int) -> dict[str, float]:
    """The figures of one way; call it once per process, before anything is compiled."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ["XLA_PERSISTENT_CACHE_PATH"] = ""
    from s2s_scale.backends import make_backend

    backend = make_backend("xla", os.environ["PJRT_DEVICE"].lower(), {})
    backend.prepare_process()
    from s2s_scale.generation.static import StaticGenerator
    from tests.support.ended import sources
    from tests.support.families import tiny_model

    model = tiny_model("t5", layers=2, d_model=64, vocab_size=512)
    batches = [sources(model, ROWS, seed=n, width=WIDTH) for n in range(LATER_BATCHES + 1)]
    backend.place_model(model)
    generator = StaticGenerator(model, sync=backend.flush, to_host=backend.collectives.to_host)
    generate: Any = generator.generate if way == WAYS[0] else model.generate

    def run(batch: Any) -> None:
        options = {"max_new_tokens": NEW_TOKENS, "num_beams": num_beams}
        generate(**backend.place_batch(batch), **options).cpu()

    before, started, cpu = backend.compilations()[0], time.perf_counter(), time.process_time()
    run(batches[0])
    first, first_cpu = time.perf_counter() - started, time.process_time() - cpu
    compilations = backend.compilations()[0] - before
    started = time.perf_counter()
    for batch in batches[1:]:
        run(batch)
    rate = ROWS * LATER_BATCHES / (time.perf_counter() - started)
    later = backend.compilations()[0] - before - compilations
    return {
        "first": first,
        "cpu": first_cpu,
        "compilations": compilations,
        "later": later,
        "rate": rate,
    }


def main() -> None:
    """Print the table; with ``--measure``, one line's figures as JSON."""
    parser = parser_for("xla_generation", __doc__)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "BEAMS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    title = (
        f"2-layer T5, batches of {ROWS} rows x {WIDTH} source tokens, {NEW_TOKENS} new tokens; "
        f"{LATER_BATCHES} batches after the first"
    )
    table = Table(title=title, title_justify="left")
    for name in ("search", "way", "seconds to first batch", "of processor time"):
        table.add_column(name, justify="left" if name in ("search", "way") else "right")
    for name in ("compilations", "in later batches", "rows per second"):
        table.add_column(name, justify="right")
    for search, num_beams in SEARCHES.items():
        firsts = []
        for way in WAYS:
            words = [sys.executable, "-m", "benchmarks.xla_generation"]
            words += ["--measure", way, str(num_beams)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            firsts.append(found)
            table.add_row(
                search,
                way,
                f"{found['first']:.1f}",
                f"{found['cpu']:.1f}",
                f"{found['compilations']:.0f}",
                f"{found['later']:.0f}",
                f"{found['rate']:.0f}",
            )
        ours, theirs = firsts
        table.add_row(
            search,
            "sooner by",
            f"{theirs['first'] / ours['first']:.0f}x",
            f"{theirs['cpu'] / ours['cpu']:.0f}x",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
