"""The fastest matrix products that this machine's torch makes: the limit that MFU is held against.

Also how many floating-point operations a model's training takes for rows of given lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.fresh import CLOCKS
from s2s_scale.data.batch_plan import Lengths

SHAPES = ((4096, 512, 512), (4096, 512, 2048), (2048, 2048, 2048))
GPU_SHAPES = ((8192, 8192, 8192),)
SECONDS = 0.3


def measure_peaks(settings: tuple[str, str]) -> dict[str, float]:
    """FLOP/s of the best shape: fp32 by torch's default path and by oneDNN's, and bf16.

    ``settings``: device and clock, such as ("cpu", "wall").
    """
    device, clock = settings
    shapes = GPU_SHAPES if device == "cuda" else SHAPES
    found = {}
    for name, dtype, precision in (
        ("fp32", torch.float32, "highest"),
        ("fp32, 'medium'", torch.float32, "medium"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        found[name] = max(_rate(shape, dtype, device, clock) for shape in shapes)
    torch.set_float32_matmul_precision("highest")
    return found


def _rate(shape: tuple[int, int, int], dtype: torch.dtype, device: str, clock: str) -> float:
    m, k, n = shape
    left = torch.randn(m, k, device=device, dtype=dtype)
    right = torch.randn(n, k, device=device, dtype=dtype)
    return 2 * m * k * n / _best(lambda: torch.nn.functional.linear(left, right), device, clock)


def _best(run: Callable[[], Any], device: str, clock: str) -> float:
    """Seconds of the fastest of some calls."""
    now = CLOCKS[clock]
    best, spent = float("inf"), 0.0
    while spent < SECONDS:
        started = now()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = now() - started
        best, spent = min(best, seconds), spent + seconds
    return best


def training_flops(config: Any, lengths: Lengths) -> float:
    """Floating-point operations of forward and backward pass over rows of these lengths.

    Matrix products of real tokens alone: pads cost time and do not count. A multiply and an add
    are two; the backward pass takes twice the forward's. The decoder's self-attention looks at
    half of the positions on average.
    """
    width = config.d_model
    inner = getattr(config, "num_heads", 0) * getattr(config, "d_kv", 0) or width
    encoder_ffn = getattr(config, "encoder_ffn_dim", None) or config.d_ff
    decoder_ffn = getattr(config, "decoder_ffn_dim", None) or config.d_ff
    encoders = getattr(config, "encoder_layers", None) or config.num_layers
    decoders = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    source, target = (side.astype(np.float64) for side in lengths)
    per_source = 4 * width * inner + 2 * width * encoder_ffn
    encoder = encoders * (source * per_source + 2 * inner * source**2)
    per_target = 6 * width * inner + 2 * width * decoder_ffn
    looking = inner * target**2 + 2 * inner * source * target
    decoder = decoders * (target * per_target + source * 2 * width * inner + looking)
    projection = target * width * config.vocab_size
    return float(3 * 2 * (encoder + decoder + projection).sum())
