"""The verbs of the command line and their help texts. Imports nothing heavy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from s2s_scale.cli.verb_checks import (
    check_evaluate,
    check_generate,
    check_launch,
    check_new_model,
    check_plan,
    check_train,
)
from s2s_scale.cli.verb_options import (
    CHECKPOINT,
    DEMO,
    DOCTOR,
    EVALUATE,
    GENERATE,
    LAUNCH,
    NEW_MODEL,
    PLAN,
    evaluate_options,
    generate_options,
    new_model_options,
    plan_options,
    train_options,
)
from s2s_scale.settings.options import Option

Check = Callable[[Mapping[str, Any]], Iterable[str]]


@dataclass(frozen=True)
class Verb:
    """A verb: ``options()`` are all it accepts; ``own`` those that no dataclass holds.

    ``positional`` is what stands alone on its command line: a settings FILE, a NAME, a FOLDER,
    or nothing.
    ``check`` gets given values and defaults in one mapping and returns its problems.
    """

    name: str
    summary: str
    description: str
    options: Callable[[], list[Option]]
    own: tuple[Option, ...] = ()
    positional: str | None = None
    examples: tuple[str, ...] = ()
    check: Check | None = None


@functools.cache
def verbs() -> dict[str, Verb]:
    """All verbs by name, in the order of the help."""
    table = (
        Verb(
            "train",
            "train a model; then evaluate it on val and test if asked",
            "Train a model on pairs of text. With --do_eval and --do_predict it is then evaluated "
            "on the val and test splits.",
            train_options,
            own=LAUNCH,
            positional="FILE",
            examples=(
                "s2s-scale train --model models/new --data_dir data --output_dir runs/first",
                "s2s-scale train conf.yaml --learning_rate 3e-4 --max_steps 1000",
            ),
            check=check_train,
        ),
        Verb(
            "evaluate",
            "loss and text metrics of a saved model on val or test",
            "Evaluate a saved model on a split: loss, BLEU, chrF, ROUGE and exact match.",
            evaluate_options,
            own=(*EVALUATE, *LAUNCH),
            positional="FILE",
            examples=("s2s-scale evaluate --model runs/first --data_dir data --split val",),
            check=check_evaluate,
        ),
        Verb(
            "generate",
            "generate a target text for each source line",
            "Generate a target text for each line of a file or of standard input.",
            generate_options,
            own=(*GENERATE, *LAUNCH),
            positional="FILE",
            examples=(
                "s2s-scale generate --model runs/first < source.txt > target.txt",
                "s2s-scale generate --model runs/first --input val.source "
                "--reference val.target --search 'num_beams=4:8'",
            ),
            check=check_generate,
        ),
        Verb(
            "new-model",
            "make a fresh model and train its tokenizer on your text",
            "Train a tokenizer on your text and write it with a model of random weights, ready "
            "for 's2s-scale train'.",
            new_model_options,
            own=NEW_MODEL,
            positional="FILE",
            examples=(
                "s2s-scale new-model --architecture marian --size tiny --data_dir data "
                "--output_dir models/new",
            ),
            check=check_new_model,
        ),
        Verb(
            "profiles",
            "list the launcher profiles, or show one",
            "List the launcher profiles that are found, or show one with the origin of each value.",
            list,
            positional="NAME",
            examples=("s2s-scale profiles", "s2s-scale profiles cpu"),
        ),
        Verb(
            "plan",
            "show which rows make each training step",
            "Show the batch plan: which rows make each step, and how many pads that takes.",
            plan_options,
            own=PLAN,
            positional="FILE",
            examples=("s2s-scale plan --model models/new --data_dir data --batching sortish",),
            check=check_plan,
        ),
        Verb(
            "checkpoint",
            "list, verify, show or convert checkpoints",
            "Look at checkpoints. 'list' and 'verify' read every byte of each one in FOLDER and "
            "compare it with the manifest; 'show' says where the run stood and with which "
            "settings; 'convert' writes the other format.",
            lambda: list(CHECKPOINT),
            own=CHECKPOINT,
            positional="FOLDER",
            examples=(
                "s2s-scale checkpoint verify runs/first",
                "s2s-scale checkpoint show runs/first/checkpoint-500",
                "s2s-scale checkpoint convert runs/first/checkpoint-500 --to native "
                "--output_dir converted",
            ),
        ),
        Verb(
            "doctor",
            "check this machine for a profile; compare its figures",
            "Check versions, devices, compilers, shared memory, network, hosts and disk for a "
            "profile. With --parity a tiny model is trained under the profile, and every figure "
            "is compared with one process that sees the same rows.",
            lambda: [*DOCTOR, *LAUNCH],
            own=(*DOCTOR, *LAUNCH),
            examples=(
                "s2s-scale doctor --profile cpu-zero2",
                "s2s-scale doctor --profile gpu-zero3 --hostfile hosts --parity",
            ),
            check=check_launch,
        ),
        Verb(
            "demo",
            "train a small translation model here, in minutes",
            "Make a data set of real translations, train a small model on it and write a report.",
            lambda: list(DEMO),
            own=DEMO,
            examples=("s2s-scale demo",),
        ),
    )
    return {verb.name: verb for verb in table}
