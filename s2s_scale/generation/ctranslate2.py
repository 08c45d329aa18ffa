"""Generation with CTranslate2: the model's current weights, converted in a temporary folder.

CTranslate2's own converter does the work; a subclass overrides the two methods with which it loads
a model and a tokenizer. The model is the one in memory, and the tokenizer is a stand-in whose
tokens are the ids written as numbers, so that neither a real tokenizer nor the files of a saved
model are needed.

Texts of greedy search, and of beam search with ``early_stopping=True``, equal those of
``model.generate`` except for rounding. With ``early_stopping=False`` CTranslate2 ends a row by
another criterion, and some texts differ.

This module imports neither torch nor transformers while it loads, since the training arguments
check for the package.

Shapes: B rows, n sequences returned for each, S source length, T length of the longest text.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from s2s_scale.errors import UserError, raise_problems

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from s2s_scale.generation.options import SearchSettings

FAMILIES = ("bart", "mbart", "pegasus", "marian", "t5", "mt5")
ENGINE = "generation_engine=ctranslate2"
#: model type -> values of normalize_before and normalize_embedding, which the converter reads
_BART_LIKE = {
    "bart": (False, True),
    "mbart": (True, True),
    "pegasus": (True, False),
    "marian": (False, False),
}
PATIENCE = 2
"""With ``early_stopping=False`` a row goes on until ``PATIENCE * num_beams`` texts have ended: of
the values tried, 2 gives transformers' texts most often (see docs/explanation/decisions.md)."""


def package_problems() -> list[str]:
    """What keeps CTranslate2 from being imported, with its remedy."""
    if importlib.util.find_spec("ctranslate2") is not None:
        return []
    return [
        f"{ENGINE}: the package ctranslate2 is not installed; install it with "
        "pip install 's2s-scale[ctranslate2]', or leave --generation_engine out"
    ]


def family_problems(model_type: str) -> list[str]:
    """What keeps CTranslate2 from running models of this type, with its remedy."""
    if model_type in FAMILIES:
        return []
    return [
        f"{ENGINE}: has no converter for model type '{model_type}'; expected one of "
        f"{', '.join(FAMILIES)}; leave --generation_engine out"
    ]


@contextmanager
def ctranslate2_engine(model: PreTrainedModel) -> Iterator[CTranslate2Engine]:
    """Context of an engine with the weights that ``model`` has now; later updates have no effect.

    Raises:
        UserError: the package is missing or cannot run this model, or the model's parameters are
            sharded over the ranks.
    """
    raise_problems([*package_problems(), *family_problems(model.config.model_type)])
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        raise UserError(
            f"{ENGINE}: expected the whole model on each rank, but its parameters are sharded; "
            "leave --generation_engine out, or evaluate under another profile"
        )
    with TemporaryDirectory(prefix="s2s-scale-ctranslate2-") as folder:
        yield CTranslate2Engine(model, folder)


