"""Private parts of transformers that the models rely on."""

from __future__ import annotations

from transformers import PreTrainedConfig

from s2s_scale.compat import relies_on


@relies_on(
    "transformers",
    checked=("5.17", "5.23"),
    reason="No public name tells which attention function a model calls.",
    uses={"transformers.PreTrainedConfig._attn_implementation": None},
)
def attention_of(config: PreTrainedConfig) -> str | None:
    """Name of the attention function, such as ``sdpa``; None for a model with code of its own."""
    return getattr(config, "_attn_implementation", None)
