"""Private names of accelerate that parity runs rely on."""

from __future__ import annotations

from accelerate.state import AcceleratorState

from s2s_scale.compat import relies_on


@relies_on(
    "accelerate",
    checked=("1.10", "1.15"),
    reason="accelerate keeps its settings for the whole process, but every case needs its own",
    uses={"accelerate.state.AcceleratorState._reset_state": ("reset_partial_state",)},
)
def forget_accelerate_settings() -> None:
    """Let the next trainer of this process choose its own settings."""
    AcceleratorState._reset_state()