class CTranslate2Engine:
    """``generate`` for one state of a model's weights."""

    def __init__(self, model: PreTrainedModel, folder: str) -> None:
        """Convert ``model`` into ``folder``, which must exist as long as this object.

        Raises:
            UserError: the converter does not support the model.
        """
        import ctranslate2
        import torch

        self._model = model
        _convert(model, folder)
        cuda = model.device.type == "cuda"
        self._translator = ctranslate2.Translator(
            f"{folder}/converted",
            device="cuda" if cuda else "cpu",
            device_index=model.device.index or 0,
            compute_type="default" if cuda else "float32",
            intra_threads=torch.get_num_threads(),
        )

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Token ids LongTensor[B * n, T] on the CPU, start token first, as ``model.generate``.

        Args:
            input_ids: LongTensor[B, S].
            attention_mask: [B, S], 0 for padding; ``None`` if there is none.
            options: those of ``model.generate``, which override the model's generation config.

        Raises:
            UserError: options that CTranslate2 does not support.
        """
        import torch

        from s2s_scale.generation.options import read_settings

        settings = read_settings(self._model, options, where="CTranslate2")
        call, forced_end = _translate_options(settings)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        source = [
            [str(token) for token in ids[seen].tolist()]
            for ids, seen in zip(input_ids.cpu(), mask.cpu().bool(), strict=True)
        ]
        prefix = [call.pop("target_prefix")] * len(source)
        results = self._translator.translate_batch(
            source, target_prefix=prefix, max_input_length=0, **call
        )
        texts = []
        for row in results:
            for hypothesis in row.hypotheses:
                tokens = [int(token) for token in hypothesis]
                if forced_end is not None and not (tokens and tokens[-1] in settings.ends):
                    tokens = [*tokens[:forced_end], settings.ends[0]]
                texts.append([settings.start, *tokens])
        width = max(map(len, texts))
        return torch.tensor([text + [settings.filler] * (width - len(text)) for text in texts])


def _translate_options(settings: SearchSettings) -> tuple[dict[str, Any], int | None]:
    """Keyword arguments of ``translate_batch``, with ``target_prefix`` for a single row.

    Also the number of tokens after which a text that has not ended gets an end token, as
    ``forced_eos_token_id`` demands; None without that option.
    """
    unsupported = (
        "not supported by CTranslate2, or not as transformers defines it; leave the option out, or "
        "leave --generation_engine out"
    )
    if settings.early_stopping == "never":
        raise UserError(f"early_stopping=never: {unsupported}")
    prefix = [str(settings.start)]
    suppressed: list[list[str]] = []
    call: dict[str, Any] = {
        "target_prefix": prefix,
        "beam_size": settings.num_beams,
        "num_hypotheses": settings.num_return_sequences,
        "patience": 1 if settings.early_stopping else PATIENCE,
        "length_penalty": settings.length_penalty,
        "max_decoding_length": settings.max_length - 1,
        "min_decoding_length": 0,
        "end_token": list(settings.ends),
        "return_end_token": True,
        "suppress_sequences": suppressed,
    }
    forced_end, problems = None, []
    for processor in settings.processors:
        name, supported = type(processor).__name__, True
        if name == "ForcedBOSTokenLogitsProcessor":
            prefix.append(str(processor.bos_token_id))
        elif name == "ForcedEOSTokenLogitsProcessor":
            forced_end = int(processor.max_length) - 2  # the limit without start and end token
        elif name in ("NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"):
            bias_of = processor.sequence_bias
            supported = all(bias == float("-inf") for bias in bias_of.values())
            suppressed += [[str(token) for token in ids] for ids in bias_of]
        elif name == "SuppressTokensLogitsProcessor":
            suppressed += [[str(token)] for token in processor.suppress_tokens.tolist()]
        elif name == "MinLengthLogitsProcessor":
            call["min_decoding_length"] = max(call["min_decoding_length"], processor.min_length - 1)
        elif name == "NoRepeatNGramLogitsProcessor":
            call["no_repeat_ngram_size"] = processor.ngram_size
        else:
            supported = False
        if not supported:
            problems.append(f"{name}: {unsupported}")
    raise_problems(problems)
    return call, forced_end


def _convert(model: PreTrainedModel, folder: str) -> None:
    """Write ``model`` in CTranslate2's format to ``folder/converted``."""
    from ctranslate2.converters import TransformersConverter
    from transformers import BartConfig, T5Config

    # A copy of the config with what the converter reads and transformers 5 no longer stores.
    config: Any = copy.deepcopy(model.config)
    embeddings: Any = model.get_input_embeddings()
    config.vocab_size = len(embeddings.weight)
    if config.model_type in _BART_LIKE:
        config.normalize_before, config.normalize_embedding = _BART_LIKE[config.model_type]
        saved: Any = BartConfig()
    else:
        tied = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        config.tie_word_embeddings = tied
        saved = T5Config()
    saved.save_pretrained(folder)  # the converter reads nothing but its class

    class Converter(TransformersConverter):
        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return _NumberTokenizer(config)

    before, model.config = model.config, config
    try:
        Converter(folder).convert(f"{folder}/converted")
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{ENGINE}: its converter does not support this {config.model_type} model "
            f"({' '.join(str(error).split())}); leave --generation_engine out"
        ) from error
    finally:
        model.config = before


class _NumberTokenizer:
    """What the converter needs of a tokenizer; the token with id 7 is ``"7"``."""

    def __init__(self, config: Any) -> None:
        self._size = int(config.vocab_size)
        self.pad_token = self.unk_token = self.bos_token = str(config.pad_token_id)
        ends = config.eos_token_id
        self.eos_token = str(ends[0] if isinstance(ends, list) else ends)

    def get_vocab(self) -> Mapping[str, int]:
        return {str(number): number for number in range(self._size)}

    def convert_ids_to_tokens(self, number: int) -> None:
        """None, so that the converter stores no start token: each call gives its own."""
