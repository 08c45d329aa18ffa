"""Generate text for plain source lines, in their order and in bounded memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from s2s_scale.errors import UserError, raise_problems, unknown_name
from s2s_scale.evaluation.metrics import TextMetrics
from s2s_scale.evaluation.text import decode, one_line
from s2s_scale.models.families import source_vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from s2s_scale.generation.ctranslate2 import CTranslate2Engine
    from s2s_scale.generation.static import StaticGenerator

#: batches sorted by length together: longer windows pad less and answer later
WINDOW_BATCHES = 64
_WHOLE = frozenset(
    "max_length max_new_tokens min_length min_new_tokens num_beams num_return_sequences "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size top_k".split()
)
_REAL = frozenset(
    "length_penalty repetition_penalty temperature top_p min_p typical_p max_time".split()
)
_FLAGS = frozenset("do_sample use_cache renormalize_logits remove_invalid_values".split())


def read_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a binary stream without their ends; only a line feed ends a line.

    Raises ``UserError`` naming ``name``, the line and the byte where text is not valid UTF-8.
    """
    for number, raw in enumerate(stream, start=1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}:{number}: invalid UTF-8 at byte {error.start + 1} "
                f"(0x{raw[error.start]:02x}); convert the file to UTF-8"
            ) from error
        text = text.removesuffix("\n").removesuffix("\r")
        yield text.removeprefix("\ufeff") if number == 1 else text


