"""Devices in a mesh: the lengths of its axes, and how a weight is divided over one of them."""

from __future__ import annotations

from collections.abc import Mapping

from s2s_scale.errors import UserError

AXES = ("data", "fsdp")
"""Batches are divided by rows over both axes; weights over the second, if at all."""


def mesh_lengths(wanted: Mapping[str, int], devices: int) -> tuple[int, int]:
    """Lengths of the axes data and fsdp; -1 stands for all devices that the other leaves.

    Raises:
        UserError: an unknown axis, or lengths whose product is not the number of devices.
    """
    unknown = sorted(set(wanted) - set(AXES))
    lengths = [wanted.get(axis, 1) for axis in AXES]
    open_axes = [n for n, length in enumerate(lengths) if length == -1]
    if len(open_axes) == 1:
        lengths[open_axes[0]] = devices // lengths[1 - open_axes[0]]
    if unknown or len(open_axes) > 1 or lengths[0] * lengths[1] != devices:
        raise UserError(
            f"mesh: {dict(wanted)} for {devices} devices: expected the axes data and fsdp, whose "
            "lengths multiply to the number of devices (-1 for one of them: all that are left); "
            "change it in the profile"
        )
    return lengths[0], lengths[1]


def divided_dimension(shape: tuple[int, ...], parts: int) -> int | None:
    """The longest dimension that divides evenly into ``parts``; None where none does."""
    fitting = [n for n, length in enumerate(shape) if length % parts == 0 and length >= parts]
    return max(fitting, key=lambda n: shape[n]) if fitting and parts > 1 else None


def rows_dimension(shape: tuple[int, ...], rows: int | None) -> int:
    """Which of a hidden state's first two dimensions counts the batch's ``rows``; 0 in doubt."""
    return 1 if rows is not None and shape[0] != rows == shape[1] else 0
