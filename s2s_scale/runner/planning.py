"""``plan``: the batch plan of an epoch, without a model's weights."""

from __future__ import annotations

from s2s_scale import models
from s2s_scale.backends import make_backend
from s2s_scale.data.batch_plan import row_lengths
from s2s_scale.data.sources import load_pairs
from s2s_scale.report.plan_summary import print_plan
from s2s_scale.runner.pieces import read_settings, tokenize_with
from s2s_scale.settings import Settings
from s2s_scale.trainer.sampling import make_sampler


def plan(settings: Settings) -> int:
    """Print which rows make each step of an epoch; trains nothing and loads no weights."""
    defaults = {"output_dir": ".", "use_cpu": True}
    run = read_settings(settings, make_backend("local"), defaults, trains=False)
    args, own = run.training_args, settings.verb_values
    pairs = load_pairs(run.data_args, "train")
    config = models.load_config(run.model_args)
    tokenizer = models.load_tokenizer(run.model_args, config)
    examples = tokenize_with(tokenizer, config, run, pairs, "train")
    sampler = make_sampler(
        args,
        examples,
        rows_per_device=args.per_device_train_batch_size,
        world_size=own["world_size"],
        num_buckets=args.num_buckets,
    )
    sampler.set_epoch(own["epoch"])
    print_plan(
        sampler,
        row_lengths(examples),
        first_steps=own["first_steps"],
        title=f"epoch {own['epoch']}, batching {args.plan_mode}, seed {sampler.seed}",
    )
    return 0
