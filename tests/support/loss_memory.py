"""Peak memory of an evaluation: python -m tests.support.loss_memory VOCABULARY LINEAR GENERATE.

Prints by how many bytes the resident set's peak grew while a tiny model was evaluated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from s2s_scale.models.tiny import tiny_model
from tests.support.training import our_trainer

ROWS, TARGETS = 32, 60


def memory(name: str) -> int:
    """Bytes of a line such as VmHWM in this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main(vocabulary: int, linear: str, generate: bool) -> None:
    """Evaluate once to warm up on a single row, then on all rows."""
    model = tiny_model("bart", vocab_size=vocabulary, d_model=8)
    row = {"input_ids": [7, 8, 9, 2], "labels": [*range(6, 6 + TARGETS - 1), 2]}
    with TemporaryDirectory() as folder:
        trainer = our_trainer(
            model,
            Path(folder),
            [row],
            label_smoothing=0.1,
            linear_cross_entropy=linear,
            per_device_eval_batch_size=ROWS,
            predict_with_generate=generate,
            generation_max_length=3,
            compute_metrics=(lambda _prediction: {}) if generate else None,
        )
        trainer.evaluate([row])
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        trainer.evaluate([row] * ROWS)
    print(memory("VmHWM") - before)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3] == "generate")
