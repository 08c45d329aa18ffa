"""``plan`` and ``new-model``: what precedes training, an epoch's batch plan and a new model."""

from __future__ import annotations

import transformers

from s2s_scale import models
from s2s_scale.backends import Backend
from s2s_scale.config import DataArguments
from s2s_scale.data.batch_plan import row_lengths
from s2s_scale.data.plan_summary import print_plan
from s2s_scale.data.sources import load_pairs
from s2s_scale.models.create import run_new_model
from s2s_scale.runner.build import read_settings, tokenize_with
from s2s_scale.settings import Settings
from s2s_scale.settings.commands import NewModelOptions, PlanOptions
from s2s_scale.trainer.dataloaders import make_sampler


def plan(settings: Settings) -> int:
    """Print which rows form each step of an epoch, without training or loading weights."""
    defaults = {"output_dir": ".", "use_cpu": True}
    run = read_settings(settings, Backend("cpu"), defaults, trains=False)
    args = run.training_args
    own: PlanOptions = settings.options
    pairs = load_pairs(run.data_args, "train")
    config = models.load_config(run.model_args)
    tokenizer = models.load_tokenizer(run.model_args, config)
    examples = tokenize_with(tokenizer, config, run, pairs, "train")
    sampler = make_sampler(
        args,
        examples,
        rows_per_device=args.per_device_train_batch_size,
        world_size=own.world_size,
        num_buckets=args.num_buckets,
    )
    sampler.set_epoch(own.epoch)
    print_plan(
        sampler,
        row_lengths(examples),
        first_steps=own.first_steps,
        title=f"epoch {own.epoch}, batching {args.plan_mode}, seed {sampler.seed}",
    )
    return 0


def new_model(settings: Settings) -> int:
    """Write a new model and its tokenizer, and print how to train it."""
    # Progress bars over the shards of a file would add nothing to this package's own messages.
    transformers.utils.logging.disable_progress_bar()
    own: NewModelOptions = settings.options
    data = DataArguments(**settings.values)
    folder = run_new_model(
        architecture=own.architecture,
        size=own.size,
        data=data,
        vocab_size=own.vocab_size,
        output_dir=own.output_dir,
        seed=own.seed,
        overwrite=own.overwrite,
    )
    source = next(
        f" --{name} {value}"
        for name in ("data_dir", "train_file", "dataset_name")
        if (value := getattr(data, name))
    )
    print(
        f"A new {own.architecture} model is in {folder}. Train it with:\n"
        f"  s2s-scale train --model_name_or_path {folder}{source} --output_dir runs/first"
    )
    return 0
