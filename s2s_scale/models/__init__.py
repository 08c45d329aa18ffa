"""Models: the table of family differences, loading, and making fresh ones.

``families`` is the table, ``loading`` reads a saved model with its tokenizer, ``files`` checks its
folder, ``new_model`` makes a model from nothing, ``tokenizers`` trains the tokenizer for it, and
``tiny`` makes the small models that machines and tests are tried with.
"""

from __future__ import annotations

from s2s_scale.models.families import (
    FAMILIES,
    LABEL_PAD_ID,
    Family,
    apply_dropout_settings,
    check_precision,
    decoder_inputs_from_labels,
    family_of,
    source_vocab_size,
    target_vocab_size,
)
from s2s_scale.models.loading import (
    Loaded,
    apply_task_parameters,
    freeze_embeddings,
    freeze_encoder,
    load,
    load_config,
    load_tokenizer,
    set_languages,
    settle_pad_token,
)
from s2s_scale.models.loss_head import LossHead, loss_head_problem

__all__ = [
    "FAMILIES",
    "LABEL_PAD_ID",
    "Family",
    "Loaded",
    "LossHead",
    "apply_dropout_settings",
    "apply_task_parameters",
    "check_precision",
    "decoder_inputs_from_labels",
    "family_of",
    "freeze_embeddings",
    "freeze_encoder",
    "load",
    "load_config",
    "load_tokenizer",
    "loss_head_problem",
    "set_languages",
    "settle_pad_token",
    "source_vocab_size",
    "target_vocab_size",
]
