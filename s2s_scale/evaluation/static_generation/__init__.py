"""Greedy and beam search in tensors of fixed shapes, for devices that compile each new shape.

``settings`` reads the options as transformers' ``generate`` does and refuses those that cannot be
static, ``rules`` are its logits processors over tokens of a fixed length, ``decoding`` runs encoder
and decoder over caches of a fixed length, ``greedy`` and ``beam`` choose tokens, and ``generator``
holds the loop.
"""

from __future__ import annotations

from s2s_scale.evaluation.static_generation.generator import StaticGenerator, static_width

__all__ = ["StaticGenerator", "static_width"]
