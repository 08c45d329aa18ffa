"""Private parts of ``datasets`` that the data pipeline reads."""

from __future__ import annotations

from typing import Any

from s2s_scale.compat import relies_on

_USES = {"datasets.Dataset": ("arrow_table", "info", "split", "indices_table", "fingerprint")}
"""Both attributes are arguments of the constructor, which keeps them under these names."""


@relies_on(
    "datasets",
    checked=("5.2", "5.2"),
    reason="Only its fingerprint tells whether a data set is still as it was loaded.",
    uses=_USES,
)
def fingerprint_of(dataset: Any) -> str | None:
    """The fingerprint of a ``datasets.Dataset``; None for any other data set."""
    return getattr(dataset, "_fingerprint", None)


@relies_on(
    "datasets",
    checked=("5.2", "5.2"),
    reason="No public name tells whether rows are looked up by way of an index mapping.",
    uses=_USES,
)
def has_indices(dataset: Any) -> bool:
    """Whether a ``datasets.Dataset`` is a selection of the rows of its table."""
    return dataset._indices is not None
