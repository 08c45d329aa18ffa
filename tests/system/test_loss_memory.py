"""Evaluation that asks for no logits does not hold any: its memory is flat in the vocabulary."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.loss_memory import ROWS, TARGETS
from tests.support.measured import ONE_THREAD

MIB = 2**20


def growth(vocabulary, linear, generate):
    words = [str(vocabulary), linear, generate]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.loss_memory", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        # What is freed goes back at once: whether the heap keeps it would depend on small things.
        env={**os.environ, **ONE_THREAD, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("generate", ["loss_only", "generate"])
def test_memory_is_flat_in_the_vocabulary(generate):
    small, large = (growth(v, "on", generate) for v in (16_384, 131_072))
    logits = ROWS * TARGETS * 131_072 * 4
    print(f"{generate}: {small / MIB:.0f} and {large / MIB:.0f} MiB, logits {logits / MIB:.0f}")
    assert large < 1.3 * small + 20 * MIB
    assert large < logits / 5
    # The measure sees logits where they are built.
    assert growth(131_072, "off", generate) > logits
