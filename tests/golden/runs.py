"""The trainings whose figures are kept: six families under each profile, by the command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent
ROOT = GOLDEN.parents[1]
TRAJECTORIES = GOLDEN / "trajectories.json"
MODELS, WEIGHTS, CHECKPOINTS = (GOLDEN / name for name in ("models", "weights", "checkpoints"))

SMOOTHING = {"bart": 0.1, "t5": 0.0, "mbart": 0.1, "fsmt": 0.0, "pegasus": 0.1, "marian": 0.0}
FAMILIES = tuple(SMOOTHING)
RANKS = {
    "cpu": 1,
    "cpu-ddp": 2,
    "cpu-oss": 2,
    "cpu-zero1": 2,
    "cpu-zero2": 2,
    "cpu-zero3": 2,
    "cpu-xla": 4,
    "cpu-xla-fsdp": 4,
}
"""Profile -> ranks, or virtual devices. XLA has its own interpreter, with a torch of its own."""
XLA = ("cpu-xla", "cpu-xla-fsdp")
LEARNING_RATE, WARMUP = 5e-3, 4
STEPS, SAVED_AT, ACCUMULATION, ROWS_PER_STEP, ROWS = 20, 10, 2, 16, 112
"""An epoch has 7 steps: 20 steps see three of its orders, and step 10 is inside one."""
LEARNING_RATES = LEARNING_RATE * STEPS / 2
"""Their sum over the steps: linear, up and down to 0."""
CHECKPOINT_FAMILY = "bart"
CHECKPOINT_PROFILES = ("cpu", "cpu-oss", "cpu-zero2", "cpu-zero3", "cpu-xla-fsdp")

LIMIT_S = 500
FIGURES = ("loss", "grad_norm", "nll_loss", "learning_rate")

_LEXICON = {
    "one": "ein", "two": "zwei", "three": "drei", "some": "einige", "no": "keine", "old": "alte",
    "red": "rote", "small": "kleine", "green": "grüne", "quick": "schnelle", "cats": "Katzen",
    "dogs": "Hunde", "houses": "Häuser", "trees": "Bäume", "children": "Kinder", "see": "sehen",
    "like": "mögen", "find": "finden", "know": "kennen", "today": "heute", "often": "oft",
    "here": "hier", "there": "dort", "and": "und",
}  # fmt: skip
_COUNTS, _COLOURS, _NOUNS, _DOES, _WHEN = (
    ("one", "two", "three", "some", "no"),
    ("old", "red", "small", "green", "quick"),
    ("cats", "dogs", "houses", "trees", "children"),
    ("see", "like", "find", "know"),
    ("today", "often", "here", "there"),
)


def write_pairs(folder: Path, *, rows: int, seed: int) -> Path:
    """``train.source`` and ``train.target``: sentences of 3 to about 16 words, the same each time.

    The target puts when and where first, so that a model has some word order to learn.
    """
    draw = random.Random(seed)

    def noun_phrase() -> list[str]:
        colours = draw.sample(_COLOURS, draw.choice((0, 0, 1, 1, 2)))
        return [draw.choice(_COUNTS), *colours, draw.choice(_NOUNS)]

    def noun_phrases() -> list[str]:
        return noun_phrase() + (["and", *noun_phrase()] if draw.random() < 0.3 else [])

    lines: dict[str, list[str]] = {"source": [], "target": []}
    for _ in range(rows):
        subject, does = noun_phrases(), draw.choice(_DOES)
        rest = noun_phrases() if draw.random() < 0.7 else []
        when = [draw.choice(_WHEN)] if draw.random() < 0.6 else []
        lines["source"].append(" ".join([*subject, does, *rest, *when]))
        target = [*when, does, *subject, *rest] if when else [*subject, does, *rest]
        lines["target"].append(" ".join(_LEXICON[word] for word in target))
    folder.mkdir(parents=True, exist_ok=True)
    for side, texts in lines.items():
        (folder / f"train.{side}").write_text("".join(f"{t}\n" for t in texts), encoding="utf-8")
    return folder


def train_words(family: str, profile: str, *, data: Path, output: Path, **more: Any) -> list[str]:
    """``s2s-scale train`` of one cell: the same rows in each step under every profile.

    ``more``: further options, or other values.
    """
    options: dict[str, Any] = {
        "profile": profile,
        "model_name_or_path": (MODELS / family).relative_to(ROOT),  # checkpoints hold it
        "data_dir": data,
        "data_cache_dir": data.parent / "cache",
        "output_dir": output,
        "max_source_length": 64,
        "max_target_length": 64,
        "bf16": "false",
        "batching": "fixed",
        "per_device_train_batch_size": ROWS_PER_STEP // ACCUMULATION // RANKS[profile],
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "linear",
        "warmup_steps": WARMUP,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "label_smoothing": SMOOTHING[family],
        "optim": "adamw_torch",
        # Adam divides by the second moment's root: with a smaller epsilon, the rounding errors of
        # small gradients would become updates of full size.
        "adam_epsilon": 1e-5,
        "seed": 1,
        "logging_steps": 1,
        "logging_first_step": "true",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    if family == "mbart":
        options |= {"src_lang": "en_XX", "tgt_lang": "de_DE"}
    if profile in XLA:
        options["num_buckets"] = 1  # one shape: two compilations fewer
    return words_of("train", {**options, **more})


def words_of(command: str, options: Mapping[str, Any]) -> list[str]:
    """The words of a command with ``--name value`` for each option."""
    return [command, *(str(word) for pair in options.items() for word in (f"--{pair[0]}", pair[1]))]


class CommandFailed(Exception):
    """A command's exit code was not 0; the message holds the end of what it printed."""

    @property
    def cause(self) -> str:
        """The last line that names an exception."""
        text = str(self).replace(f"{ROOT}/", "")
        named = r"^(?:\[rank\d+\]: )?(\w*(?:Error|Exception)\b.*)$"
        lines = re.findall(named, text, re.MULTILINE)
        return lines[-1] if lines else text.splitlines()[-1]


