"""The verbs of the command line and their help texts. Imports nothing heavy.

What each verb checks of the values that it is given, before any work.

Which options each verb takes, and what those of the dataclasses mean to it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2s_scale.settings.options import Option, data_options, model_options, option, training_options

ARCHITECTURES = ("bart", "t5", "mbart", "fsmt", "pegasus", "marian")
SIZES = ("tiny", "small", "base")

LAUNCH = (
    option(
        "profile",
        "str",
        None,
        "launch",
        "Launcher profile: a name ('s2s-scale profiles' lists them) or the path of a YAML file. "
        "Default: gpu where a CUDA device is usable, else cpu.",
    ),
    option(
        "num_processes",
        "int",
        None,
        "launch",
        "Processes per host, one rank each. Default: the profile's number, or all slots.",
    ),
    option(
        "hostfile",
        "str",
        None,
        "launch",
        "Hosts to run on, lines such as 'worker-1 slots=4'; for profiles with launcher deepspeed.",
    ),
    option("num_nodes", "int", None, "launch", "How many hosts, the first of the host file."),
    option(
        "node_rank", "int", None, "launch", "Which of --num_nodes hosts this is; with torchrun."
    ),
    option(
        "include", "str", None, "launch", "Hosts and slots to use, such as worker-1@worker-2:0,2."
    ),
    option("exclude", "str", None, "launch", "Hosts and slots not to use, written likewise."),
    option(
        "master_addr", "str", None, "launch", "Address of the first host; by default it is asked."
    ),
    option("master_port", "int", None, "launch", "Port on the first host. Default: a free one."),
    option(
        "launcher_runner",
        "str",
        None,
        "launch",
        "What DeepSpeed reaches the hosts by. Default: pdsh.",
        choices=("pdsh", "openmpi", "mpich", "mvapich", "slurm", "impi"),
    ),
    option(
        "max_restarts",
        "int",
        None,
        "launch",
        "After a fault (a rank killed, hung or cut off) start the run again from its newest "
        "checkpoint, at most so often. Default: 0.",
    ),
    option(
        "min_processes",
        "int",
        None,
        "launch",
        "Start it again with fewer processes where a host or device is gone, but with no fewer "
        "than this; steps keep their rows. Default: all are needed.",
    ),
    option("dry_run", "bool", False, "launch", "Show what would be started, and start nothing."),
)
# Training options that also matter where a model is only evaluated.
EVALUATION_NAMES = (
    "output_dir per_device_eval_batch_size eval_tokens_per_device num_buckets "
    "eval_accumulation_steps "
    "prediction_loss_only "
    "predict_with_generate generation_engine generation_max_length generation_num_beams "
    "generation_config "
    "label_smoothing_factor label_smoothing loss_reduction linear_cross_entropy bf16 fp16 "
    "bf16_full_eval fp16_full_eval tf32 torch_compile torch_compile_backend torch_compile_mode "
    "use_cpu seed full_determinism dataloader_num_workers dataloader_pin_memory "
    "log_level disable_tqdm"
).split()
GENERATE_TRAINING_NAMES = (
    "bf16_full_eval",
    "fp16_full_eval",
    "use_cpu",
    "seed",
    "generation_engine",
)
PLAN_NAMES = (
    "per_device_train_batch_size gradient_accumulation_steps seed data_seed batching "
    "tokens_per_step groups_per_step tokens_per_row max_tokens_per_device num_buckets "
    "sortish_sampler "
    "train_sampling_strategy dataloader_drop_last"
).split()
DATA_SOURCES = "data_dir train_file dataset_name".split()
DATA_READING = (
    *DATA_SOURCES,
    *"source_column target_column dataset_config_name src_lang tgt_lang n_train".split(),
)
PLAN_DATA_NAMES = (
    *DATA_READING,
    *"source_prefix max_source_length max_target_length long_rows data_cache_dir".split(),
    *"overwrite_cache preprocessing_num_workers".split(),
)
GENERATE_DATA_NAMES = "source_prefix src_lang tgt_lang task max_source_length metrics".split()

GENERATE = (
    option("input", "str", "-", "files", "Source texts, one per line; '-': standard input."),
    option("output", "str", "-", "files", "Generated texts, one per line; '-': standard output."),
    option("reference", "str", None, "files", "Target texts, one per line, for --metrics."),
    option("overwrite", "bool", False, "files", "Replace an --output file that exists."),
    option("num_beams", "int", None, "generation", "Beams; 1: greedy."),
    option("length_penalty", "float", None, "generation", "Above 0 favours long text (beams)."),
    option("max_length", "int", None, "generation", "Longest output in tokens, start included."),
    option("max_new_tokens", "int", None, "generation", "Longest output in tokens."),
    option("num_return_sequences", "int", None, "generation", "Outputs per row, best first."),
    option("no_repeat_ngram_size", "int", None, "generation", "No n-gram of this size twice."),
    option("do_sample", "bool", False, "generation", "Sample instead of taking the likeliest."),
    option("temperature", "float", None, "generation", "Sampling temperature, above 0."),
    option("top_k", "int", None, "generation", "Sample among the K likeliest tokens."),
    option("top_p", "float", None, "generation", "Sample among tokens of this probability mass."),
    option("batch_size", "int", 32, "generation", "Rows generated at once."),
    option(
        "search",
        "str",
        None,
        "generation",
        "Grid of settings such as 'num_beams=4:8 length_penalty=0.8:1.0': every combination is "
        "run and scored against --reference, and a table is printed.",
    ),
)
DOCTOR = (
    option("parity", "bool", False, "doctor", "Compute ten steps under the profile and compare."),
    option(
        "families",
        "list[str]",
        ["t5"],
        "doctor",
        "Model families that --parity computes.",
        choices=ARCHITECTURES,
    ),
    option("output_dir", "str", ".", "doctor", "Folder that is looked at; all hosts share it."),
    option("parity_folder", "str", None, "doctor", "Set for the ranks of --parity, by itself."),
)
EVALUATE = (
    option("split", "str", "test", "data", "Which split to evaluate on.", choices=("val", "test")),
)
NEW_MODEL = (
    option(
        "architecture",
        "str",
        None,
        "model",
        "Family of the model.",
        choices=ARCHITECTURES,
        required=True,
    ),
    option("size", "str", "small", "model", "How large the model is.", choices=SIZES),
    option("vocab_size", "int", 8000, "model", "Tokens of the tokenizer that is trained."),
    option(
        "output_dir", "str", None, "output", "Folder for the model and tokenizer.", required=True
    ),
    option("overwrite", "bool", False, "output", "Replace a model that is in the folder."),
    option("seed", "int", 0, "model", "Seed of the random weights."),
)
PLAN = (
    option("world_size", "int", 1, "batching", "Divide each step over this many ranks."),
    option("epoch", "int", 0, "batching", "Which epoch to show; the first is 0."),
    option("first_steps", "int", 10, "batching", "Show this many steps one by one."),
)
DEMO = (
    option("output_dir", "str", "runs/demo", "output", "Folder of the demo's data, model, report."),
    option("overwrite", "bool", False, "output", "Replace an earlier demo in the folder."),
)
CHECKPOINT_ACTIONS = ("list", "verify", "show", "convert")
CHECKPOINT = (
    option("to", "str", None, "convert", "Format to write.", choices=("portable", "native")),
    option("output_dir", "str", None, "convert", "New folder for the converted checkpoint."),
)

# What an option of the dataclasses means to one verb.
EVALUATE_TEXTS = {
    "model_name_or_path": "Folder or hub id of the model to evaluate.",
    "output_dir": "Folder for results and generated texts. Without it results are only printed.",
    "predict_with_generate": "Generate text and compute --metrics; off: the loss only.",
    "metrics": "Text metrics to compute.",
}
GENERATE_TEXTS = {
    "model_name_or_path": "Folder or hub id of the model that generates.",
    "metrics": "Text metrics to compute against --reference.",
    "seed": "Random seed, for --do_sample.",
    "bf16_full_eval": "Generate in bfloat16.",
    "fp16_full_eval": "Generate in float16.",
    "use_cpu": "Use the CPU even if there is a GPU.",
    "generation_engine": "What generates. 'ctranslate2' converts the model's weights and is "
    "several times as fast, but some texts with several beams may differ.",
}
PLAN_TEXTS = {
    "model_name_or_path": "Folder or hub id of the model whose tokenizer gives the lengths.",
}


def _pick(options: Iterable[Option], names: Iterable[str]) -> list[Option]:
    """The options with these names, in the options' order."""
    wanted = set(names)
    return [entry for entry in options if entry.name in wanted]


