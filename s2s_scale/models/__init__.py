"""Encoder-decoder models: the table of families, loading, new models, packed attention.

``families``          the table of differences between families
``loading``           a saved model with its config and tokenizer
``create``            a new model with its tokenizer, trained by ``tokenizers``
``loss_head``         a model that ends in its loss instead of logits
``packed_attention``  a model that runs on packed rows
``tiny``              small random models for ``doctor`` and for tests
"""

from __future__ import annotations

from s2s_scale.models.families import (
    FAMILIES,
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
