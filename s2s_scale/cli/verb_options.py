"""Which options each verb takes, and what those of the dataclasses mean to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

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
