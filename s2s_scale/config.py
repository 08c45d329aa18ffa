"""The settings of models, data and training, as dataclasses.

The command line reads these fields for its flags and help: the metadata of each field, made by
``setting``, holds all that it shows. ``TrainingExtras`` are the settings that extend transformers'
training arguments; ``arguments.py`` joins the two. Imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from s2s_scale.errors import raise_problems, unknown_name

BATCHING_MODES = ("fixed", "sortish", "tokens", "packed")
LONG_ROWS = ("truncate", "error")
LOSS_REDUCTIONS = ("mean", "sum")
LINEAR_CROSS_ENTROPY = ("auto", "on", "off")
CPU_FUNCTIONS = ("auto", "off")
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_w_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "constant": "constant",
    "constant_w_warmup": "constant_with_warmup",
}
"""Our name of a learning-rate schedule -> transformers' ``lr_scheduler_type``."""
DEFAULT_TOKENS_PER_STEP = 32_768
DEFAULT_STEPS_PER_EPOCH = 256
LEAST_TOKENS_PER_STEP = 4096
DEFAULT_GROUPS_PER_STEP = 16
LEAST_GROUPS_PER_STEP = 4
STREAM_GROUP_TOKENS = 512
DEFAULT_TOKENS_PER_ROW = 1024
DEFAULT_PACKED_TOKENS = 8192
DEFAULT_BUCKETS = 8
DEFAULT_SHUFFLE_BUFFER = 10_000
DEFAULT_FAULT_SECONDS = 120.0
DEFAULT_SPIKE_WINDOW = 50
DEFAULT_GRACE_SECONDS = 60.0
GENERATION_ENGINES = ("transformers", "ctranslate2")
CHANGES = ("data", "tokenizer", "seed", "step_size", "loss", "optimizer", "schedule")
METRICS = ("bleu", "chrf", "rouge", "exact_match")


class Help(str):
    """The help text of a setting, with what else the command line needs to know of it.

    These are no metadata of their own because transformers' ``HfArgumentParser``, which scripts
    use on these classes, hands all metadata to argparse.
    """

    group: str
    """Its heading in ``--help``."""
    least: int | None = None
    """The smallest number that makes sense."""
    aliases: tuple[str, ...] = ()
    required: bool = False


def setting(
    default: Any,
    group: str,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: int | None = None,
    aliases: tuple[str, ...] = (),
    required: bool = False,
) -> Any:
    """A dataclass field with the metadata that the command line shows; lists are copied."""
    help = Help(text)
    help.group, help.least, help.aliases, help.required = group, least, aliases, required
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = choices
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def below_least(settings: object) -> list[str]:
    """A problem for each number in ``settings`` below the least that makes sense."""
    problems = []
    for entry in fields(settings):  # type: ignore[arg-type]
        least = getattr(entry.metadata.get("help"), "least", None)
        value = None if least is None else getattr(settings, entry.name)
        if value is not None and value < least:
            # transformers' HfArgumentParser replaces the text of an annotation by the type itself.
            kind = "a whole number of " if "int" in str(entry.type) else ""
            problems.append(
                f"{entry.name}={value}: expected {kind}at least {least}; give --{entry.name} a "
                "larger value"
            )
    return problems


@dataclass
class ModelArguments:
    """Which model and tokenizer to load, and what is frozen."""

    model_name_or_path: str | None = setting(
        None, "model", "Folder or hub id of the model to start from.", aliases=("model",)
    )
    config_name: str | None = setting(
        None, "model", "Folder or hub id of the configuration. Default: the model's."
    )
    tokenizer_name: str | None = setting(
        None, "model", "Folder or hub id of the tokenizer. Default: the model's."
    )
    cache_dir: str | None = setting(None, "model", "Folder for downloads from the hub.")
    model_revision: str = setting("main", "model", "Branch, tag or commit of the hub model.")
    trust_remote_code: bool = setting(
        False, "model", "Allow the model's repository to run its own Python code here."
    )
    freeze_embeds: bool = setting(
        False, "model", "Do not train token and position embeddings (of encoder and decoder)."
    )
    freeze_encoder: bool = setting(False, "model", "Do not train the encoder.")


