"""``new-model``: a tokenizer trained on the user's text and a fresh model for it."""

from __future__ import annotations

import transformers

from s2s_scale.config import DataArguments
from s2s_scale.models.create import run_new_model
from s2s_scale.settings import Settings


def new_model(settings: Settings) -> int:
    """Write the model and say where it is and how to train it."""
    # Its bars over the shards of a file say nothing that our own lines do not.
    transformers.utils.logging.disable_progress_bar()
    own = settings.verb_values
    data = DataArguments(**settings.values)
    folder = run_new_model(
        architecture=own["architecture"],
        size=own["size"],
        data=data,
        vocab_size=own["vocab_size"],
        output_dir=own["output_dir"],
        seed=own["seed"],
        overwrite=own["overwrite"],
    )
    source = next(
        f" --{name} {value}"
        for name in ("data_dir", "train_file", "dataset_name")
        if (value := getattr(data, name))
    )
    print(
        f"A new {own['architecture']} model is in {folder}. Train it with:\n"
        f"  s2s-scale train --model_name_or_path {folder}{source} --output_dir runs/first"
    )
    return 0
