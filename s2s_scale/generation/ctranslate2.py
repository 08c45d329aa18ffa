"""Generation with CTranslate2: the model's current weights, converted in a temporary folder.

The converter's own classes do the work, through the two methods that they offer for that: the model
is the one in memory, and the tokenizer is a stand-in whose tokens are the ids written as numbers.
So texts need no tokenizer, and neither a folder of the model nor its file names matter.

Greedy texts and those of beams with ``early_stopping=True`` are those of ``model.generate``, but
for rounding. With ``early_stopping=False`` it ends a row by another rule, and some texts differ.

Shapes: B rows, n sequences returned for each, S source length, T longest text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, PreTrainedModel, T5Config

from s2s_scale.errors import UserError, raise_problems
from s2s_scale.generation.engines import ENGINE, family_problems, package_problems
from s2s_scale.generation.options import SearchSettings, read_settings

#: model type -> (norm before each block, norm after the embeddings), as the converter is told
_LIKE_BART = {
    "bart": (False, True),
    "mbart": (True, True),
    "pegasus": (True, False),
    "marian": (False, False),
}
_LIKE_T5 = ("t5", "mt5")
PATIENCE = 2
"""With ``early_stopping=False`` a row goes on until twice as many texts as beams have ended: that
gives the texts of transformers most often (see docs/explanation/decisions.md)."""


@contextmanager
def ctranslate2_engine(model: PreTrainedModel) -> Iterator[CTranslate2Engine]:
    """``model`` as it is now, until the context ends; what is trained later does not count.

    Raises:
        UserError: the package is missing, or cannot run this model.
    """
    raise_problems([*package_problems(), *family_problems(model.config.model_type)])
    _check_whole(model)
    with TemporaryDirectory(prefix="s2s-scale-ctranslate2-") as folder:
        yield CTranslate2Engine(model, folder)


class CTranslate2Engine:
    """``generate`` for one state of a model's weights."""

    def __init__(self, model: PreTrainedModel, folder: str) -> None:
        """Converts ``model`` into ``folder``, which must last as long as this object."""
        import ctranslate2

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

        ``options``: those of ``model.generate``, over the model's generation config.

        Raises:
            UserError: options that CTranslate2 does not have.
        """
        settings = read_settings(self._model, options, where="CTranslate2")
        call = _call_options(settings)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        source = [
            [str(token) for token in ids[seen].tolist()]
            for ids, seen in zip(input_ids.cpu(), mask.cpu().bool(), strict=True)
        ]
        prefix, longest = call.pop("prefix"), call.pop("longest_open")
        results = self._translator.translate_batch(
            source, target_prefix=[prefix] * len(source), max_input_length=0, **call
        )
        texts = [
            [settings.start, *_ended([int(token) for token in tokens], settings.ends, longest)]
            for row in results
            for tokens in row.hypotheses
        ]
        width = max(map(len, texts))
        filler = settings.filler
        return torch.tensor([text + [filler] * (width - len(text)) for text in texts])


def _ended(tokens: list[int], ends: Sequence[int], longest: int | None) -> list[int]:
    """A text that reached the limit with the end token that transformers would have forced."""
    if longest is None or (tokens and tokens[-1] in ends):
        return tokens
    return [*tokens[:longest], ends[0]]


def _call_options(settings: SearchSettings) -> dict[str, Any]:
    """Keywords of ``translate_batch``, and two of ours.

    ``prefix``: what every text begins with; ``longest_open``: tokens of a text before its end token
    is forced, None where it is not.
    """
    if settings.early_stopping == "never":
        raise UserError(f"early_stopping=never: {_LACKS}")
    call: dict[str, Any] = {
        "prefix": [str(settings.start)],
        "longest_open": None,
        "beam_size": settings.num_beams,
        "num_hypotheses": settings.num_return_sequences,
        "patience": 1 if settings.early_stopping else PATIENCE,
        "length_penalty": settings.length_penalty,
        "max_decoding_length": settings.max_length - 1,
        "min_decoding_length": 0,
        "end_token": list(settings.ends),
        "return_end_token": True,
        "suppress_sequences": [],
    }
    problems = []
    for processor in settings.processors:
        add = _PROCESSORS.get(type(processor).__name__)
        if add is None or not add(processor, call):
            problems.append(f"{type(processor).__name__}: {_LACKS}")
    raise_problems(problems)
    return call


_LACKS = (
    "a rule that CTranslate2 does not have, or not as transformers has it; leave its option out, "
    "or leave --generation_engine out"
)


def _forced_start(processor: Any, call: dict[str, Any]) -> bool:
    call["prefix"].append(str(processor.bos_token_id))
    return True


def _bad_words(processor: Any, call: dict[str, Any]) -> bool:
    call["suppress_sequences"] += [
        [str(token) for token in ids]
        for ids, bias in processor.sequence_bias.items()
        if bias == float("-inf")
    ]
    return all(bias == float("-inf") for bias in processor.sequence_bias.values())


def _suppressed(processor: Any, call: dict[str, Any]) -> bool:
    call["suppress_sequences"] += [[str(token)] for token in processor.suppress_tokens.tolist()]
    return True


def _shortest(processor: Any, call: dict[str, Any]) -> bool:
    call["min_decoding_length"] = max(call["min_decoding_length"], processor.min_length - 1)
    return True


def _no_repeats(processor: Any, call: dict[str, Any]) -> bool:
    call["no_repeat_ngram_size"] = processor.ngram_size
    return True


def _forced_end(processor: Any, call: dict[str, Any]) -> bool:
    call["longest_open"] = int(processor.max_length) - 2  # with start and end token: the limit
    return True


_PROCESSORS = {
    "ForcedBOSTokenLogitsProcessor": _forced_start,
    "ForcedEOSTokenLogitsProcessor": _forced_end,
    "NoBadWordsLogitsProcessor": _bad_words,
    "SequenceBiasLogitsProcessor": _bad_words,
    "SuppressTokensLogitsProcessor": _suppressed,
    "MinLengthLogitsProcessor": _shortest,
    "NoRepeatNGramLogitsProcessor": _no_repeats,
}


def _check_whole(model: PreTrainedModel) -> None:
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        raise UserError(
            f"{ENGINE}: needs the whole model on each rank, and here it is divided over the ranks; "
            "leave --generation_engine out, or evaluate under another profile"
        )


def _convert(model: PreTrainedModel, folder: str) -> None:
    from ctranslate2.converters import TransformersConverter

    own = copy.deepcopy(model.config)
    embeddings: Any = model.get_input_embeddings()
    _describe(own, len(embeddings.weight))
    like_t5 = own.model_type in _LIKE_T5
    (T5Config if like_t5 else BartConfig)().save_pretrained(folder)  # its class alone is looked at

    class Converter(TransformersConverter):
        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return _Ids(own)

    before, model.config = model.config, own
    try:
        Converter(folder).convert(f"{folder}/converted")
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{ENGINE}: its converter cannot read this {own.model_type} model "
            f"({' '.join(str(error).split())}); leave --generation_engine out"
        ) from error
    finally:
        model.config = before


def _describe(config: Any, vocab_size: int) -> None:
    """Say in ``config`` what the converter asks for and transformers 5 leaves to the model type."""
    config.vocab_size = vocab_size
    if config.model_type in _LIKE_BART:
        config.normalize_before, config.normalize_embedding = _LIKE_BART[config.model_type]
    else:
        config.tie_word_embeddings = getattr(
            config, "scale_decoder_outputs", config.tie_word_embeddings
        )


class _Ids:
    """A tokenizer whose token of id 7 is '7'."""

    def __init__(self, config: Any) -> None:
        self._size = int(config.vocab_size)
        self.pad_token = self.unk_token = self.bos_token = str(config.pad_token_id)
        ends = config.eos_token_id
        self.eos_token = str(ends[0] if isinstance(ends, list) else ends)

    def get_vocab(self) -> Mapping[str, int]:
        return {str(number): number for number in range(self._size)}

    def convert_ids_to_tokens(self, number: int) -> None:
        """No start token is built in: each call says its own."""
