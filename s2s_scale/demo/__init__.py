"""``s2s-scale demo``: trains a small translation model from scratch on this machine's CPU.

It follows the steps of a user: text files in a folder, ``new-model``, a settings file, and
``train`` with that file. Everything stays in the demo's folder to be read, changed and run again.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from s2s_scale.checkpoint import check_writable, checkpoints, earlier_run
from s2s_scale.config import DEFAULT_GRACE_SECONDS
from s2s_scale.demo.data import SPLIT_SIZES, write_demo_data
from s2s_scale.errors import EXIT_RESUME, UserError
from s2s_scale.launch.launchers import plan_launch
from s2s_scale.resilience.preemption import Stopped, handle_preemption
from s2s_scale.settings import Settings
from s2s_scale.settings.build import build_settings
from s2s_scale.settings.commands import all_commands
from s2s_scale.utils import atomic_write

MODEL: dict[str, Any] = {"architecture": "marian", "size": "tiny", "vocab_size": 800}
EXAMPLES = 9  # translations shown at the end
TEST_RESULTS = "test_results.json"
SETTINGS_FILE = "demo.yaml"
INTERRUPTED = EXIT_RESUME

# Two to three minutes on two cores. Dropout and weight decay are off, since the data are free of
# noise. In fp32 the results are nearly the same on every processor, and a model of this width gains
# little from bf16.
TRAINING: dict[str, Any] = {
    "max_source_length": 64,
    "max_target_length": 64,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "batching": "sortish",
    "learning_rate": 2e-3,
    "adam_beta2": 0.98,
    "lr_scheduler": "linear",
    "warmup_steps": 400,
    "bf16": False,
    "dropout": 0.0,
    "label_smoothing": 0.0,
    "logging_steps": 25,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "predict_with_generate": True,
    "eval_beams": 4,
    "do_eval": True,
    "do_predict": True,
    "seed": 1,
}

_FILES = (
    ("report.html", "plots, settings, versions and sample outputs on one page"),
    ("report.png", "the plots as an image"),
    ("test_generations.txt", "the model's output for each row of data/test.source"),
    (TEST_RESULTS, "the metrics on the test pairs"),
    (SETTINGS_FILE, "the settings of this run"),
    ("model.safetensors", "the trained model"),
)


def run(settings: Settings) -> int:
    """Run the demo in ``--output_dir``, or show the results of an earlier one.

    A finished demo is shown and left unchanged; an interrupted one resumes from its newest
    checkpoint. ``--overwrite`` starts again. Returns the exit code: 0, or 85 if it was asked to
    stop.

    Raises:
        UserError: the folder contains another run, or cannot be written to.
    """
    folder, afresh = Path(settings.options.output_dir), settings.options.overwrite
    left = earlier_run(folder)
    if left and not (folder / SETTINGS_FILE).exists():
        raise UserError(
            f"output_dir={folder}: contains a run that is not the demo's ({', '.join(left[:3])}); "
            "give the demo a folder of its own with --output_dir"
        )
    # Training writes the report last.
    ends = (SETTINGS_FILE, TEST_RESULTS, "report.png")
    if not afresh and all((folder / name).exists() for name in ends):
        print(f"The demo has already run; nothing was changed in {folder}.\n")
        _show(folder)
        return 0
    check_writable(folder)
    saved = [] if afresh else checkpoints(folder)
    if saved:
        print(f"An earlier demo was interrupted: resuming from {saved[-1]}.")
    else:
        _prepare(folder)
    code = _train(folder, resume=bool(saved))
    if code == 0:
        print()
        _show(folder)
    elif code == INTERRUPTED:
        print(f"To resume, run the same command: {_command('demo', '--output_dir', str(folder))}")
    return code


def _prepare(folder: Path) -> None:
    """Create the data, the new model and the settings file."""
    sizes = SPLIT_SIZES
    print(
        "1. Translation pairs from Unicode CLDR: dates, times, measures, money, languages and "
        f"territories,\n   from English to German, French and Romanian: {sizes['train']:,} for "
        f"training, {sizes['val']} for validation, {sizes['test']} for testing."
    )
    write_demo_data(folder / "data", sizes=sizes)
    sources, targets = (_lines(folder / "data" / f"train.{side}") for side in ("source", "target"))
    for source, target in zip(sources[:3], targets[:3], strict=True):
        print(f"      {source}  =>  {target}")
    print(
        f"2. A new {MODEL['size']} {MODEL['architecture']} model with random weights and a "
        f"tokenizer of {MODEL['vocab_size']} pieces."
    )
    _new_model(folder)
    settings = {
        "profile": "cpu",
        "model_name_or_path": str(folder / "model_init"),
        "data_dir": str(folder / "data"),
        "data_cache_dir": str(folder / "cache"),
        "output_dir": str(folder),
        **TRAINING,
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    heading = (
        "# The settings of the demo's training. To train again with changes:\n"
        "#   s2s-scale train THIS_FILE --output_dir runs/mine --learning_rate 1e-3\n"
    )
    atomic_write(folder / SETTINGS_FILE, heading + text)


def _new_model(folder: Path) -> None:
    from s2s_scale.config import DataArguments
    from s2s_scale.models.create import run_new_model

    run_new_model(
        **MODEL,
        data=DataArguments(data_dir=str(folder / "data")),
        output_dir=folder / "model_init",
        overwrite=True,
    )


def _train(folder: Path, *, resume: bool) -> int:
    """Run ``s2s-scale train FOLDER/demo.yaml`` in this process."""
    words = [str(folder / SETTINGS_FILE)]
    words += ["--resume_from_checkpoint", "latest"] if resume else ["--overwrite_output_dir"]
    print(f"3. Training, by the command\n   {_command('train', *words)}\n", flush=True)
    settings = build_settings(all_commands()["train"], words)
    assert settings.profile is not None  # the settings file names one
    launch = plan_launch(settings.profile, ("train", *words), environ=os.environ)
    os.environ.update(launch.environment)  # before the import below: torch reads them once
    from s2s_scale.runner.train import train

    try:
        with handle_preemption(DEFAULT_GRACE_SECONDS):
            return train(settings)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED


def _show(folder: Path) -> None:
    """Print the results, some translations, the files of the demo, and next steps."""
    results = json.loads((folder / TEST_RESULTS).read_text(encoding="utf-8"))
    bleu, exact = (results.get(f"test_{name}", math.nan) for name in ("bleu", "exact_match"))
    data = folder / "data"
    files = (data / "test.source", data / "test.target", folder / "test_generations.txt")
    rows = list(zip(*map(_lines, files), strict=True))
    print(f"On {len(rows)} test pairs not used for training: BLEU {bleu:.1f}, {exact:.1f} % exact.")
    shown = rows[:EXAMPLES]
    width = max((len(source) for source, _, _ in shown), default=0)
    for source, reference, output in shown:
        remark = "" if output == reference else f"   (expected: {reference})"
        print(f"   {source:<{width}}  =>  {output}{remark}")
    print(f"\nFiles in {folder}:")
    for name, meaning in _FILES:
        print(f"   {name:<22} {meaning}")
    model = ["--model_name_or_path", str(folder)]
    changes = ["--output_dir", "runs/mine", "--dropout", "0.1"]
    print("\nNext steps:")
    for meaning, command in (
        (
            "translate a line of your own",
            "echo 'to French: May 4, 2031' | " + _command("generate", *model),
        ),
        (
            "evaluate again with greedy search",
            _command("evaluate", *model, "--data_dir", str(data), "--eval_beams", "1"),
        ),
        (
            "train with other settings",
            _command("train", str(folder / SETTINGS_FILE), *changes),
        ),
        ("run the demo again", _command("demo", "--output_dir", str(folder), "--overwrite")),
    ):
        print(f"   {meaning}:\n      {command}")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _command(*words: str) -> str:
    """A command line that works in the user's shell without changes."""
    program = shutil.which("s2s-scale")
    beside = Path(sys.executable).with_name("s2s-scale")
    if program is not None:
        start = "s2s-scale"
    elif beside.exists():
        start = os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    else:
        start = f"{shlex.quote(sys.executable)} -m s2s_scale"
    return f"{start} {shlex.join(words)}"
