"""``python -m tests.golden.record``: write the golden files anew from what the package does now.

They say what must not change, so renew them only where a change of the figures is meant, and say
in the commit which and why. ``--parts`` renews some of them; ``--profiles`` and ``--families``
those trajectories, and keeps the others. The models come first: all else follows from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.golden import texts
from tests.golden.runs import (
    CHECKPOINT_FAMILY,
    CHECKPOINT_PROFILES,
    CHECKPOINTS,
    FAMILIES,
    MODELS,
    RANKS,
    SAVED_AT,
    TRAJECTORIES,
    WEIGHTS,
    CommandFailed,
    Trajectory,
    environment_of_figures,
    run_commands,
    trained,
    words_of,
    write_json,
    write_pairs,
)

PARTS = ("models", "trajectories", "plans", "texts")


def main() -> int:
    """Renew the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--profiles", nargs="+", choices=RANKS, default=tuple(RANKS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--xla_python", default=".venv-xla/bin/python")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="s2s-scale-golden-") as scratch:
        folder = Path(scratch)
        if "models" in options.parts:
            data = write_pairs(folder / "model-data", rows=400, seed=1)
            for family in FAMILIES:
                make_model(family, MODELS / family, folder / "new", data=data, width=16)
        if "trajectories" in options.parts:
            cells = [(f, profile) for profile in options.profiles for f in options.families]
            record_trajectories(cells, folder / "runs", xla_python=options.xla_python)
        if "plans" in options.parts:
            from tests.golden import plans

            plans.record(folder / "plans")
        if "texts" in options.parts:
            for family in texts.FAMILIES:
                start = folder / "texts" / f"start-{family}"
                data = write_pairs(folder / "texts" / "data", rows=2000, seed=1)
                make_model(family, start, folder / "new", data=data, width=32)
                texts.record(family, start, folder / "texts" / family, data=data)
    return 0


def make_model(family: str, folder: Path, scratch: Path, *, data: Path, width: int) -> None:
    """A saved model of two layers, as ``new-model`` writes it but narrower, without dropout."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig

    made = scratch / f"{family}-{width}"
    options: dict[str, Any] = {
        "architecture": family,
        "size": "tiny",
        "vocab_size": 280 if family == "bart" else 128,  # BART's pieces are at least 256 bytes
        "data_dir": data,
        "output_dir": made,
    }
    if family == "mbart":
        options |= {"src_lang": "en_XX", "tgt_lang": "de_DE"}
    run_commands([words_of("new-model", options)], scratch)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    if family == "t5":
        narrow = {
            "d_model": width,
            "d_kv": width // 2,
            "d_ff": 2 * width,
            "num_heads": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "dropout_rate": 0.0,
        }
    else:
        narrow = {
            "d_model": width,
            "encoder_ffn_dim": 2 * width,
            "decoder_ffn_dim": 2 * width,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 64,
            "init_std": width**-0.5,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        }
    config = AutoConfig.from_pretrained(made)
    for name, value in narrow.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.generation_config = GenerationConfig.from_pretrained(made)
    model.save_pretrained(folder)


def record_trajectories(cells: Sequence[tuple[str, str]], folder: Path, *, xla_python: str) -> None:
    """The figures of each (family, profile); of some the final weights and a checkpoint."""

    def saves(family: str, profile: str) -> dict[str, Any]:
        if family == CHECKPOINT_FAMILY and profile in CHECKPOINT_PROFILES:
            options: dict[str, Any] = {"save_strategy": "steps", "save_steps": SAVED_AT}
            if "zero" in profile:  # the profile's own, by a path that names no machine's folder
                options["deepspeed"] = f"ds_configs/{profile.removeprefix('cpu-')}.json"
            return options
        return {}

    found: dict[tuple[str, str], Trajectory | CommandFailed] = {}
    for family, profile, run in trained(cells, folder, xla_python=xla_python, more=saves):
        print(family, profile, flush=True)
        found[family, profile] = run
        if isinstance(run, CommandFailed):
            continue
        if profile == "cpu":
            WEIGHTS.mkdir(exist_ok=True)
            save_file(run.weights, WEIGHTS / f"{family}.safetensors")
        if saves(family, profile):
            target = CHECKPOINTS / profile / f"checkpoint-{SAVED_AT}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder / profile / family / target.name, target)
    golden: dict[str, Any] = {"environment": {}, "figures": {}, "failing": {}}
    if TRAJECTORIES.is_file():
        golden = json.loads(TRAJECTORIES.read_text(encoding="utf-8"))
    if any(profile == "cpu" for _, profile in cells):
        golden["environment"] = environment_of_figures()
    for (family, profile), run in found.items():
        figures, failing = (golden[name].setdefault(family, {}) for name in ("figures", "failing"))
        figures.pop(profile, None)
        failing.pop(profile, None)
        if isinstance(run, CommandFailed):
            failing[profile] = run.cause
        else:
            figures[profile] = run.figures
    for figures in golden["figures"].values():
        figures.update({name: figures.pop(name) for name in RANKS if name in figures})
    write_json(TRAJECTORIES, golden)


if __name__ == "__main__":
    sys.exit(main())