def _require(options: Iterable[Option], *names: str) -> list[Option]:
    """The options, those with these names marked as required."""
    return [
        dataclasses.replace(entry, required=True, help=entry.help.replace(" Required.", ""))
        if entry.name in names
        else entry
        for entry in options
    ]


def _reword(options: Iterable[Option], texts: Mapping[str, str]) -> list[Option]:
    """The options, those named in ``texts`` with that help: what they mean to one verb."""
    return [dataclasses.replace(entry, help=texts.get(entry.name, entry.help)) for entry in options]


def train_options() -> list[Option]:
    everything = [*model_options(), *data_options(), *training_options(), *LAUNCH]
    return _require(everything, "model_name_or_path", "output_dir")


TRAINING_ROWS = ("n_train", "train_file", "streaming", "shuffle_buffer")


def evaluate_options() -> list[Option]:
    data = [entry for entry in data_options() if entry.name not in TRAINING_ROWS]
    model = [entry for entry in model_options() if not entry.name.startswith("freeze_")]
    training = _pick(training_options(), EVALUATION_NAMES)
    # Evaluation of a saved model is of its text, unless that is turned off.
    training = [
        dataclasses.replace(entry, default=True) if entry.name == "predict_with_generate" else entry
        for entry in training
    ]
    everything = _reword([*EVALUATE, *model, *data, *training, *LAUNCH], EVALUATE_TEXTS)
    return _require(everything, "model_name_or_path")


