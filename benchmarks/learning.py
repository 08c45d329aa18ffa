"""How ``fixed``, ``tokens`` and ``packed`` learn: ``python -m benchmarks.learning``.

Two tasks: the demo's translations, and sequences of random words written backwards, whose lengths
have a long tail. Each is learnt by our trainer under each batching mode from the same weights for a
seed, with as many steps of about as many tokens; every epoch holds each row once, so validation
losses at the ends of epochs stand at exactly equal numbers of real tokens, source and target. Every
other setting is the same in all modes; the learning rate falls to 0 at the end.

Each run is a process of its own. Its figures are kept in ``--runs``, and a later call takes them
from there.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console

from benchmarks.command_line import parser_for
from benchmarks.fresh import in_fresh_process, machine
from benchmarks.reporting import Report, as_table, write

MODES = {"fixed": "#8a8a8a", "tokens": "#1f5fa8", "packed": "#d9730d"}
Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Task:
    """What is learnt, and how long. ``rate``: the largest learning rate."""

    name: str
    rows: int
    epochs: int
    tokens_per_step: int
    rate: float
    validation: int = 500


TASKS = {
    task.name: task
    for task in (
        Task("demo", rows=6_000, epochs=6, tokens_per_step=1_280, rate=2e-3),
        Task("reversal", rows=8_000, epochs=10, tokens_per_step=1_280, rate=2e-3),
    )
}
REVERSAL_WORDS = 16
FIRST_WORD = 6
HEADS = ("task", "batching", "validation NLL", "of fixed", "seeds", "real tokens", "steps")


def run(case: tuple[Task, str, int]) -> dict[str, Any]:
    """Train once; validation NLL at the end of each epoch, real tokens and steps until then."""
    import transformers

    from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
    from s2s_scale.data.collators import Seq2SeqCollator

    task, mode, seed = case
    transformers.utils.logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        model, train, validation = _task_of(task, Path(folder), seed)
        per_epoch = sum(len(row["input_ids"]) + len(row["labels"]) for row in train)
        steps = -(-per_epoch // task.tokens_per_step)
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                output_dir=folder,
                use_cpu=True,
                num_train_epochs=task.epochs,
                learning_rate=task.rate,
                adam_beta2=0.98,
                warmup_steps=steps,
                label_smoothing=0.1,
                seed=seed,
                eval_strategy="epoch",
                per_device_eval_batch_size=100,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **_sizes(mode, task, rows=-(-len(train) // steps)),
            ),
            train_dataset=train,
            eval_dataset=validation,
            data_collator=Seq2SeqCollator(model.config.pad_token_id),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [log["eval_nll_loss"] for log in trainer.state.log_history if "eval_nll_loss" in log]
    return {
        "nll": losses,
        "tokens": [per_epoch * (epoch + 1) for epoch in range(len(losses))],
        "steps": trainer.state.global_step,
    }


def _sizes(mode: str, task: Task, *, rows: int) -> dict[str, Any]:
    """The settings that differ. With as many ``rows`` in a step ``fixed`` makes as many steps."""
    if mode == "fixed":
        return {"batching": mode, "per_device_train_batch_size": rows}
    return {"batching": mode, "tokens_per_step": task.tokens_per_step}


def _task_of(task: Task, folder: Path, seed: int) -> tuple[Any, Rows, Rows]:
    """A new model (the same for a seed), training rows and validation rows (always the same)."""
    if task.name == "demo":
        return _demo(task, folder, seed)
    chance = random.Random(17)
    rows = [_reversal(chance) for _ in range(task.rows + task.validation)]
    from s2s_scale.models.tiny import tiny_model

    model = tiny_model(
        "marian", seed=seed, vocab_size=REVERSAL_WORDS + FIRST_WORD + 1, d_model=64, layers=2,
        max_position_embeddings=256, init_std=64**-0.5,
    )  # fmt: skip
    return model.train(), rows[: task.rows], rows[task.rows :]


def _reversal(chance: random.Random) -> dict[str, list[int]]:
    length = max(2, min(20, round(chance.lognormvariate(1.7, 0.5))))
    words = [chance.randrange(FIRST_WORD, FIRST_WORD + REVERSAL_WORDS) for _ in range(length)]
    return {"input_ids": [*words, 0], "labels": [*words[::-1], 0]}


def _demo(task: Task, folder: Path, seed: int) -> tuple[Any, Rows, Rows]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from s2s_scale.config import DataArguments
    from s2s_scale.demo import MODEL
    from s2s_scale.demo.data import write_demo_data
    from s2s_scale.models.create import run_new_model

    data, made = folder / "data", folder / "model"
    write_demo_data(data, sizes={"train": task.rows, "val": task.validation, "test": 1})
    data_args = DataArguments(data_dir=str(data))
    run_new_model(**MODEL, data=data_args, output_dir=made, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(made)

    def rows(split: str) -> Rows:
        source, target = (
            (data / f"{split}.{side}").read_text(encoding="utf-8").splitlines()
            for side in ("source", "target")
        )
        labels = tokenizer(text_target=target)["input_ids"]
        return [
            {"input_ids": ids, "labels": to}
            for ids, to in zip(tokenizer(source)["input_ids"], labels, strict=True)
        ]

    model = AutoModelForSeq2SeqLM.from_pretrained(made, dropout=0.0)
    return model.train(), rows("train"), rows("val")


def kept_run(case: tuple[Task, str, int], folder: Path) -> dict[str, Any]:
    """The figures of a run, from ``folder`` where they are there."""
    task, mode, seed = case
    settings = json.dumps(asdict(task), sort_keys=True)
    key = hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()
    path = folder / f"{task.name}-{mode}-{seed}-{key}.json"
    if not path.exists():
        figures = in_fresh_process(run, case)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def report_of(runs: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> Report:
    """The validation NLL at the end: mean over the seeds, beside that of ``fixed``."""
    rows, entries = [], []
    for (task, mode), figures in runs.items():
        last = [entry["nll"][-1] for entry in figures]
        reference = statistics.mean(entry["nll"][-1] for entry in runs[task, "fixed"])
        mean = statistics.mean(last)
        rows.append(
            (
                task,
                mode,
                f"{mean:.4f}",
                f"{mean / reference - 1:+.2%}",
                " ".join(f"{value:.4f}" for value in last),
                f"{figures[0]['tokens'][-1]:,}",
                f"{figures[0]['steps']:,}",
            )
        )
        entries.append({"task": asdict(TASKS[task]), "batching": mode, "runs": list(figures)})
    title = "Validation NLL (nats per target token) after the same number of real tokens"
    return Report(title, HEADS, rows, entries, machine())


def curves(runs: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> Figure:
    """A panel for each task: mean over seeds, and each seed faintly."""
    tasks = list(dict.fromkeys(task for task, _ in runs))
    figure = Figure(figsize=(5 * len(tasks), 3.6), layout="constrained")
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), place + 1)
        for mode, colour in MODES.items():
            if (task, mode) not in runs:
                continue
            figures = runs[task, mode]
            tokens = [count / 1e6 for count in figures[0]["tokens"]]
            for entry in figures:
                axes.plot(tokens, entry["nll"], color=colour, alpha=0.25, linewidth=1)
            means = [
                statistics.mean(values) for values in zip(*(e["nll"] for e in figures), strict=True)
            ]
            axes.plot(tokens, means, color=colour, marker="o", markersize=3, label=mode)
        axes.set_title(task)
        axes.set_xlabel("million real tokens, source and target")
        axes.set_ylabel("validation NLL per target token")
        axes.set_yscale("log")
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2], labels=["0.1", "0.2", "0.5", "1", "2"])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def main() -> None:
    """Train what is missing, and print and write the figures."""
    parser = parser_for("learning", __doc__)
    parser.add_argument("--task", nargs="+", default=[*TASKS], choices=[*TASKS])
    parser.add_argument(
        "--mode", nargs="+", default=[*MODES], choices=[*MODES], help="beside fixed"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each mode (3)")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="kept figures")
    parser.add_argument("--results", type=Path, help="folder for the JSON, the table and the PNG")
    options = parser.parse_args()
    runs = {
        (task, mode): [
            kept_run((TASKS[task], mode, seed), options.runs) for seed in range(options.seeds)
        ]
        for task in options.task
        for mode in dict.fromkeys(["fixed", *options.mode])
    }
    report = report_of(runs)
    Console(width=None if sys.stdout.isatty() else 140).print(as_table(report))
    if options.results is not None:
        write(report, options.results / "learning", picture=False)
        FigureCanvasAgg(curves(runs)).print_png(str(options.results / "learning.png"))


if __name__ == "__main__":
    main()