def generate_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    *,
    batch_size: int = 32,
    source_prefix: str = "",
    max_source_length: int = 1024,
    window_batches: int = WINDOW_BATCHES,
    own: OwnBatches | None = None,
    **generation: Any,
) -> Iterator[str]:
    """Yield the generated text of each line, in the order of ``lines``, each without line ends.

    ``generation`` are fields of ``GenerationConfig`` (``None`` means the model's own value); with
    ``num_return_sequences=n`` each line yields n texts, best first. Lines are read as they are
    needed, ``batch_size * window_batches`` at a time, and sorted by length inside that window. An
    empty line yields empty text, so that line numbers stay aligned. ``own``: generates in the place
    of ``model.generate``. Raises ``UserError`` for an unknown or impossible generation
    setting, and for tokens that the model does not have.
    """
    settings = _with_one_length(model, check_generation(generation))
    returned = int(settings.get("num_return_sequences") or 1)
    limit = min(max_source_length, getattr(model.config, "max_position_embeddings", 1 << 30))
    source = iter(lines)
    training = model.training
    model.train(False)
    try:
        while window := list(itertools.islice(source, batch_size * window_batches)):
            texts = [""] * (len(window) * returned)
            rows = [i for i, line in enumerate(window) if line.strip()]
            encoded = _encode(model, tokenizer, [source_prefix + window[i] for i in rows], limit)
            order = sorted(range(len(rows)), key=lambda i: -len(encoded[i]))
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = [encoded[i] for i in chosen]
                if own is None:
                    outputs = _generate(model, tokenizer, batch, settings)
                else:
                    ids = own.generate(batch, limit, tokenizer.pad_token_id, settings)
                    outputs = decode(tokenizer, ids)
                for place, text in enumerate(outputs):
                    row = rows[chosen[place // returned]]
                    texts[row * returned + place % returned] = one_line(text)
            yield from texts
    finally:
        model.train(training)


class OwnBatches(Protocol):
    """Another way to generate than ``model.generate``."""

    def generate(
        self, batch: list[list[int]], limit: int, pad: int, settings: Mapping[str, Any]
    ) -> Any:
        """Generated ids [len(batch) * num_return_sequences, T] for sources of at most ``limit``."""


@dataclass(frozen=True)
class EngineBatches:
    """Generates with CTranslate2."""

    engine: CTranslate2Engine

    def generate(
        self, batch: list[list[int]], limit: int, pad: int, settings: Mapping[str, Any]
    ) -> Any:
        """See ``OwnBatches``."""
        import torch

        width = max(map(len, batch))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        return self.engine.generate(ids, mask, **settings)


@dataclass(frozen=True)
class StaticBatches:
    """How to generate in batches of few shapes."""

    generator: StaticGenerator
    #: rows of every batch; short ones are filled up
    rows: int
    #: brings a batch's tensors to the device
    place: Callable[[Mapping[str, Any]], Mapping[str, Any]]

    def generate(
        self, batch: list[list[int]], limit: int, pad: int, settings: Mapping[str, Any]
    ) -> Any:
        """Generated ids [len(batch) * num_return_sequences, T] for a batch of token ids.

        Its width is one of a few up to ``limit`` tokens.
        """
        import torch

        from s2s_scale.generation.static import static_width

        width = static_width(max(map(len, batch)), limit)
        ids = torch.full((self.rows, width), pad)
        mask = torch.zeros_like(ids)
        mask[:, 0] = 1  # a row that attends to nothing would give NaN
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        placed = self.place({"input_ids": ids, "attention_mask": mask})
        active = torch.arange(self.rows) < len(batch)
        generated = self.generator.generate(**placed, active=active, **settings)
        return generated[: len(generated) // self.rows * len(batch)]


def check_generation(generation: Mapping[str, Any]) -> dict[str, Any]:
    """``generation`` without ``None``s; ``UserError`` for unknown names and impossible values."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    settings = {name: value for name, value in generation.items() if value is not None}
    problems: list[str] = []
    for name, value in settings.items():
        if name not in known:
            problems += unknown_name("generation setting", name, known).problems
        else:
            problems += _value_problems(name, value)
    raise_problems(problems)
    try:
        GenerationConfig(**settings).validate()
    except ValueError as error:
        raise UserError(f"generation settings: {' '.join(str(error).split())}") from error
    return settings


def _with_one_length(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """The same limit under the name that the model's own generation config uses.

    transformers lets ``max_new_tokens`` win over ``max_length`` even where the one is the model's
    default and the other what the user asked for, and warns at every batch.
    """
    if "max_length" in settings and "max_new_tokens" in settings:
        raise UserError(
            f"max_length={settings['max_length']} and max_new_tokens={settings['max_new_tokens']}: "
            "two limits of the same length; give one of them"
        )
    settings = dict(settings)
    new_tokens = model.generation_config.max_new_tokens is not None
    if new_tokens and "max_length" in settings:  # max_length counts the start token too
        settings["max_new_tokens"] = max(settings.pop("max_length") - 1, 1)
    elif not new_tokens and "max_new_tokens" in settings:
        settings["max_length"] = settings.pop("max_new_tokens") + 1
    return settings


def parse_search(text: str) -> list[dict[str, Any]]:
    """Every combination of ``"num_beams=4:8 length_penalty=0.8:1.0 early_stopping=true:false"``.

    The last name varies fastest. Raises one ``UserError`` for all unknown names, bad values and
    parts without ``=``.
    """
    axes: dict[str, list[Any]] = {}
    problems: list[str] = []
    for part in text.split():
        name, equals, values = part.partition("=")
        if not equals or not name or not all(values.split(":")):
            problems.append(f"search '{part}': expected name=value or name=value:value")
        elif name in axes:
            problems.append(f"search '{name}': given twice; join the values with ':'")
        else:
            axes[name] = list(dict.fromkeys(_literal(value) for value in values.split(":")))
            for value in axes[name]:
                try:
                    check_generation({name: value})
                except UserError as error:
                    problems += [p for p in error.problems if p not in problems]
    if not axes and not problems:
        problems.append("search is empty: expected for example 'num_beams=4:8'")
    raise_problems(problems)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@dataclass(frozen=True)
class SearchResult:
    """One combination of generation settings and its scores."""

    settings: dict[str, Any]
    scores: dict[str, float]


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: str,
    *,
    sources: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = ("bleu", "chrf"),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[SearchResult]:
    """Generate ``sources`` with every combination of ``grid``; best by ``metrics[0]`` first.

    ``options`` are those of ``generate_stream``; the grid's values win over them. ``progress`` is
    called with combinations done and their number. Raises ``UserError`` for a bad grid, an
    unknown metric and different numbers of sources and references.
    """
    if len(sources) != len(references):
        raise UserError(
            f"{len(sources)} source lines but {len(references)} reference lines; expected as many"
        )
    combinations = parse_search(grid)
    scorers = [TextMetrics(metrics) for _ in combinations]
    results = []
    for done, (settings, scorer) in enumerate(zip(combinations, scorers, strict=True), start=1):
        merged = {**options, **settings}
        returned = int(merged.get("num_return_sequences") or 1)
        texts = generate_stream(model, tokenizer, sources, **merged)
        scorer.add(list(itertools.islice(texts, 0, None, returned)), list(references))
        results.append(SearchResult(settings, scorer.result()))
        if progress is not None:
            progress(done, len(combinations))
    first = next(iter(results[0].scores))
    return sorted(results, key=lambda row: -row.scores[first])


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int
) -> list[list[int]]:
    """Token ids of each text, cut to ``limit``; ``UserError`` for ids beyond the vocabulary."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    size = source_vocab_size(model.config)
    largest = max(max(ids, default=0) for ids in encoded)
    if largest >= size:
        raise UserError(
            f"the tokenizer gives token id {largest}, but the model's vocabulary ends at "
            f"{size - 1}; give the tokenizer that belongs to the model"
        )
    return encoded


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    settings: Mapping[str, Any],
) -> list[str]:
    """Texts generated for a batch of token ids, ``num_return_sequences`` for each row."""
    import torch

    from s2s_scale.generation.shrinking import generate

    width = max(map(len, batch))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    with torch.inference_mode():
        try:
            generated = generate(
                model,
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                **settings,
            )
        except ValueError as error:  # transformers' checks of settings against each other
            raise UserError(f"generation settings: {' '.join(str(error).split())}") from error
    return decode(tokenizer, generated)


def _literal(text: str) -> Any:
    """``text`` as a bool, a number or ``None`` where it reads as one, else unchanged."""
    lowered = text.lower()
    if lowered in ("true", "false", "null", "none"):
        return {"true": True, "false": False}.get(lowered)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _value_problems(name: str, value: Any) -> list[str]:
    """What is wrong with the type or range of a generation setting, as at most one line."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _WHOLE and not (number and value == int(value) and value >= 0):
        return [f"{name}={value}: expected a whole number of at least 0"]
    if name in _REAL and not number:
        return [f"{name}={value}: expected a number"]
    if name in _FLAGS and not isinstance(value, bool):
        return [f"{name}={value}: expected true or false"]
    if name in ("num_beams", "num_return_sequences", "max_new_tokens", "max_length") and value < 1:
        return [f"{name}={value}: expected a whole number of at least 1"]
    return []
