"""Evaluation of 997 rows over ranks: the same BLEU, texts and rows whatever carries the run.

``python -m tests.parity.evaluation`` runs every backend on 1, 2 and 3 ranks and prints a table.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from s2s_scale import cli
from s2s_scale.settings.profiles import resolve
from tests.support.copying import write_copy_task
from tests.support.worker import run_ranks

ROWS = 997
BEAMS = (1, 4)
PROFILES = ("cpu-ddp", "cpu-zero2", "cpu-zero3")
METRICS = ("test_bleu", "test_chrf", "test_exact_match", "test_gen_len")
# Trained for so long only that it still makes mistakes, and of different lengths.
TRAINING = """--max_steps 25 --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps 40
    --adam_beta2 0.98 --dropout 0 --seed 0 --report_to none --disable_tqdm --profile cpu
    --save_strategy no --bf16 false""".split()
# One step that changes no weight: after it the model is wrapped as in training.
STEP = """--max_steps 1 --learning_rate 0 --per_device_train_batch_size 1 --report_to none
    --disable_tqdm --save_strategy no --predict_with_generate --per_device_eval_batch_size 32
    --val_max_target_length 12 --bf16 false""".split()


@dataclass(frozen=True)
class Texts:
    """What an evaluation with some number of beams gave."""

    texts: tuple[str, ...]
    metrics: dict[str, float]
    held: int = dataclasses.field(compare=False)
    """Numbers of the parameters on rank 0 after the model was loaded."""


def write_model(folder: Path) -> Path:
    """A folder with ``data`` (997 rows to test on) and ``model``, which copies with mistakes."""
    data = write_copy_task(folder / "data", {"train": 3000, "test": ROWS})
    places = ["--data_dir", str(data), "--output_dir"]
    new = "new-model --architecture bart --size tiny --vocab_size 300".split()
    assert cli.main([*new, *places, str(folder / "new")]) == 0
    words = ["train", "--model", str(folder / "new"), *TRAINING, *places, str(folder / "model")]
    assert cli.main(words) == 0
    return folder


def evaluated(work: Path, folder: Path, *, profile: str, ranks: int) -> dict[int, Texts]:
    """Beams -> texts and metrics under ``profile`` on so many ranks."""
    words = ["--profile", profile, "--model", str(work / "model")]
    words += ["--data_dir", str(work / "data"), "--output_dir", str(folder / "run"), *STEP]
    first = run_ranks(
        "tests.support.evaluation:work",
        {"backend": resolve(profile).backend, "words": words, "beams": BEAMS},
        ranks=ranks,
        folder=folder,
        limit=600,
        environment=resolve(profile).environment,
    )[0]
    found = {}
    for number, result in first["beams"].items():
        metrics = {name: result["metrics"][name] for name in METRICS}
        found[int(number)] = Texts(tuple(result["texts"]), metrics, first["held"])
    return found


def main() -> int:
    """Every profile on 1, 2 and 3 ranks against one process."""
    good = True
    with tempfile.TemporaryDirectory(prefix="s2s-scale-evaluation-") as scratch:
        work = write_model(Path(scratch))
        expected = evaluated(work, work / "one", profile="cpu", ranks=1)
        print("| profile | ranks | beams | rows | BLEU | texts that differ |")
        print("|---|---|---|---|---|---|")
        for profile, ranks in [("cpu", 1)] + [(p, n) for p in PROFILES for n in (1, 2, 3)]:
            folder = work / f"{profile}-{ranks}"
            for number, found in evaluated(work, folder, profile=profile, ranks=ranks).items():
                reference = expected[number]
                pairs = zip(found.texts, reference.texts, strict=False)
                differ = sum(one != other for one, other in pairs)
                good = good and found == reference
                print(
                    f"| {profile} | {ranks} | {number} | {len(found.texts)} | "
                    f"{found.metrics['test_bleu']:.4f} | {differ} |",
                    flush=True,
                )
    print(f"all identical: {'yes' if good else 'NO'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
