"""What a test may see of the machine and of whoever started it: next to nothing.

Users train in the checkout that they test, under variables of their own. A test that reads either
says something about that user's runs and not about the code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Variables that are handed on: what finds programs and scratch space, what pytest and coverage
#: have set, and what chooses a processor's kernels.
HANDED_ON = frozenset(
    """
    PATH LD_LIBRARY_PATH LANG LANGUAGE TZ TERM USER LOGNAME SHELL TMPDIR VIRTUAL_ENV
    CC CXX CUDA_HOME
    CI PY_COLORS RENEW_GOLDEN
    ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA MKL_ENABLE_INSTRUCTIONS
    """.split()
)
HANDED_ON_PREFIXES = ("LC_", "PYTHON", "PYTEST_", "COV_", "COVERAGE_", "HYPOTHESIS_")


def surroundings(environ: Mapping[str, str], *, own: Path, caches: Path) -> dict[str, str]:
    """The variables of every test, and of every command that a test starts.

    Args:
        environ: the variables of whoever started the tests.
        own: an empty folder of this process; home, configuration and the product's cache lie there.
        caches: a folder that outlives the tests, for what other libraries build once: DeepSpeed's
            operators, matplotlib's list of fonts.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name in HANDED_ON or name.startswith(HANDED_ON_PREFIXES)
    }
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {
        **kept,
        "HOME": str(own / "home"),
        "XDG_CONFIG_HOME": str(own / "config"),
        "S2S_SCALE_CACHE": str(own / "cache"),
        "TORCH_EXTENSIONS_DIR": str(caches / "torch_extensions"),
        "MPLCONFIGDIR": str(caches / "matplotlib"),
        "PYTHONPATH": path,  # `python -m tests.…` works in any folder
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "USE_TORCH_XLA": "0",  # as in every profile: transformers is not told of torch-xla
        "OMP_NUM_THREADS": "1",  # the same sums in this process and in those that tests start
        "COLUMNS": "120",
    }
