"""What every backend uses of the private parts of torch."""

from __future__ import annotations

import sys

from s2s_scale.compat import relies_on


@relies_on(
    "torch",
    checked=("2.9", "2.13"),
    reason="torch.compile has no public count of its graphs and of the time they took",
    uses={
        "torch._dynamo.utils.counters": None,
        "torch._dynamo.utils.compilation_time_metrics": None,
    },
)
def dynamo_compilations() -> tuple[int, float]:
    """Graphs that ``torch.compile`` has made in this process, and the seconds they took."""
    # transformers has imported it; where nothing was compiled, it has counted nothing.
    counted = sys.modules.get("torch._dynamo.utils")
    if counted is None:
        return 0, 0.0
    seconds = counted.compilation_time_metrics.get("_compile.compile_inner", ())
    return int(counted.counters["stats"]["unique_graphs"]), float(sum(seconds))
