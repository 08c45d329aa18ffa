"""What the batch plan costs and how few pads it leaves: ``python -m benchmarks.plan``.

Row lengths are drawn as in ``tests/support/lengths.py``: source log-normal with mean 26 and sigma
0.62, target 1.15 times as long with a log-normal factor of sigma 0.2; random batches of 32 of them
hold 68 % pads. Each mode and size has a process of its own, so that its peak memory is its own; the
first planning is looked at for memory, the next five for time (median). Growth is that since the
least number of rows.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table

from s2s_scale.config import DEFAULT_GROUPS_PER_STEP
from s2s_scale.data.batch_plan import Lengths
from s2s_scale.data.buckets import (
    choose_shapes,
    padded_to_longest,
    padded_to_powers,
    row_cost,
)
from s2s_scale.data.packing import PackedSampler
from s2s_scale.data.samplers import EpochSampler, PlanSampler, TokenSampler
from tests.support.lengths import long_tailed, share_of_pads_at_random

SIZES = (100_000, 1_000_000, 10_000_000)
RANKS = 8
REPEATS = 5
TOKENS_PER_STEP = 131_072
MODES = ("fixed", "sortish", "tokens", "tokens, 8 shapes", "packed", "packed, 1 shape")
ROWS = 200_000


def sampler_of(mode: str, lengths: Lengths, world_size: int = RANKS) -> EpochSampler:
    """A sampler of the mode, with about as many tokens in a step in all modes."""
    if mode in ("fixed", "sortish"):
        rows = max(1, TOKENS_PER_STEP // (56 * world_size))
        return PlanSampler(lengths, rows_per_device=rows, world_size=world_size, mode=mode)  # type: ignore[arg-type]
    if mode.startswith("packed"):
        return PackedSampler(
            lengths,
            tokens_per_step=TOKENS_PER_STEP,
            world_size=world_size,
            one_shape="shape" in mode,
        )
    return TokenSampler(
        lengths,
        tokens_per_step=TOKENS_PER_STEP,
        groups_per_step=DEFAULT_GROUPS_PER_STEP,
        world_size=world_size,
        num_buckets=8 if "shapes" in mode else None,
    )


def measure(mode: str, count: int) -> dict[str, float]:
    """Seconds and MiB of one epoch's plan over ``count`` rows, in this process."""
    lengths = long_tailed(count)
    first = sampler_of(mode, (lengths[0][:1000], lengths[1][:1000]))  # loads code, as a run has
    assert first.steps > 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # What was free when the peak so far was reached does not count: fill it up first.
    held = _fill(before)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = sampler_of(mode, lengths).plan.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del held
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        assert sampler_of(mode, lengths).plan.steps == steps
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "mib": (peak - before) / 1024,
        "steps": steps,
    }


def _fill(peak_kib: int) -> np.ndarray:
    """An array that brings the process's resident memory back up to its peak."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() // 1024
    return np.ones(max(0, peak_kib - resident) * 1024, dtype=np.uint8)


def costs(sizes: Iterable[int]) -> Table:
    """Seconds, memory and growth of the plans."""
    table = Table(title="planning one epoch")
    for name in ("mode", "rows", "steps", "seconds", "MiB", "s per 10⁶", "MiB per 10⁶", "growth"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode in MODES:
        earlier = None
        for count in sizes:
            command = [sys.executable, "-m", "benchmarks.plan", "--measure", mode, str(count)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output)
            growth = ""
            if earlier is not None:
                ratio = math.log(found["seconds"] / earlier[1]) / math.log(count / earlier[0])
                growth = f"n^{ratio:.2f}"
            earlier = earlier or (count, found["seconds"])
            table.add_row(
                mode,
                f"{count:,}",
                f"{found['steps']:,.0f}",
                f"{found['seconds']:.3f}",
                f"{found['mib']:.0f}",
                f"{found['seconds'] / count * 1e6:.2f}",
                f"{found['mib'] / count * 1e6:.0f}",
                growth,
            )
    return table


def shapes(lengths: Lengths) -> Table:
    """Real tokens where every row is padded to one of so many shapes."""
    table = Table(title=f"{len(lengths[0]):,} rows, each padded to one of a few shapes")
    table.add_column("shapes")
    table.add_column("real tokens", justify="right")
    table.add_row("1 (padding to the longest)", f"{padded_to_longest(lengths):.1%}")
    powers, count = padded_to_powers(lengths)
    table.add_row(f"{count} (powers of two)", f"{powers:.1%}")
    for number in (2, 4, 8, 16, 32, 48):
        share = choose_shapes(lengths, num_buckets=number).real_share(lengths)
        table.add_row(f"{number} (chosen from the lengths)", f"{share:.1%}")
    return table


def loads(lengths: Lengths) -> Table:
    """Share of pads, spread of the ranks' loads in a step, and milliseconds to divide a step."""
    at_random = share_of_pads_at_random(lengths)
    table = Table(
        title=f"{len(lengths[0]):,} rows on {RANKS} ranks, {TOKENS_PER_STEP:,} tokens a step; "
        f"random batches of 32 hold {at_random:.1%} pads"
    )
    for name in ("mode", "pads", "mean load spread", "worst", "ms per step"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode in MODES:
        table.add_row(mode, *_loads_of(sampler_of(mode, lengths), lengths))
    return table


def _loads_of(sampler: EpochSampler, lengths: Lengths) -> list[str]:
    spreads, real, padded = [], 0, 0
    started = time.perf_counter()
    steps = [list(sampler.divide(step)) for step in range(sampler.plan.steps)]
    milliseconds = (time.perf_counter() - started) * 1e3 / max(1, len(steps))
    for batches in steps[:-1]:  # a plan by rows leaves a short one at the end
        load = np.zeros(RANKS)
        for of_ranks in batches:
            for rank, batch in enumerate(of_ranks):
                padded += batch.padded_tokens(lengths)
                real += sum(int(side[batch.rows].sum()) for side in lengths)
                count, *widths = batch.shape(lengths)
                load[rank] += count * row_cost(np.array(widths))
        spreads.append(load.max() / load.mean() - 1)
    return [
        f"{1 - real / padded:.1%}",
        f"{np.mean(spreads):.2%}",
        f"{np.max(spreads):.2%}",
        f"{milliseconds:.1f}",
    ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="at most a million rows")
    parser.add_argument("--measure", nargs=2, metavar=("MODE", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        mode, count = options.measure
        print(json.dumps(measure(mode, int(count))))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    lengths = long_tailed(ROWS)
    console.print(costs(SIZES[: 2 if options.quick else 3]))
    console.print(shapes(lengths))
    console.print(loads(lengths))


if __name__ == "__main__":
    main()