@dataclass
class DataArguments:
    """Where the sentence pairs come from and how they become token ids."""

    data_dir: str | None = setting(
        None, "data", "Folder with {train,val,test}.{source,target}, one row per line."
    )
    train_file: str | None = setting(
        None, "data", "Training pairs as .jsonl, .json, .csv, .tsv or .parquet."
    )
    validation_file: str | None = setting(None, "data", "Validation pairs, in the same formats.")
    test_file: str | None = setting(None, "data", "Test pairs, in the same formats.")
    source_column: str | None = setting(
        None,
        "data",
        "Column of the source text. Default: 'source', or --src_lang in a nested 'translation' "
        "column.",
    )
    target_column: str | None = setting(
        None,
        "data",
        "Column of the target text. Default: 'target', or --tgt_lang in a nested 'translation' "
        "column.",
    )
    dataset_name: str | None = setting(
        None, "data", "A dataset on the hub, or a folder written by datasets' save_to_disk."
    )
    dataset_config_name: str | None = setting(
        None, "data", "Configuration of --dataset_name, if it has several."
    )
    source_prefix: str | None = setting(
        None, "data", "Text put before every source row, such as 'translate English to German: '."
    )
    src_lang: str | None = setting(None, "data", "Source language code, such as en_XX for mBART.")
    tgt_lang: str | None = setting(None, "data", "Target language code, such as de_DE for mBART.")
    task: str | None = setting(
        None,
        "data",
        "Use the parameters that the model's configuration has for this task "
        "(task_specific_params), such as 'summarization'.",
    )
    max_source_length: int = setting(
        1024, "data", "Truncate sources to this many tokens, special tokens included.", least=1
    )
    max_target_length: int = setting(
        128,
        "data",
        "Truncate training targets to this many tokens, special tokens included.",
        least=1,
    )
    long_rows: str = setting(
        "truncate",
        "data",
        "What to do with longer rows: 'truncate' them, or stop with an 'error'.",
        choices=LONG_ROWS,
    )
    val_max_target_length: int | None = setting(
        None,
        "data",
        "Truncate validation and test targets to this many tokens, and stop generation there. "
        "Default: --max_target_length.",
        least=1,
    )
    streaming: bool = setting(
        False,
        "data",
        "Read and tokenize training rows during training, from files of any size. Needs "
        "--max_steps.",
    )
    shuffle_buffer: int | None = setting(
        None,
        "data",
        "With --streaming: the number of consecutive rows from which those of a step are drawn. "
        f"Default: {DEFAULT_SHUFFLE_BUFFER}.",
        least=1,
    )
    n_train: int = setting(-1, "data", "Use only the first N training rows; -1: all.")
    n_val: int = setting(-1, "data", "Use only the first N validation rows; -1: all.")
    n_test: int = setting(-1, "data", "Use only the first N test rows; -1: all.")
    ignore_pad_token_for_loss: bool = setting(
        True,
        "loss",
        "Exclude pad tokens from the loss. Off: the loss as the model computes it.",
    )
    eval_beams: int | None = setting(
        None,
        "generation",
        "Beams during evaluation. Default: the model's generation config.",
        least=1,
    )
    metrics: list[str] = setting(
        list(METRICS),
        "generation",
        "Text metrics computed with --predict_with_generate.",
        choices=METRICS,
    )
    data_cache_dir: str | None = setting(
        None,
        "data",
        "Folder for tokenized data. Default: $S2S_SCALE_CACHE, or ~/.cache/s2s_scale.",
    )
    overwrite_cache: bool = setting(False, "data", "Tokenize again even if there is a cached copy.")
    preprocessing_num_workers: int | None = setting(
        None,
        "data",
        "Processes for tokenization. Default: depends on the number of rows.",
        least=1,
    )

    @property
    def evaluation_target_length(self) -> int:
        """Maximum number of tokens of validation and test targets and of generated text."""
        return self.val_max_target_length or self.max_target_length

    def validate(self) -> None:
        """Raise one ``UserError`` with every field that is out of range."""
        problems = below_least(self)
        problems += [
            f"{name}={value}: expected -1 (all rows) or at least 1; change --{name}"
            for name, value in (
                ("n_train", self.n_train),
                ("n_val", self.n_val),
                ("n_test", self.n_test),
            )
            if value < -1 or value == 0
        ]
        if self.shuffle_buffer is not None and not self.streaming:
            problems.append(
                f"shuffle_buffer={self.shuffle_buffer}: has no effect without --streaming; give "
                "--streaming, or leave it out"
            )
        if self.long_rows not in LONG_ROWS:
            problems.append(str(unknown_name("long_rows", self.long_rows, LONG_ROWS)))
        raise_problems(problems)


