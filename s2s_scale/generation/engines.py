"""What can be said of generation engines before anything heavy is imported."""

from __future__ import annotations

import importlib.util

CTRANSLATE2_FAMILIES = ("bart", "mbart", "pegasus", "marian", "t5", "mt5")
ENGINE = "generation_engine=ctranslate2"


def package_problems() -> list[str]:
    """What is missing for CTranslate2, with its remedy."""
    if importlib.util.find_spec("ctranslate2") is not None:
        return []
    return [
        f"{ENGINE}: the package ctranslate2 is not installed; install it with "
        "pip install 's2s-scale[ctranslate2]', or leave --generation_engine out"
    ]


def family_problems(model_type: str) -> list[str]:
    """What keeps CTranslate2 from running models of this type, with its remedy."""
    if model_type in CTRANSLATE2_FAMILIES:
        return []
    return [
        f"{ENGINE}: has no converter for model type '{model_type}'; expected one of "
        f"{', '.join(CTRANSLATE2_FAMILIES)}; leave --generation_engine out"
    ]
