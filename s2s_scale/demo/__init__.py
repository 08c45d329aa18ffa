"""``s2s-scale demo``: a small translation model trained from nothing on this machine's CPU.

It takes the path that a user takes: text files in a folder, ``new-model``, a settings file, and
``train`` with that file. Everything is left in the demo's folder to be read, changed and run again.
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

MODEL: dict[str, Any] = {"architecture": "marian", "size": "tiny", "vocab_size": 800}
EXAMPLES = 9  # translations shown at the end
TEST_RESULTS = "test_results.json"
SETTINGS_FILE = "demo.yaml"
INTERRUPTED = EXIT_RESUME

# Two to three minutes on two cores. Dropout and weight decay are off: the data are without noise
# and new every time the generator is asked, so there is nothing to overfit. In fp32 the figures are
# about the same on every processor, and a model of this width gains little from bf16.
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
    ("report.html", "curves, settings, versions and sample outputs on one page"),
    ("report.png", "the curves as a picture"),
    ("test_generations.txt", "what the model wrote for each row of data/test.source"),
    (TEST_RESULTS, "the figures on the test pairs"),
    (SETTINGS_FILE, "the settings of this run"),
    ("model.safetensors", "the trained model"),
)


def run(settings: Settings) -> int:
    """Run the demo in ``--output_dir``, or say what an earlier one left there.

    A finished demo is shown and not touched; one that was interrupted goes on from its newest
    checkpoint. ``--overwrite`` starts afresh. Returns the exit code: 0, or 85 if it was
    asked to stop.

    Raises:
        UserError: the folder holds a run that is not the demo's, or cannot be written to.
    """
    folder, afresh = Path(settings.options.output_dir), settings.options.overwrite
    _refuse_foreign_run(folder)
    if _finished(folder) and not afresh:
        print(f"The demo has already run; nothing was changed in {folder}.\n")
        _show(folder)
        return 0
    check_writable(folder)
    saved = [] if afresh else checkpoints(folder)
    if saved:
        print(f"An earlier demo stopped half-way: it goes on from {saved[-1]}.")
    else:
        _prepare(folder)
    code = _train(folder, resume=bool(saved))
    if code == 0:
        print()
        _show(folder)
    elif code == INTERRUPTED:
        print(f"The same command goes on where this stopped: {_demo_command(folder)}")
    return code


def _refuse_foreign_run(folder: Path) -> None:
    left = earlier_run(folder)
    if left and not (folder / SETTINGS_FILE).exists():
        raise UserError(
            f"output_dir={folder}: holds a run that is not the demo's ({', '.join(left[:3])}); "
            "give the demo a folder of its own with --output_dir"
        )


def _finished(folder: Path) -> bool:
    """Whether the demo got to its end: the report is what training writes last."""
    return all((folder / name).exists() for name in (SETTINGS_FILE, TEST_RESULTS, "report.png"))


def _prepare(folder: Path) -> None:
    """Make the data, the fresh model and the settings file."""
    sizes = SPLIT_SIZES
    print(
        "1. Translation pairs from Unicode CLDR: dates, times, measures, money, languages and "
        f"territories,\n   from English into German, French and Romanian. {sizes['train']:,} to "
        f"learn from, {sizes['val']} to watch, {sizes['test']} for the test."
    )
    write_demo_data(folder / "data", sizes=sizes)
    sources, targets = (_lines(folder / "data" / f"train.{side}") for side in ("source", "target"))
    for source, target in zip(sources[:3], targets[:3], strict=True):
        print(f"      {source}  =>  {target}")
    print(
        f"2. A new {MODEL['architecture']} model, {MODEL['size']}, with random weights, and a "
        f"tokenizer of {MODEL['vocab_size']} pieces."
    )
    _new_model(folder)
    text = yaml.safe_dump(_training_settings(folder), sort_keys=False, allow_unicode=True)
    heading = "# The demo's training. Run it again, with changes:\n#   s2s-scale train THIS_FILE "
    (folder / SETTINGS_FILE).write_text(
        f"{heading}--output_dir runs/mine --learning_rate 1e-3\n{text}", encoding="utf-8"
    )


def _new_model(folder: Path) -> None:
    from s2s_scale.config import DataArguments
    from s2s_scale.models.create import run_new_model

    run_new_model(
        **MODEL,
        data=DataArguments(data_dir=str(folder / "data")),
        output_dir=folder / "model_init",
        overwrite=True,
    )


def _training_settings(folder: Path) -> dict[str, Any]:
    return {
        "profile": "cpu",
        "model_name_or_path": str(folder / "model_init"),
        "data_dir": str(folder / "data"),
        "data_cache_dir": str(folder / "cache"),
        "output_dir": str(folder),
        **TRAINING,
    }


def _train(folder: Path, *, resume: bool) -> int:
    """``s2s-scale train FOLDER/demo.yaml``, in this process."""
    words = [str(folder / SETTINGS_FILE)]
    words += ["--resume_from_checkpoint", "latest"] if resume else ["--overwrite_output_dir"]
    print(f"3. Training, as you could type it:\n   {_command('train', *words)}\n", flush=True)
    settings = build_settings(all_commands()["train"], words)
    assert settings.profile is not None  # the settings file names one
    launch = plan_launch(settings.profile, ("train", *words), environ=os.environ)
    os.environ.update(launch.environment)  # before the import below: torch reads it once
    from s2s_scale.runner.train import train

    try:
        with handle_preemption(DEFAULT_GRACE_SECONDS):
            return train(settings)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED


def _show(folder: Path) -> None:
    """What the demo reached, some of its translations, where things are and how to go on."""
    results = json.loads((folder / TEST_RESULTS).read_text(encoding="utf-8"))
    bleu, exact = (results.get(f"test_{name}", math.nan) for name in ("bleu", "exact_match"))
    rows = _translations(folder)
    print(
        f"On {len(rows)} test pairs never seen in training: BLEU {bleu:.1f}, {exact:.1f} % exact."
    )
    shown = rows[:EXAMPLES]
    width = max((len(source) for source, _, _ in shown), default=0)
    for source, reference, output in shown:
        remark = "" if output == reference else f"   (expected: {reference})"
        print(f"   {source:<{width}}  =>  {output}{remark}")
    print(f"\nWhat is in {folder}:")
    for name, meaning in _FILES:
        print(f"   {name:<22} {meaning}")
    model = ["--model_name_or_path", str(folder)]
    print("\nHow to go on:")
    for meaning, command in (
        (
            "translate a line of your own",
            "echo 'to French: May 4, 2031' | " + _command("generate", *model),
        ),
        (
            "measure it again with greedy search",
            _command("evaluate", *model, "--data_dir", str(folder / "data"), "--eval_beams", "1"),
        ),
        (
            "train with other settings",
            _command(
                "train",
                str(folder / SETTINGS_FILE),
                "--output_dir",
                "runs/mine",
                "--dropout",
                "0.1",
            ),
        ),
        ("run the demo afresh", _demo_command(folder, "--overwrite")),
    ):
        print(f"   {meaning}:\n      {command}")


def _translations(folder: Path) -> list[tuple[str, str, str]]:
    """(source, reference, output) of every test row."""
    data = folder / "data"
    columns = (data / "test.source", data / "test.target", folder / "test_generations.txt")
    return list(zip(*(_lines(path) for path in columns), strict=True))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _demo_command(folder: Path, *words: str) -> str:
    return _command("demo", "--output_dir", str(folder), *words)


def _command(*words: str) -> str:
    """A command line that works in the user's shell as it stands."""
    program = shutil.which("s2s-scale")
    beside = Path(sys.executable).with_name("s2s-scale")
    if program is not None:
        start = "s2s-scale"
    elif beside.exists():
        start = os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    else:
        start = f"{shlex.quote(sys.executable)} -m s2s_scale"
    return f"{start} {shlex.join(words)}"
