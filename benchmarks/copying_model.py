"""A BART whose weights were written by hand so that it copies its source, and ends where that ends.

So that outputs have whatever lengths the sources have, without training, at every size: with random
weights a model ends nowhere, and all rows run into the limit.

Width D, H heads of D / H. The first half of a hidden state holds the token, the second half the
position. In the last decoder layer every head looks, by position, at the source token that is next
and writes its part of that token's embedding into the first half, much larger than what is there;
the output projection, tied to the embeddings, then finds the token. All other layers compute
as always and add a little noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

SHARPNESS = 60.0
"""Difference of the scores of the right position and of others, about: attention is near 0 or 1."""
LOUDNESS = 8.0
"""How much larger the copied token is than the one that stood there."""
NOISE = 0.02


def copying_model(
    *, width: int, layers: int, vocabulary: int, positions: int = 1024, seed: int = 0
) -> BartForConditionalGeneration:
    """The model, in fp32 and in evaluation mode; it ends after copying the end token (id 2)."""
    torch.manual_seed(seed)
    heads = max(1, width // 64)
    sizes = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
    sides = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()
    }
    config = BartConfig(
        d_model=width,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        dropout=0.0,
        forced_eos_token_id=None,
        **sides,
    )
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        _write(model, width, heads)
    return model.requires_grad_(False)


def _write(model: BartForConditionalGeneration, width: int, heads: int) -> None:
    half = width // 2
    tokens: Tensor = model.model.shared.weight
    tokens.normal_(std=1.0)[:, half:] = 0.0
    for side in (model.model.encoder, model.model.decoder):
        places = side.embed_positions.weight
        places.zero_()[:, half:] = _sinusoids(len(places), half)
        for layer in side.layers:
            for attention in (layer.self_attn, getattr(layer, "encoder_attn", None)):
                if attention is not None:
                    attention.out_proj.weight.normal_(std=NOISE / math.sqrt(width))
            layer.fc2.weight.normal_(std=NOISE / math.sqrt(width))
    _copy_by_position(model.model.decoder.layers[-1].encoder_attn, width, heads)


def _copy_by_position(attention: torch.nn.Module, width: int, heads: int) -> None:
    """Each head looks at its own position and brings its part of the token that is there."""
    half, size = width // 2, width // heads
    scale = math.sqrt(SHARPNESS)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        projection.weight.zero_()
    # What a head compares: as many of the position's numbers as it has room for.
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        compared = min(size, half)
        for projection in (attention.q_proj, attention.k_proj):
            block = projection.weight[rows]
            block[:compared, half : half + compared] = scale * torch.eye(compared)
        part = slice(head * size // 2, (head + 1) * size // 2)
        attention.v_proj.weight[head * size : head * size + size // 2, part] = torch.eye(size // 2)
        attention.out_proj.weight[part, head * size : head * size + size // 2] = (
            LOUDNESS * torch.eye(size // 2)
        )


def _sinusoids(count: int, width: int) -> Tensor:
    """[count, width]: nearby positions differ already in the first numbers."""
    frequencies = torch.exp(-torch.arange(width // 2) * (math.log(1000.0) / 32))
    angles = torch.arange(count)[:, None] * math.pi * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
