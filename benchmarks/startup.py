"""Time to the first step, ours beside transformers': ``python -m benchmarks.startup``.

On the demo's data (true translations made in code) and its model: from the start of the process to
the end of the first optimizer step of 32 rows, by phase. Ours is ``s2s-scale train``; transformers'
is a script as its examples have it: text files through ``datasets``, ``map`` with the tokenizer,
``DataCollatorForSeq2Seq``, ``Seq2SeqTrainer``. Each is measured with its cache of tokenised data
empty and filled, every time in a process of its own; the two take turns, medians are shown. Both
train in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.fresh import machine
from benchmarks.reporting import Report, show

SIDES = ("s2s-scale", "transformers")
CACHES = ("empty", "filled")
PHASES = ("imports", "settings", "data and tokens", "model and tokenizer", "trainer", "first step")
ROWS = 32


class Phases:
    """Seconds by phase, from the start of the process on."""

    def __init__(self, started: float) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = started

    def end(self, phase: str) -> None:
        """All time since the last phase ended was this one's."""
        now = time.time()
        self.seconds[phase] += now - self._last
        self._last = now

    def ending(self, phase: str, function: Callable[..., Any], *, before: str) -> Any:
        """``function`` as one that ends the phase ``before`` when called and ``phase`` after."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.end(before)
            outcome = function(*args, **kwargs)
            self.end(phase)
            return outcome

        return timed


def our_first_step(folder: Path, run: Path, phases: Phases) -> None:
    """``s2s-scale train`` for one step; its parts are told apart where the runner calls them."""
    import s2s_scale.runner.train as runner
    from s2s_scale import cli

    phases.end("imports")
    for name, phase in (
        ("read_settings", "settings"),
        ("load_pairs", "data and tokens"),
        ("load_model", "model and tokenizer"),
        ("tokenize", "data and tokens"),
        ("build_trainer", "trainer"),
    ):
        timed = phases.ending(phase, getattr(runner, name), before="settings")
        setattr(runner, name, timed)
    trainer: Any = runner.Seq2SeqTrainer
    step = trainer._maybe_log_save_evaluate

    def first_step(self: Any, *args: Any, **kwargs: Any) -> None:
        phases.end("first step")
        raise _Reached

    trainer._maybe_log_save_evaluate = first_step
    words = f"train --profile cpu --model {folder / 'new'} --data_dir {folder / 'data'}"
    words += f" --output_dir {run} --per_device_train_batch_size {ROWS} --max_steps 2"
    words += " --learning_rate 1e-3 --report_to none --disable_tqdm --bf16 false"
    with contextlib.suppress(_Reached):
        cli.main(words.split())
    trainer._maybe_log_save_evaluate = step


class _Reached(BaseException):
    """The first step is done."""


def stock_first_step(folder: Path, run: Path, phases: Phases) -> None:
    """A script around transformers' ``Seq2SeqTrainer``, as its translation example is written."""
    import datasets
    import transformers
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        TrainerCallback,
    )

    phases.end("imports")
    args = Seq2SeqTrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=ROWS,
        max_steps=2,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    phases.end("settings")
    datasets.disable_progress_bars()
    sides = [
        datasets.load_dataset("text", data_files=str(folder / "data" / f"train.{side}"))["train"]
        for side in ("source", "target")
    ]
    rows = datasets.concatenate_datasets(
        [side.rename_column("text", name) for side, name in zip(sides, ("s", "t"), strict=True)],
        axis=1,
    )
    phases.end("data and tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder / "new")
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "new")
    phases.end("model and tokenizer")
    rows = rows.map(
        lambda batch: tokenizer(batch["s"], text_target=batch["t"], truncation=True),
        batched=True,
        remove_columns=["s", "t"],
    )
    phases.end("data and tokens")

    class FirstStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            phases.end("first step")
            raise _Reached

    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=[FirstStep()],
    )
    phases.end("trainer")
    with contextlib.suppress(_Reached):
        trainer.train()


def measure(side: str, folder: Path) -> None:
    """In a process of its own: print the seconds of each phase as JSON."""
    phases = Phases(float(os.environ["STARTED"]))
    work = our_first_step if side == SIDES[0] else stock_first_step
    with TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
        work(folder, Path(run), phases)
    print(json.dumps(phases.seconds))


def fresh_process(side: str, folder: Path, cache: Path) -> dict[str, float]:
    """What ``measure`` prints."""
    environment = {
        **os.environ,
        "STARTED": repr(time.time()),
        "S2S_SCALE_CACHE": str(cache),
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "USE_TORCH_XLA": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "benchmarks.startup", "--measure", side, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def demo(rows: int) -> Iterator[Path]:
    """A folder with the demo's data and a new model for them."""
    from s2s_scale.demo.data import write_demo_data
    from s2s_scale.models.create import new_model

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_data(folder / "data", sizes={"train": rows, "val": 20, "test": 20})
        texts = [
            line
            for side in ("source", "target")
            for line in (folder / "data" / f"train.{side}").read_text("utf-8").splitlines()
        ]
        new_model(
            architecture="marian",
            size="tiny",
            texts=texts,
            vocab_size=800,
            output_dir=folder / "new",
        )
        yield folder


def run_all(folder: Path, turns: int) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Both sides with an empty and with a filled cache, in turn."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(turns):
        for side in SIDES:
            cache = folder / f"cache-{side}-{number}"
            for state in CACHES:
                found.setdefault((side, state), []).append(fresh_process(side, folder, cache))
    return found


def report_of(found: dict[tuple[str, str], list[dict[str, float]]], title: str) -> Report:
    """Medians of every phase, and of the sum."""
    rows, entries = [], []
    for (side, state), runs in found.items():
        medians = {phase: statistics.median(run[phase] for run in runs) for phase in PHASES}
        total = statistics.median(sum(run.values()) for run in runs)
        entries.append({"trainer": side, "cache": state, **medians, "in all": total})
        rows.append([side, state, *(f"{medians[p]:.2f}" for p in PHASES), f"{total:.2f}"])
    heads = ("trainer", "cache of tokens", *PHASES, "in all, s")
    return Report(title, heads, rows, entries, machine())


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=5, help="how often they alternate (5)")
    parser.add_argument("--rows", type=int, default=20_000, help="training rows (20,000)")
    parser.add_argument("--results", type=Path, help="folder for the JSON and the table")
    parser.add_argument("--quick", action="store_true", help="one pair over 200 rows")
    options = parser.parse_args(arguments)
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    if options.quick:
        options.pairs, options.rows = 1, 200
    with demo(options.rows) as folder:
        found = run_all(folder, options.pairs)
    title = (
        f"seconds to the end of the first step, the demo's model, {options.rows:,} rows, median of "
        f"{options.pairs}"
    )
    report = report_of(found, title)
    show(report, options.results and options.results / "startup", width=150)


if __name__ == "__main__":
    main()
