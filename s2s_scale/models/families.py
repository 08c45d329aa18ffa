"""The table of differences between encoder-decoder families, and what follows from it.

Shapes: B rows, T target positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2s_scale.errors import UserError, raise_problems
from s2s_scale.utils import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DECODER_INPUTS = Literal["start_token", "wrap_last_token", "model"]


@dataclass(frozen=True)
class Family:
    """What differs between encoder-decoder families. ``None``: the family has no such field."""

    model_type: str
    #: names of the config fields that hold these settings
    dropout: str | None = "dropout"
    attention_dropout: str | None = "attention_dropout"
    encoder_layerdrop: str | None = "encoder_layerdrop"
    decoder_layerdrop: str | None = "decoder_layerdrop"
    source_vocab_size: str = "vocab_size"
    target_vocab_size: str = "vocab_size"
    #: how labels become decoder inputs: all are shifted right by one; the free first place takes
    #: the decoder start token, or the row's last label (FSMT: </s>, mBART: the language code);
    #: "model" asks the model's own method
    decoder_inputs: DECODER_INPUTS = "start_token"
    #: tokenizer and generation need a source and a target language code
    languages: bool = False
    #: the module that turns hidden states into logits, and what the model adds to these (a buffer)
    output_projection: str = "lm_head"
    logits_bias: str | None = "final_logits_bias"
    #: masks of queries and keys must be passed to the attention modules directly, and position
    #: embeddings have a position for pads, before the first one
    masks_in_attention: bool = False
    positions_skip_pads: bool = False
    #: the forward pass masks the decoder's future only when told ``use_cache=False``
    needs_use_cache_off: bool = False
    #: activations grow beyond fp16's largest number (65,504): training gives inf and NaN
    overflows_fp16: bool = False


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bart"),
        Family(
            "t5",
            dropout="dropout_rate",
            attention_dropout=None,
            encoder_layerdrop=None,
            decoder_layerdrop=None,
            logits_bias=None,
            overflows_fp16=True,
        ),
        Family("mbart", decoder_inputs="wrap_last_token", languages=True),
        Family(
            "fsmt",
            source_vocab_size="src_vocab_size",
            target_vocab_size="tgt_vocab_size",
            decoder_inputs="wrap_last_token",
            output_projection="model.decoder.output_projection",
            logits_bias=None,
            masks_in_attention=True,
            positions_skip_pads=True,
            needs_use_cache_off=True,
        ),
        Family("pegasus"),
        Family("marian", target_vocab_size="decoder_vocab_size"),
    )
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's config; a generic one for encoder-decoders outside the table.

    Raises ``UserError`` for a model that is not an encoder-decoder.
    """
    model_type = str(getattr(config, "model_type", "") or "unknown")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if not getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model type '{model_type}' is not an encoder-decoder; expected one such as "
            f"{', '.join(sorted(FAMILIES))}; choose another --model_name_or_path"
        )

    def present(*names: str) -> str | None:
        return next((name for name in names if hasattr(config, name)), None)

    return Family(
        model_type,
        dropout=present("dropout", "dropout_rate"),
        attention_dropout=present("attention_dropout"),
        encoder_layerdrop=present("encoder_layerdrop"),
        decoder_layerdrop=present("decoder_layerdrop"),
        target_vocab_size=present("decoder_vocab_size") or "vocab_size",
        decoder_inputs="model",
        languages=model_type in ("m2m_100", "nllb-moe"),
        overflows_fp16="t5" in model_type,
    )


def check_precision(config: PreTrainedConfig, *, fp16: bool) -> None:
    """Refuse fp16 for a family whose activations exceed its range.

    T5 was trained in bfloat16, which has the range of fp32; the values of its feed-forward layers
    overflow in fp16 (transformers issue 9295).

    Raises:
        UserError: names bf16 in its place.
    """
    if fp16 and family_of(config).overflows_fp16:
        raise UserError(
            f"fp16: models of type '{config.model_type}' overflow in fp16 (their activations pass "
            "its largest number, 65504), and the loss becomes NaN; use --bf16, or neither"
        )


def target_vocab_size(config: PreTrainedConfig) -> int:
    """Number of target tokens: the width of the logits."""
    return int(getattr(config, family_of(config).target_vocab_size))


def source_vocab_size(config: PreTrainedConfig) -> int:
    """Number of source tokens: the rows of the encoder's embedding."""
    return int(getattr(config, family_of(config).source_vocab_size))


def apply_dropout_settings(
    config: PreTrainedConfig,
    *,
    dropout: float | None = None,
    attention_dropout: float | None = None,
    encoder_layerdrop: float | None = None,
    decoder_layerdrop: float | None = None,
) -> None:
    """Write the given probabilities into the config, under the family's own names.

    To be called before the model is built, since modules copy their probability. Raises one
    ``UserError`` for all values outside [0, 1) and all settings that the family does not have.
    """
    family = family_of(config)
    given = {
        name: value
        for name, value in (
            ("dropout", dropout),
            ("attention_dropout", attention_dropout),
            ("encoder_layerdrop", encoder_layerdrop),
            ("decoder_layerdrop", decoder_layerdrop),
        )
        if value is not None
    }
    problems = []
    for name, value in given.items():
        if not 0.0 <= value < 1.0:
            problems.append(f"{name}={value}: expected a probability from 0 up to but not 1")
        elif getattr(family, name) is None:
            has = [n for n in given if getattr(family, n)] or ["dropout"]
            problems.append(
                f"{name}={value}: models of type '{family.model_type}' have no such setting; "
                f"leave --{name} out (they do have: {', '.join(has)})"
            )
    raise_problems(problems)
    for name, value in given.items():
        setattr(config, getattr(family, name), float(value))


def decoder_inputs_from_labels(model: Any, labels: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Decoder inputs LongTensor[B, T] for ``labels`` LongTensor[B, T], which are not modified.

    Labels may be padded with -100, with the pad id or with both. The result is what the model of
    transformers derives from labels itself, except for FSMT, which would feed its decoder the
    source and gets fairseq's shift of the labels. ``model`` may be any object with the model's
    ``config``. Raises ``UserError`` if the family needs a decoder start token that the config does
    not have.
    """
    family = family_of(model.config)
    clean = labels.masked_fill(labels == IGNORE_INDEX, pad_token_id)
    if family.decoder_inputs == "model":
        derive = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if derive is None:
            raise UserError(
                f"models of type '{model.config.model_type}' do not say how labels become decoder "
                "inputs; give batches with decoder_input_ids"
            )
        derived: torch.Tensor = derive(labels=clean)
        return derived
    shifted = clean.new_empty(clean.shape)
    shifted[:, 1:] = clean[:, :-1]
    if family.decoder_inputs == "wrap_last_token":
        last = clean.ne(pad_token_id).sum(dim=1, keepdim=True).sub(1).clamp(min=0)
        shifted[:, :1] = clean.gather(1, last)
        return shifted
    shifted[:, 0] = start_token(model.config)
    return shifted


def start_token(config: PreTrainedConfig) -> int:
    """The decoder's first token in families that have one; ``UserError`` if it is not set."""
    start = config.decoder_start_token_id
    if start is None:
        raise UserError(
            f"the model's config has no decoder_start_token_id, which models of type "
            f"'{config.model_type}' need in training; set it in config.json"
        )
    return int(start)