@dataclass
class TrainingExtras:
    """Training settings beyond transformers' own; old names of the seq2seq trainer included.

    ``None`` means "not given": an old name then takes the value of its modern one.
    """

    label_smoothing: float | None = setting(
        None, "loss", "Label smoothing epsilon; old name of --label_smoothing_factor."
    )
    loss_reduction: str = setting(
        "mean",
        "loss",
        "'mean': the summed loss of a step divided by its target tokens. 'sum': the sum.",
        choices=LOSS_REDUCTIONS,
    )
    linear_cross_entropy: str = setting(
        "auto",
        "loss",
        "Compute the loss in chunks, straight from the output projection, without materializing "
        "all logits; the values are the same. 'auto': if the loss mode, the model and its wrappers "
        "allow it. 'on': stop with an error if they do not. 'off': always materialize the logits.",
        choices=LINEAR_CROSS_ENTROPY,
    )
    cpu_functions: str = setting(
        "auto",
        "training",
        "'auto': training on a CPU uses faster implementations of linear layers, embeddings, "
        "dropout and attention, except with --torch_compile or --gradient_checkpointing. 'off': "
        "torch's own.",
        choices=CPU_FUNCTIONS,
    )
    lr_scheduler: str | None = setting(
        None,
        "learning rate",
        "Learning-rate schedule by name; old name of --lr_scheduler_type.",
        choices=tuple(SCHEDULES),
    )
    lr_num_cycles: float | None = setting(
        None,
        "learning rate",
        "Waves of the cosine schedule (default 0.5) or restarts of cosine_w_restarts (default 1).",
    )
    lr_power: float | None = setting(
        None, "learning rate", "Power of the polynomial schedule (default 1.0)."
    )
    lr_end: float | None = setting(
        None, "learning rate", "Final learning rate of the polynomial schedule (default 1e-7)."
    )
    adafactor: bool = setting(False, "optimizer", "Use Adafactor; old name of --optim adafactor.")
    encoder_layerdrop: float | None = setting(
        None, "model", "LayerDrop probability of the encoder; stored in the model's config."
    )
    decoder_layerdrop: float | None = setting(
        None, "model", "LayerDrop probability of the decoder; stored in the model's config."
    )
    dropout: float | None = setting(
        None, "model", "Dropout probability; stored in the model's config."
    )
    attention_dropout: float | None = setting(
        None, "model", "Dropout probability of attention weights; stored in the model's config."
    )
    batching: str | None = setting(
        None,
        "batching",
        "Which rows share a batch. 'fixed': random rows. 'sortish': random chunks of 50 batches, "
        "each sorted by length, longest first. 'tokens': buckets of rows of similar length; a step "
        "has --tokens_per_step and draws from buckets of every length. 'packed': "
        "--tokens_per_step in rows of several pairs each, which do not attend to each other. "
        "Default: 'fixed'; if no batch size is given, 'packed' on devices that want few shapes, "
        "and 'tokens' for streams and with --torch_compile.",
        choices=BATCHING_MODES,
    )
    tokens_per_step: int | None = setting(
        None,
        "batching",
        "With --batching tokens or packed: source and target tokens of a step over all devices, "
        f"padding excluded. Default: {DEFAULT_TOKENS_PER_STEP}, or less if an epoch would have "
        f"fewer than {DEFAULT_STEPS_PER_EPOCH} steps.",
        least=1,
    )
    groups_per_step: int | None = setting(
        None,
        "batching",
        "With --batching tokens: how many buckets of rows of similar length make up a step. With "
        "few, steps differ more from each other, and the same number of tokens teaches less. "
        f"Default: {DEFAULT_GROUPS_PER_STEP}, or less if buckets would be too small.",
        least=1,
    )
    max_tokens_per_device: int | None = setting(
        None,
        "batching",
        "With --batching tokens or packed: maximum of source and target tokens, padding included, "
        "of a device's micro-batch. Default: with tokens no maximum, one micro-batch per bucket; "
        f"with packed {DEFAULT_PACKED_TOKENS}, or one row.",
        least=1,
    )
    auto_batch: bool = setting(
        False,
        "batching",
        "With --batching tokens: find the largest --max_tokens_per_device that fits into memory, "
        "by trying the longest rows. The result is stored in the output folder for later runs.",
    )
    tokens_per_row: int | None = setting(
        None,
        "batching",
        "With --batching packed: approximate number of source and target tokens of a row. "
        f"Default: {DEFAULT_TOKENS_PER_ROW}, or less if a step would have fewer than 8 rows, but "
        "always enough for the longest pair.",
        least=1,
    )
    generation_engine: str = setting(
        "transformers",
        "generation",
        "What generates text during evaluation. 'ctranslate2' converts the current weights and is "
        "several times as fast, but some texts may differ with several beams.",
        choices=GENERATION_ENGINES,
    )
    eval_tokens_per_device: int | None = setting(
        None,
        "batching",
        "Source and target tokens, padding included, of a device's evaluation batch. Default: as "
        "many as --per_device_eval_batch_size of the longest rows have. Batches of short rows have "
        "up to four times as many rows.",
        least=1,
    )
    num_buckets: int | None = setting(
        None,
        "batching",
        "Pad every batch to one of at most this many shapes, chosen from the data's lengths. "
        f"Default: {DEFAULT_BUCKETS} on devices that want few shapes; elsewhere each batch is "
        "padded to its longest rows.",
        least=1,
    )
    max_nonfinite_steps: int = setting(
        3,
        "training",
        "Stop after this many steps whose loss or gradient is not finite.",
        least=1,
    )
    loss_spike_factor: float | None = setting(
        None,
        "training",
        "Skip the update of a step, as if its loss were not finite, if the loss is above this many "
        f"times the median of the last {DEFAULT_SPIKE_WINDOW} steps. Default: never.",
        least=1,
    )
    max_loss_spikes: int | None = setting(
        None,
        "training",
        "Stop after this many steps above --loss_spike_factor. Default: 10.",
        least=1,
    )
    fault_timeout_seconds: float = setting(
        DEFAULT_FAULT_SECONDS,
        "training",
        "If a rank dies, hangs or is cut off, the whole run ends within this many seconds with "
        "exit code 75 and names that rank. Must exceed the time of the longest micro-batch; "
        "compilation in the first steps may take longer. 0: do not watch for hangs.",
        least=0,
    )
    grace_seconds: float = setting(
        DEFAULT_GRACE_SECONDS,
        "training",
        "Seconds in which a run that is asked to stop (SIGTERM, SIGINT, SIGUSR1, maintenance of a "
        "TPU) must finish its step, save and exit with code 85; after that it is killed.",
        least=0,
    )
    max_compilations: int | None = setting(
        None,
        "training",
        "XLA: warn about compilations beyond this number. Default: one per batch shape, and those "
        "that every run needs once.",
        least=1,
    )
    strict_compilations: bool = setting(
        False, "training", "XLA: stop at a compilation after warm-up instead of warning about it."
    )
    overwrite_output_dir: bool = setting(
        False, "output", "Start again in an output folder that has an earlier run, and replace it."
    )
    checkpoint_shard_mib: int = setting(
        1024,
        "output",
        "Maximum size of a checkpoint's files in MiB. Beside its own shard of the model, "
        "a process holds the tensors of one file at a time.",
    )
    accept_changes: list[str] = setting(
        [],
        "output",
        "Resume from a checkpoint although these have changed since it was written.",
        choices=CHANGES,
    )
    save_in_background: bool = setting(
        False,
        "output",
        "Write checkpoints in the background: training waits only until everything is "
        "copied to host memory. The copy is freed once it is written.",
    )
