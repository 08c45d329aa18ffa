"""Private names of transformers that checkpoints rely on."""

from __future__ import annotations

from torch import nn

from s2s_scale.compat import relies_on


@relies_on(
    "transformers",
    checked=("5.17", "5.23"),
    reason="save_pretrained omits these keys and from_pretrained does not expect them, but no "
    "public name lists them.",
    uses={"transformers.PreTrainedModel._keys_to_ignore_on_save": None},
)
def keys_not_saved(model: nn.Module) -> set[str]:
    """Keys of ``model.state_dict()`` that ``save_pretrained`` omits, except tied ones."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())
