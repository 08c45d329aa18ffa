"""What ranks import, imported once: preloaded by the fork server of ``tests.support.ranks``.

A fresh process imports torch, transformers and the rest for six seconds; a fork starts at once.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os

MODULES = (
    "s2s_scale.runner.train",
    "s2s_scale.runner.generate",
    "s2s_scale.launch.launchers",
    "s2s_scale.resilience.supervisor",
    "s2s_scale.settings.build",
    "s2s_scale.backends.base",
    "torch.distributed",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
    "transformers.generation.utils",
    "matplotlib.figure",
    "sacrebleu",
    "rouge_score.rouge_scorer",
    "datasets",
    "accelerate",
    "pytest",
    "tests.support.ranks",
)
OPTIONAL = ("deepspeed", "fairscale.optim.oss", "torch_xla")
"""Loaded where they are installed."""

# The server inherits the variables of the test that happened to come first; each rank gets its own.
os.environ.update(OMP_NUM_THREADS="1", USE_TORCH_XLA="0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
for _name in MODULES:
    importlib.import_module(_name)
for _name in OPTIONAL:
    if importlib.util.find_spec(_name.partition(".")[0]) is not None:
        importlib.import_module(_name)
gc.collect()
gc.freeze()  # DeepSpeed collects garbage often: not among all that was imported