def generate_options() -> list[Option]:
    model = [entry for entry in model_options() if not entry.name.startswith("freeze_")]
    data = _pick(data_options(), GENERATE_DATA_NAMES)
    training = _pick(training_options(), GENERATE_TRAINING_NAMES)
    everything = _reword([*GENERATE, *model, *data, *training, *LAUNCH], GENERATE_TEXTS)
    return _require(everything, "model_name_or_path")


def new_model_options() -> list[Option]:
    return [*NEW_MODEL, *_pick(data_options(), DATA_READING)]


def plan_options() -> list[Option]:
    model = [entry for entry in model_options() if not entry.name.startswith("freeze_")]
    data = _pick(data_options(), PLAN_DATA_NAMES)
    training = _pick(training_options(), PLAN_NAMES)
    everything = _reword([*PLAN, *model, *data, *training], PLAN_TEXTS)
    return _require(everything, "model_name_or_path")


# Options of generate that do nothing unless another is given too.
NEEDS_ANOTHER = {
    "metrics": "reference",
    "search": "reference",
    "temperature": "do_sample",
    "top_k": "do_sample",
    "top_p": "do_sample",
}


def check_train(given: Mapping[str, Any]) -> list[str]:
    return _data_problems(given, *DATA_SOURCES) + check_launch(given)


def check_evaluate(given: Mapping[str, Any]) -> list[str]:
    file = "validation_file" if given.get("split") == "val" else "test_file"
    return _data_problems(given, "data_dir", file, "dataset_name") + check_launch(given)


def check_generate(given: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("input", "reference"):
        path = given.get(name)
        if path not in (None, "-") and not Path(path).is_file():
            problems.append(f"--{name}: file '{path}' does not exist; expected a text file")
    output = given.get("output")
    if output not in (None, "-") and Path(output).exists() and not given.get("overwrite"):
        problems.append(f"--output: '{output}' exists; give another name or --overwrite")
    problems += [
        f"--{name}: has no effect without --{needed}; add it"
        for name, needed in NEEDS_ANOTHER.items()
        if given.get(name) is not None and not given.get(needed)
    ]
    problems += _below(given, 1, "num_beams", "max_length", "max_new_tokens", "batch_size")
    problems += _below(given, 1, "num_return_sequences", "no_repeat_ngram_size", "top_k")
    returned, beams = given.get("num_return_sequences"), given.get("num_beams")
    if returned and beams and returned > beams and not given.get("do_sample"):
        problems.append(
            f"--num_return_sequences: {returned} is more than --num_beams {beams}; "
            "raise --num_beams or give --do_sample"
        )
    return problems


def check_new_model(given: Mapping[str, Any]) -> list[str]:
    problems = _data_problems(given, *DATA_SOURCES) + _below(given, 1, "vocab_size")
    languages = [name for name in ("src_lang", "tgt_lang") if not given.get(name)]
    if given.get("architecture") == "mbart" and languages:
        problems.append(
            f"--architecture mbart: needs {' and '.join(f'--{name}' for name in languages)}, "
            "such as --src_lang en_XX --tgt_lang de_DE"
        )
    return problems


def check_plan(given: Mapping[str, Any]) -> list[str]:
    problems = _data_problems(given, *DATA_SOURCES) + _below(given, 0, "epoch")
    return problems + _below(given, 1, "world_size", "first_steps")


def check_launch(given: Mapping[str, Any]) -> list[str]:
    problems = _below(given, 1, "num_processes", "num_nodes", "min_processes")
    problems += _below(given, 0, "node_rank", "max_restarts")
    port = given.get("master_port")
    if port is not None and not 1 <= port <= 65535:
        problems.append(f"--master_port: expected a port from 1 to 65535, got {port}")
    return problems


def _data_problems(given: Mapping[str, Any], *sources: str) -> list[str]:
    """A problem unless one of the options in ``sources`` says where the text is."""
    if any(given.get(name) for name in sources):
        return []
    flags = " or ".join(f"--{name}" for name in sources)
    return [f"no data: expected {flags}"]


def _below(given: Mapping[str, Any], least: int, *names: str) -> list[str]:
    """A problem for each number that is given and smaller than ``least``."""
    return [
        f"--{name}: expected a whole number of at least {least}, got {given[name]}"
        for name in names
        if given.get(name) is not None and given[name] < least
    ]


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
