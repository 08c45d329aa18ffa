"""Training on XLA, random lengths, ours and transformers': ``python -m benchmarks.xla_training``.

Compilations, wall time and real tokens per second of ``--steps`` (200) steps on the same rows, each
trainer in a process of its own, on one virtual device on the CPU unless PJRT_DEVICE says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

ROWS, ROWS_PER_STEP, LONGEST = 2000, 16, 60
WAYS = ("s2s-scale", "transformers")
ARGUMENTS: dict[str, Any] = {
    "optim": "adamw_torch",
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 50,
    "learning_rate": 1e-3,
}


def rows_of(last_word: int, first_word: int, end: int) -> list[dict[str, list[int]]]:
    """Rows whose lengths have a long tail: gamma distributed, mean 16, at most ``LONGEST``."""
    chance = random.Random(0)

    def ids(length: int) -> list[int]:
        return [chance.randint(first_word, last_word) for _ in range(length)] + [end]

    made = []
    for _ in range(ROWS):
        length = min(LONGEST, 1 + int(chance.gammavariate(1.5, 10)))
        other = min(LONGEST, max(1, round(length * chance.uniform(0.8, 1.25))))
        made.append({"input_ids": ids(length), "labels": ids(other)})
    return made


def measure(way: str, steps: int) -> dict[str, float]:
    """The figures of one way; call it once per process, before anything is compiled."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "1")
    os.environ["XLA_PERSISTENT_CACHE_PATH"] = ""
    os.environ["USE_TORCH_XLA"] = "0" if way == WAYS[0] else "1"
    from s2s_scale.backends import make_backend

    device = os.environ["PJRT_DEVICE"].lower()
    backend = make_backend("xla", device, {"data": -1})
    if way == WAYS[0]:
        backend.prepare_process()
    from s2s_scale.data.collate import Seq2SeqCollator
    from s2s_scale.models import decoder_inputs_from_labels
    from s2s_scale.models.tiny import FIRST_WORD_ID, last_word_id, tiny_model

    model = tiny_model("t5", layers=2, d_model=64, vocab_size=512).train()
    rows = rows_of(last_word_id(model), FIRST_WORD_ID, model.config.eos_token_id)
    tokens = sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
    collate = Seq2SeqCollator(model.config.pad_token_id)

    def with_decoder_inputs(batch: list[Any]) -> Any:
        made = collate(batch)
        made["decoder_input_ids"] = decoder_inputs_from_labels(
            model, made["labels"], model.config.pad_token_id
        )
        return made

    with TemporaryDirectory() as folder:
        values = {**ARGUMENTS, "output_dir": folder, "max_steps": steps}
        if way == WAYS[0]:
            from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments

            values["tokens_per_step"] = ROWS_PER_STEP * tokens // ROWS
            args = Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True))
            trainer: Any = Seq2SeqTrainer(
                model=model, args=args, train_dataset=rows, data_collator=collate, backend=backend
            )
        else:
            import transformers

            values["per_device_train_batch_size"] = ROWS_PER_STEP
            trainer = transformers.Seq2SeqTrainer(
                model=model,
                args=transformers.Seq2SeqTrainingArguments(**values),
                train_dataset=rows,
                data_collator=with_decoder_inputs,
            )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    compilations, compile_seconds = backend.compilations()
    return {
        "compilations": compilations,
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "rate": steps * ROWS_PER_STEP * tokens / ROWS / seconds,
    }


def main() -> None:
    """Print the table; with ``--way``, one trainer's figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.steps)))
        return
    rows = f"about {ROWS_PER_STEP} rows of 2 to {LONGEST + 1} tokens"
    title = f"2-layer T5, {options.steps} steps of {rows}"
    table = Table(title=title, title_justify="left")
    table.add_column("trainer")
    for name in ("compilations", "seconds compiling", "seconds in all", "real tokens per second"):
        table.add_column(name, justify="right")
    found = {}
    for way in WAYS:
        words = [sys.executable, "-m", "benchmarks.xla_training", "--steps", str(options.steps)]
        done = subprocess.run([*words, "--way", way], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{way}:\n{done.stderr}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
        cells = ("{compilations:.0f}", "{compile_seconds:.1f}", "{seconds:.1f}", "{rate:,.0f}")
        table.add_row(way, *(cell.format(**found[way]) for cell in cells))
    ours, theirs = (found[way] for way in WAYS)
    ratios = [theirs[n] / ours[n] for n in ("compilations", "compile_seconds", "seconds")]
    table.add_row(
        "ratio", *(f"{ratio:.1f}x" for ratio in ratios), f"{ours['rate'] / theirs['rate']:.1f}x"
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    main()