def environment(folder: Path) -> dict[str, str]:
    """A command's variables: nothing of the user's own, one thread, this checkout's package."""
    kept = {k: v for k, v in os.environ.items() if not re.match(r"(OMP_|MKL_|S2S_|PJRT_|XLA_)", k)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {
        **kept,
        "OMP_NUM_THREADS": "1",  # sums to the bit need one number of threads
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "USE_TORCH_XLA": "0",
        "XDG_CONFIG_HOME": str(folder / "config"),
        "S2S_SCALE_CACHE": str(folder / "cache"),
    }


def run_commands(
    commands: Sequence[Sequence[str]], folder: Path, *, python: str = sys.executable
) -> None:
    """Run ``s2s-scale WORDS`` for each of ``commands``.

    One process runs them one after the other, since importing torch takes longer than most of them.

    Raises:
        CommandFailed: a command failed; those after it were not run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "commands.json"
    job.write_text(json.dumps([list(words) for words in commands]), encoding="utf-8")
    run_python(["-m", "tests.golden.runs", str(job)], folder, python=python)


def run_python(words: Sequence[str], folder: Path, *, python: str = sys.executable) -> str:
    """Run ``python WORDS`` and return what it printed.

    Raises:
        CommandFailed: exit code other than 0, or still running after ``LIMIT_S`` seconds.
    """
    process = subprocess.Popen(
        [python, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(folder),
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nran past {LIMIT_S} s"
    if process.returncode:
        raise CommandFailed(f"{' '.join(words)}: exit code {process.returncode}\n{output[-4000:]}")
    return output


def environment_of_figures() -> dict[str, str]:
    """What figures follow from to the bit: the processor's kind, and the libraries' versions."""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags")
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                found[name.strip()] = value.strip()
    features = hashlib.sha256(found.pop("flags", "").encode()).hexdigest()[:12]
    return {
        "processor": " ".join([*(found.get(name, "") for name in wanted[:-1]), features]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: Path, value: Any) -> None:
    """JSON with every list of numbers on a line of its own."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Trajectory:
    """One run: its figures at every step, by name, and its final weights, by parameter."""

    figures: dict[str, list[float]]
    weights: dict[str, torch.Tensor]


def read_history(folder: Path) -> list[dict[str, float]]:
    """What a run logged of its steps, in their order."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "grad_norm" in entry]


def read_run(folder: Path, *, first_step: int = 1) -> Trajectory:
    """The run that a command left in ``folder``; it must have logged each step once."""
    steps = read_history(folder)
    assert [entry["step"] for entry in steps][first_step - 1 :] == list(
        range(first_step, STEPS + 1)
    )
    figures = {name: [float(entry[name]) for entry in steps[first_step - 1 :]] for name in FIGURES}
    return Trajectory(figures, load_file(folder / "model.safetensors"))


def trained(
    cells: Iterable[tuple[str, str]],
    folder: Path,
    *,
    xla_python: str = sys.executable,
    more: Callable[[str, str], Mapping[str, Any]] = lambda family, profile: {},
) -> Iterator[tuple[str, str, Trajectory | CommandFailed]]:
    """(family, profile, its run) for each (family, profile); a run that fails is its error.

    ``folder / profile / family`` holds what it wrote. ``more``: further options of a cell.
    """
    data = write_pairs(folder / "data", rows=ROWS, seed=0)
    cells = list(cells)
    for profile in dict.fromkeys(profile for _, profile in cells):
        families = [family for family, other in cells if other == profile]
        python = xla_python if profile in XLA else sys.executable
        outputs = {family: folder / profile / family for family in families}
        commands = {
            family: train_words(
                family, profile, data=data, output=outputs[family], **more(family, profile)
            )
            for family in families
        }
        # A launcher starts processes of its own: nothing to share between its runs.
        together = [families] if RANKS[profile] == 1 or profile in XLA else [[f] for f in families]
        for some in together:
            failure = None
            try:
                run_commands([commands[f] for f in some], folder / profile, python=python)
            except CommandFailed as error:
                failure = error
            for family in some:
                done = (outputs[family] / "train_results.json").is_file()
                if not done and failure is None:
                    raise AssertionError(f"{outputs[family]}: no results, and no error")
                yield family, profile, read_run(outputs[family]) if done else failure


def main() -> int:
    """Run the commands that a JSON file lists; the exit code of the first that fails."""
    import runpy

    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = ["s2s-scale", *words]
        try:
            runpy.run_module("s2s_scale", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                return int(end.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
