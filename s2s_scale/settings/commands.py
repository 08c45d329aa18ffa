"""The commands of the command line: their options, texts and checks. Imports nothing heavy.

A command takes options of three kinds: its own, which the dataclasses here describe as ``config``
does those of models, data and training; those of the latter that concern it; and, where a profile
starts it, ``ProfileOptions`` and ``LaunchOptions``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2s_scale.config import DataArguments, ModelArguments, setting
from s2s_scale.settings.options import Option, options_of, training_options

ARCHITECTURES = ("bart", "t5", "mbart", "fsmt", "pegasus", "marian")
SIZES = ("tiny", "small", "base")
CHECKPOINT_ACTIONS = ("list", "verify", "show", "convert")


@dataclass(frozen=True)
class ProfileOptions:
    """Which profile starts a command, and whether it does."""

    profile: str | None = setting(
        None,
        "launch",
        "Launcher profile: a name ('s2s-scale profiles' lists them) or the path of a YAML file. "
        "Default: gpu if a CUDA device is usable, else cpu.",
    )
    dry_run: bool = setting(False, "launch", "Show what would be started, and start nothing.")


@dataclass(frozen=True)
class LaunchOptions:
    """Hosts and processes as given on the command line; None where not given."""

    num_processes: int | None = setting(
        None,
        "launch",
        "Processes per host, one rank each. Default: the profile's number, or all slots.",
        least=1,
    )
    num_nodes: int | None = setting(
        None, "launch", "How many hosts to use, the first ones of the host file.", least=1
    )
    node_rank: int | None = setting(
        None, "launch", "Which of --num_nodes hosts this one is; with torchrun.", least=0
    )
    hostfile: str | None = setting(
        None,
        "launch",
        "Hosts to run on, lines such as 'worker-1 slots=4'; for profiles with launcher deepspeed.",
    )
    include: str | None = setting(
        None, "launch", "Hosts and slots to use, such as worker-1@worker-2:0,2."
    )
    exclude: str | None = setting(
        None, "launch", "Hosts and slots not to use, in the form of --include."
    )
    master_addr: str | None = setting(
        None, "launch", "Address of the first host. Default: the host is asked for it."
    )
    master_port: int | None = setting(
        None, "launch", "Port on the first host. Default: a free one."
    )
    launcher_runner: str | None = setting(
        None,
        "launch",
        "How DeepSpeed reaches the other hosts. Default: pdsh.",
        choices=("pdsh", "openmpi", "mpich", "mvapich", "slurm", "impi"),
    )
    max_restarts: int | None = setting(
        None,
        "launch",
        "After a fault (a rank killed, hung or cut off), restart the run from its newest "
        "checkpoint, at most this many times. Default: 0.",
        least=0,
    )
    min_processes: int | None = setting(
        None,
        "launch",
        "Restart with fewer processes if a host or device is gone, but not with fewer than this; "
        "steps keep their rows. Default: all are needed.",
        least=1,
    )

    def given(self) -> list[str]:
        """The names of those that are given."""
        return [name for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class EvaluateOptions:
    split: str = setting("test", "data", "Which split to evaluate on.", choices=("val", "test"))


@dataclass(frozen=True)
class GenerateOptions:
    input: str = setting("-", "files", "Source texts, one per line; '-': standard input.")
    output: str = setting("-", "files", "Generated texts, one per line; '-': standard output.")
    reference: str | None = setting(None, "files", "Target texts, one per line, for --metrics.")
    overwrite: bool = setting(False, "files", "Replace an --output file that exists.")
    num_beams: int | None = setting(None, "generation", "Beams; 1: greedy search.", least=1)
    length_penalty: float | None = setting(
        None, "generation", "Above 0 favours longer text (with beams)."
    )
    max_length: int | None = setting(
        None, "generation", "Maximum output length in tokens, start token included.", least=1
    )
    max_new_tokens: int | None = setting(
        None, "generation", "Maximum output length in tokens.", least=1
    )
    num_return_sequences: int | None = setting(
        None, "generation", "Outputs per row, best first.", least=1
    )
    no_repeat_ngram_size: int | None = setting(
        None, "generation", "No n-gram of this size occurs twice.", least=1
    )
    do_sample: bool = setting(False, "generation", "Sample instead of taking the likeliest.")
    temperature: float | None = setting(None, "generation", "Sampling temperature, above 0.")
    top_k: int | None = setting(None, "generation", "Sample from the K likeliest tokens.", least=1)
    top_p: float | None = setting(
        None, "generation", "Sample from the likeliest tokens that have this probability together."
    )
    batch_size: int = setting(32, "generation", "Rows generated at once.", least=1)
    search: str | None = setting(
        None,
        "generation",
        "Grid of settings such as 'num_beams=4:8 length_penalty=0.8:1.0': every combination is "
        "run and scored against --reference, and a table is printed.",
    )


@dataclass(frozen=True)
class NewModelOptions:
    architecture: str = setting(
        "", "model", "Family of the model.", choices=ARCHITECTURES, required=True
    )
    size: str = setting("small", "model", "How large the model is.", choices=SIZES)
    vocab_size: int = setting(8000, "model", "Tokens of the tokenizer that is trained.", least=1)
    output_dir: str = setting("", "output", "Folder for the model and tokenizer.", required=True)
    overwrite: bool = setting(False, "output", "Replace a model that is in the folder.")
    seed: int = setting(0, "model", "Seed of the random weights.")


@dataclass(frozen=True)
class PlanOptions:
    world_size: int = setting(1, "batching", "Divide each step among this many ranks.", least=1)
    epoch: int = setting(0, "batching", "Which epoch to show; the first is 0.", least=0)
    first_steps: int = setting(10, "batching", "Show this many steps one by one.", least=1)


@dataclass(frozen=True)
class CheckpointOptions:
    output_dir: str | None = setting(None, "convert", "New folder for the converted checkpoint.")


@dataclass(frozen=True)
class DoctorOptions:
    parity: bool = setting(False, "doctor", "Compute ten steps under the profile and compare.")
    families: list[str] = setting(
        ["t5"], "doctor", "Model families that --parity computes.", choices=ARCHITECTURES
    )
    output_dir: str = setting(".", "doctor", "Folder to check; all hosts must share it.")
    parity_folder: str | None = setting(
        None, "doctor", "For internal use: --parity sets it for its ranks."
    )


@dataclass(frozen=True)
class DemoOptions:
    output_dir: str = setting("runs/demo", "output", "Folder for the demo's data, model, report.")
    overwrite: bool = setting(False, "output", "Replace an earlier demo in the folder.")


# The options of models, data and training that each command takes.
MODEL = {entry.name for entry in dataclasses.fields(ModelArguments)}
LOADED_MODEL = {name for name in MODEL if not name.startswith("freeze_")}
DATA = {entry.name for entry in dataclasses.fields(DataArguments)}
DATA_SOURCES = ("data_dir", "train_file", "dataset_name")
DATA_READING = {
    *DATA_SOURCES,
    *"source_column target_column dataset_config_name src_lang tgt_lang n_train".split(),
}
EVALUATE = {
    *LOADED_MODEL,
    *DATA - {"n_train", "train_file", "streaming", "shuffle_buffer"},
    *"output_dir per_device_eval_batch_size eval_tokens_per_device num_buckets".split(),
    *"eval_accumulation_steps prediction_loss_only predict_with_generate".split(),
    *"generation_engine generation_max_length generation_num_beams generation_config".split(),
    *"label_smoothing_factor label_smoothing loss_reduction linear_cross_entropy".split(),
    *"bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu seed full_determinism".split(),
    *"torch_compile torch_compile_backend torch_compile_mode".split(),
    *"dataloader_num_workers dataloader_pin_memory log_level disable_tqdm".split(),
}
GENERATE = {
    *LOADED_MODEL,
    *"source_prefix src_lang tgt_lang task max_source_length metrics".split(),
    *"bf16_full_eval fp16_full_eval use_cpu seed generation_engine".split(),
}
PLAN = {
    *LOADED_MODEL,
    *DATA_READING,
    *"source_prefix max_source_length max_target_length long_rows data_cache_dir".split(),
    *"overwrite_cache preprocessing_num_workers".split(),
    *"per_device_train_batch_size gradient_accumulation_steps seed data_seed batching".split(),
    *"tokens_per_step groups_per_step tokens_per_row max_tokens_per_device num_buckets".split(),
    *"sortish_sampler train_sampling_strategy dataloader_drop_last".split(),
}

# Options of generate that do nothing unless another is given too.
NEEDS_ANOTHER = {
    "metrics": "reference",
    "search": "reference",
    "temperature": "do_sample",
    "top_k": "do_sample",
    "top_p": "do_sample",
}


def check_data(given: Mapping[str, Any], sources: Iterable[str] = DATA_SOURCES) -> list[str]:
    """A problem unless one of the options in ``sources`` says where the text is."""
    if any(given.get(name) for name in sources):
        return []
    return [f"no data: expected {' or '.join(f'--{name}' for name in sources)}"]


def check_evaluate(given: Mapping[str, Any]) -> list[str]:
    file = "validation_file" if given.get("split") == "val" else "test_file"
    return check_data(given, ("data_dir", file, "dataset_name"))


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
    returned, beams = given.get("num_return_sequences"), given.get("num_beams")
    if returned and beams and returned > beams and not given.get("do_sample"):
        problems.append(
            f"--num_return_sequences: {returned} is more than --num_beams {beams}; "
            "raise --num_beams or give --do_sample"
        )
    return problems


def check_new_model(given: Mapping[str, Any]) -> list[str]:
    problems = check_data(given)
    languages = [name for name in ("src_lang", "tgt_lang") if not given.get(name)]
    if given.get("architecture") == "mbart" and languages:
        problems.append(
            f"--architecture mbart: needs {' and '.join(f'--{name}' for name in languages)}, "
            "such as --src_lang en_XX --tgt_lang de_DE"
        )
    return problems


@dataclass(frozen=True)
class Command:
    """One command.

    ``own`` is the dataclass of its own options. ``shared`` are the names of the model, data and
    training options that it takes, None for all; ``changes`` holds what differs in those, such as
    ``{"seed": {"help": …}}``. ``launched``: a profile starts it. ``positional`` is what it takes
    without a flag: a settings FILE, a NAME, a FOLDER, or nothing. ``check`` gets the values given
    and the defaults of its own options in one mapping, and returns the problems.
    """

    name: str
    summary: str
    description: str
    own: type | None = None
    shared: set[str] | None = field(default_factory=set)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    launched: bool = False
    positional: str | None = None
    examples: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], list[str]] | None = None

    def own_options(self) -> list[Option]:
        """The options that are not of the model, data and training dataclasses."""
        classes = (self.own, *((ProfileOptions, LaunchOptions) if self.launched else ()))
        return [option for cls in classes if cls is not None for option in options_of(cls)]

    def options(self) -> list[Option]:
        """All options, its own first."""
        light = [*options_of(ModelArguments), *options_of(DataArguments)]
        needs_training = self.shared is None or self.shared - MODEL - DATA
        shared = [
            dataclasses.replace(option, **self.changes.get(option.name, {}))
            for option in (light + training_options() if needs_training else light)
            if self.shared is None or option.name in self.shared
        ]
        return [*self.own_options(), *shared]

    def options_by_name(self) -> dict[str, Option]:
        """All options by name and by alias."""
        return {name: entry for entry in self.options() for name in (entry.name, *entry.aliases)}


REQUIRED = {"required": True}


@functools.cache
def all_commands() -> dict[str, Command]:
    """All commands by name, in the order of the help."""
    table = (
        Command(
            "train",
            "train a model; then evaluate it on val and test if asked",
            "Train a model on pairs of text. With --do_eval and --do_predict it is then evaluated "
            "on the val and test splits.",
            shared=None,
            changes={"model_name_or_path": REQUIRED, "output_dir": REQUIRED},
            launched=True,
            positional="FILE",
            examples=(
                "s2s-scale train --model models/new --data_dir data --output_dir runs/first",
                "s2s-scale train conf.yaml --learning_rate 3e-4 --max_steps 1000",
            ),
            check=check_data,
        ),
        Command(
            "evaluate",
            "loss and text metrics of a saved model on val or test",
            "Evaluate a saved model on a split: loss, BLEU, chrF, ROUGE and exact match.",
            own=EvaluateOptions,
            shared=EVALUATE,
            changes={
                "model_name_or_path": REQUIRED
                | {"help": "Folder or hub id of the model to evaluate."},
                "output_dir": {
                    "help": "Folder for results and generated texts. Default: results are only "
                    "printed."
                },
                # A saved model is judged by its texts, unless that is turned off.
                "predict_with_generate": {
                    "default": True,
                    "help": "Generate text and compute --metrics; off: the loss only.",
                },
                "metrics": {"help": "Text metrics to compute."},
            },
            launched=True,
            positional="FILE",
            examples=("s2s-scale evaluate --model runs/first --data_dir data --split val",),
            check=check_evaluate,
        ),
        Command(
            "generate",
            "generate a target text for each source line",
            "Generate a target text for each line of a file or of standard input.",
            own=GenerateOptions,
            shared=GENERATE,
            changes={
                "model_name_or_path": REQUIRED
                | {"help": "Folder or hub id of the model that generates."},
                "metrics": {"help": "Text metrics to compute against --reference."},
                "seed": {"help": "Random seed, for --do_sample."},
                "bf16_full_eval": {"help": "Generate in bfloat16."},
                "fp16_full_eval": {"help": "Generate in float16."},
                "use_cpu": {"help": "Use the CPU even if there is a GPU."},
                "generation_engine": {
                    "help": "What generates. 'ctranslate2' converts the model's weights and is "
                    "several times as fast, but some texts may differ with several beams."
                },
            },
            launched=True,
            positional="FILE",
            examples=(
                "s2s-scale generate --model runs/first < source.txt > target.txt",
                "s2s-scale generate --model runs/first --input val.source "
                "--reference val.target --search 'num_beams=4:8'",
            ),
            check=check_generate,
        ),
        Command(
            "new-model",
            "make a fresh model and train its tokenizer on your text",
            "Train a tokenizer on your text and save it with a model of random weights, ready "
            "for 's2s-scale train'.",
            own=NewModelOptions,
            shared=DATA_READING,
            positional="FILE",
            examples=(
                "s2s-scale new-model --architecture marian --size tiny --data_dir data "
                "--output_dir models/new",
            ),
            check=check_new_model,
        ),
        Command(
            "profiles",
            "list the launcher profiles, or show one",
            "List the launcher profiles that are found, or show one with the origin of each value.",
            positional="NAME",
            examples=("s2s-scale profiles", "s2s-scale profiles cpu"),
        ),
        Command(
            "plan",
            "show which rows make up each training step",
            "Show the batch plan: which rows make up each step, and how much padding that takes.",
            own=PlanOptions,
            shared=PLAN,
            changes={
                "model_name_or_path": REQUIRED
                | {"help": "Folder or hub id of the model whose tokenizer gives the lengths."},
            },
            positional="FILE",
            examples=("s2s-scale plan --model models/new --data_dir data --batching sortish",),
            check=check_data,
        ),
        Command(
            "checkpoint",
            "list, verify, show or convert checkpoints",
            "Inspect checkpoints. 'list' and 'verify' read every byte of each checkpoint in FOLDER "
            "and compare it with the manifest; 'show' prints where the run stood and its "
            "settings; 'convert' writes a checkpoint of transformers in the portable format.",
            own=CheckpointOptions,
            positional="FOLDER",
            examples=(
                "s2s-scale checkpoint verify runs/first",
                "s2s-scale checkpoint show runs/first/checkpoint-500",
                "s2s-scale checkpoint convert old/checkpoint-500 --output_dir converted",
            ),
        ),
        Command(
            "doctor",
            "check this machine for a profile; compare its figures",
            "Check versions, devices, compilers, shared memory, network, hosts and disk for a "
            "profile. With --parity a tiny model is trained under the profile, and every figure "
            "is compared with that of a single process that sees the same rows.",
            own=DoctorOptions,
            launched=True,
            examples=(
                "s2s-scale doctor --profile cpu-zero2",
                "s2s-scale doctor --profile gpu-zero3 --hostfile hosts --parity",
            ),
        ),
        Command(
            "demo",
            "train a small translation model here, in minutes",
            "Make a data set of real translations, train a small model on it and write a report.",
            own=DemoOptions,
            examples=("s2s-scale demo",),
        ),
    )
    return {command.name: command for command in table}
