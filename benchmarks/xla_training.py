"""Training on XLA, random lengths, ours and transformers': ``python -m benchmarks.xla_training``.

Compilations, wall time and real tokens per second of ``--steps`` (200) steps on the same rows, each
trainer in a process of its own, on one virtual device on the CPU unless PJRT_DEVICE says otherwise.

A process that compiles anew for every shape may die of it: XLA's CPU client maps memory for each
graph, and Linux allows 65,530 maps (``sysctl vm.max_map_count``). Then the figures are those of the
steps that it came to, and the ratios are per step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

ROWS, ROWS_PER_STEP, LONGEST = 2000, 16, 60
STOCK = "transformers"
OURS = {"s2s-scale packed": "packed", "s2s-scale tokens": "tokens"}
WAYS = (*OURS, STOCK)
COLUMNS = {
    "steps": "",
    "compilations": "",
    "compile_seconds": "seconds compiling",
    "seconds": "seconds in all",
    "rate": "real tokens per second",
}
DIGITS = {"compile_seconds": 1, "seconds": 1}
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


def measure(way: str, steps: int) -> None:
    """Print one way's figures after each step, as JSON; call it once per process, at its start."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "1")
    os.environ["XLA_PERSISTENT_CACHE_PATH"] = ""
    os.environ["USE_TORCH_XLA"] = "0" if way in OURS else "1"
    from s2s_scale.backends import make_backend

    device = os.environ["PJRT_DEVICE"].lower()
    backend = make_backend("xla", device, {"data": -1})
    if way in OURS:
        backend.prepare_process()
    from s2s_scale.data.collators import Seq2SeqCollator
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
        if way in OURS:
            from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments

            values["batching"] = OURS[way]
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
        trainer.add_callback(
            _after_each_step(lambda step: _print_figures(step, started, tokens, backend))
        )
        trainer.train()


def _after_each_step(act: Callable[[int], None]) -> Any:
    from transformers import TrainerCallback

    class AfterEachStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            act(state.global_step)

    return AfterEachStep()


def _print_figures(step: int, started: float, tokens: int, backend: Any) -> None:
    """``tokens``: real ones of all rows, of which a step has its share on average."""
    seconds = time.perf_counter() - started
    compilations, compile_seconds = backend.compilations()
    figures = {
        "steps": step,
        "compilations": compilations,
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "rate": step * ROWS_PER_STEP * tokens / ROWS / seconds,
    }
    print(json.dumps(figures), flush=True)


def main() -> None:
    """Print the table of ``--ways``; with ``--measure``, one trainer's figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.steps)
        return
    rows = f"about {ROWS_PER_STEP} rows of 2 to {LONGEST + 1} tokens"
    title = f"2-layer T5, {options.steps} steps of {rows}"
    table = Table(title=title, title_justify="left")
    table.add_column("trainer")
    for name, unit in COLUMNS.items():
        table.add_column(unit or name, justify="right")
    found = {way: figures_of(way, options.steps) for way in options.ways}
    for way, figures in found.items():
        table.add_row(way, *(f"{figures[name]:,.{DIGITS.get(name, 0)}f}" for name in COLUMNS))
    for way in [way for way in OURS if way in found and STOCK in found]:
        ours, theirs = per_step(found[way]), per_step(found[STOCK])
        counts = ("compilations", "compile_seconds", "seconds")
        ratios = [f"{theirs[name] / ours[name]:.1f}x" for name in counts]
        times = f"{ours['rate'] / theirs['rate']:.1f}x"
        table.add_row(f"{way} better by, per step", "", *ratios, times)
    Console(width=120).print(table)


def figures_of(way: str, steps: int) -> dict[str, float]:
    """One trainer's figures from a process of its own, up to the last step that it came to."""
    words = [sys.executable, "-m", "benchmarks.xla_training", "--steps", str(steps)]
    words += ["--measure", way]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"steps"')]
    if not lines:
        sys.exit(f"{way}:\n{done.stderr}")
    if done.returncode:
        print(f"{way} died after {len(lines)} steps: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(lines[-1]))


def per_step(figures: dict[str, float]) -> dict[str, float]:
    """Counts and seconds divided by the steps; the rate as it is."""
    steps = figures["steps"]
    return {name: n if name == "rate" else n / steps for name, n in figures.items()}


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    main()
