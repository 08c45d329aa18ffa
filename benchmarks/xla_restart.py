"""What the compilation cache saves a killed run: ``python -m benchmarks.xla_restart``.

A run under profile ``cpu-xla`` (another with ``--profile``) is killed with SIGKILL once its first
checkpoint is there, and started again from it: with the cache of compiled graphs that the killed
run left, and without one. Seconds from the start of the process until the loss of its first step is
there, and those of them that went into compiling. Every start is a process of its own; the two ways
take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.command_line import parser_for
from benchmarks.fresh import Spread, machine
from benchmarks.reporting import Report, show

HEADS = ("start", "seconds to its first step", "of them compiling", "graphs compiled")
FIRST, WITH, WITHOUT = "first, cache empty", "restart, with the cache", "restart, without"
SAVED_AT = 2
SIZE = {"layers": 2, "d_model": 64, "vocab_size": 512}


def train(profile_name: str, folder: Path) -> None:
    """Train without end, from the checkpoint that is there; tell of each step and checkpoint."""
    from s2s_scale.settings.profiles import resolve

    profile = resolve(profile_name)
    os.environ.update(profile.environment)
    from s2s_scale.backends import make_backend

    backend = make_backend(profile.backend, profile.device, profile.mesh)
    backend.prepare_process()
    from transformers import TrainerCallback

    from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
    from s2s_scale.data.collators import Seq2SeqCollator
    from s2s_scale.models.tiny import tiny_model
    from tests.support.training import ragged_rows

    class Tell(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            graphs, seconds = backend.compilations()  # the loss was read: the step is over
            print(
                json.dumps({"step": state.global_step, "graphs": graphs, "compiling": seconds}),
                flush=True,
            )

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            print(json.dumps({"saved": True}), flush=True)

    model = tiny_model("bart", **SIZE).train()
    values = {
        **profile.arguments,
        "output_dir": str(folder / "run"),
        "max_steps": 10_000,
        "save_steps": SAVED_AT,
        "save_total_limit": 1,
        "label_smoothing": 0.1,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**backend.training_overrides(values, trains=True)),
        train_dataset=ragged_rows(model, 2_000, longest=60),
        data_collator=Seq2SeqCollator(model.config.pad_token_id),
        backend=backend,
        callbacks=[Tell()],
    )
    trainer.train(resume_from_checkpoint=bool(list((folder / "run").glob("checkpoint-*"))))


@contextmanager
def running(profile: str, folder: Path, cache: Path | None) -> Iterator[Iterator[dict[str, Any]]]:
    """A run in a process of its own and what it tells; it is killed at the end."""
    words = [sys.executable, "-m", "benchmarks.xla_restart", "--profile", profile]
    environment = {**os.environ, "XLA_PERSISTENT_CACHE_PATH": str(cache or "")}
    process = subprocess.Popen(
        [*words, "--folder", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield (json.loads(line) for line in process.stdout if line.startswith('{"'))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def first_step(told: Iterator[dict[str, Any]], started: float) -> dict[str, float]:
    """What it took to the end of the first step; ``sys.exit`` where there is none."""
    figures = next((entry for entry in told if "step" in entry), None)
    if figures is None:
        sys.exit("error: the run ended before its first step; try it with s2s-scale train")
    return {**figures, "seconds": time.perf_counter() - started}


def measure(profile: str, folder: Path) -> dict[str, dict[str, float]]:
    """One first start that is killed after its checkpoint, and both restarts."""
    cache, found = folder / "cache", {}
    started = time.perf_counter()
    with running(profile, folder, cache) as told:
        found[FIRST] = first_step(told, started)
        next(entry for entry in told if "saved" in entry)
    for way, path in ((WITH, cache), (WITHOUT, None)):
        started = time.perf_counter()
        with running(profile, folder, path) as told:
            found[way] = first_step(told, started)
        if found[way]["step"] <= SAVED_AT:
            sys.exit(f"error: {way}: began at step {found[way]['step']}, not at the checkpoint")
    found[WITH]["bytes"] = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
    return found


def main() -> None:
    """Print the table."""
    parser = parser_for("xla_restart", __doc__)
    parser.add_argument("--profile", default="cpu-xla", help="cpu-xla, tpu-vm, …")
    parser.add_argument("--pairs", type=int, default=5, help="how often the starts alternate (5)")
    parser.add_argument("--results", type=Path, help="folder for the JSON and the table")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        train(options.profile, options.folder)
        return
    runs = []
    for _ in range(options.pairs):
        with TemporaryDirectory() as folder:
            runs.append(measure(options.profile, Path(folder)))
    rows, entries = [], []
    for way in (FIRST, WITH, WITHOUT):
        names = ("seconds", "compiling", "graphs")
        spreads = {name: Spread.of([run[way][name] for run in runs]) for name in names}
        cells = [spreads[name].text("{:.1f}") for name in names[:2]]
        rows.append((way, *cells, spreads["graphs"].text("{:.0f}")))
        entries.append({"start": way, **spreads})
    size = Spread.of([run[WITH]["bytes"] / 2**20 for run in runs])
    title = (
        f"Killed and started again under {options.profile}: 2-layer BART, median (range) of "
        f"{options.pairs}; the cache holds {size.median:.1f} MiB"
    )
    report = Report(title, HEADS, rows, entries, machine())
    show(report, options.results and options.results / "xla-restart")


if __name__ == "__main__":
    main()
