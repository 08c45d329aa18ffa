"""Text generated for lines of source text, in order and in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from s2s_scale.errors import UserError
from s2s_scale.evaluation.metrics import TextMetrics
from s2s_scale.evaluation.text import decode, one_line
from s2s_scale.generation.options import (
    check_generation,
    parse_grid,
    settings_error,
    unify_limits,
)
from s2s_scale.generation.shrinking import generate
from s2s_scale.generation.static import static_width
from s2s_scale.models.families import source_vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from s2s_scale.generation.ctranslate2 import CTranslate2Engine
    from s2s_scale.generation.static import StaticGenerator

#: batches whose lines are sorted by length together; more pad less, but delay the first text
WINDOW_BATCHES = 64


def read_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a binary stream without their line ends; only a line feed ends a line.

    Raises:
        UserError: text that is not valid UTF-8; names ``name``, the line and the byte.
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
    generator: BatchGenerator | None = None,
    **generation: Any,
) -> Iterator[str]:
    """Yield the text generated for each line, in the order of ``lines`` and without line ends.

    Lines are read as they are needed, ``batch_size * window_batches`` at a time, and sorted by
    length within that window. The text of an empty line is empty, so that line numbers match.

    Args:
        model: an encoder-decoder model, put into evaluation mode while texts are generated.
        tokenizer: the tokenizer that belongs to the model.
        lines: source texts.
        batch_size: lines per batch.
        source_prefix: put in front of each line.
        max_source_length: longer sources are truncated to this number of tokens, or to the number
            of the model's positions.
        window_batches: batches per window.
        generator: generates in place of ``model.generate``.
        generation: fields of ``GenerationConfig``; ``None`` means the model's own value. With
            ``num_return_sequences=n`` each line yields n texts, best first.

    Raises:
        UserError: unknown or impossible generation options, and token ids beyond the model's
            vocabulary.
    """
    settings = unify_limits(model, check_generation(generation))
    returned = int(settings.get("num_return_sequences") or 1)
    limit = min(max_source_length, getattr(model.config, "max_position_embeddings", 1 << 30))
    generator = generator or ModelBatches(model)
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
                ids = generator.generate(batch, limit, tokenizer.pad_token_id, settings)
                for index, text in enumerate(decode(tokenizer, ids)):
                    row = rows[chosen[index // returned]]
                    texts[row * returned + index % returned] = one_line(text)
            yield from texts
    finally:
        model.train(training)


class BatchGenerator(Protocol):
    """Generates token ids for a batch of sources."""

    def generate(
        self, batch: list[list[int]], limit: int, pad: int, settings: Mapping[str, Any]
    ) -> Tensor:
        """Token ids [len(batch) * num_return_sequences, T].

        Args:
            batch: token ids of each source.
            limit: the largest number of tokens that any source of the run may have.
            pad: the pad id.
            settings: options of ``generate``.
        """


@dataclass(frozen=True)
class ModelBatches:
    """Generates with the model itself, in batches that shrink as rows end."""

    model: PreTrainedModel

    def generate(
        self, batch: list[list[int]], limit: int, pad: int, settings: Mapping[str, Any]
    ) -> Tensor:
        """See ``BatchGenerator``."""
        inputs = {name: x.to(self.model.device) for name, x in _pad_batch(batch, pad).items()}
        with torch.inference_mode():
            try:
                generated: Tensor = generate(self.model, **inputs, **settings)
            except ValueError as error:  # from transformers, about options that do not go together
                raise settings_error(error) from error
        return generated


@dataclass(frozen=True)
class EngineBatches:
    """Generates with CTranslate2."""

    engine: CTranslate2Engine

    def generate(
        self, batch: list[list[int]], limit: int, pad: int, settings: Mapping[str, Any]
    ) -> Tensor:
        """See ``BatchGenerator``."""
        return self.engine.generate(**_pad_batch(batch, pad), **settings)


@dataclass(frozen=True)
class StaticBatches:
    """Generates in batches of few shapes, for devices that compile every new one."""

    generator: StaticGenerator
    #: rows of every batch; smaller ones get filler rows
    rows: int
    #: moves the tensors of a batch to the device
    place: Callable[[Mapping[str, Any]], Mapping[str, Any]]

    def generate(
        self, batch: list[list[int]], limit: int, pad: int, settings: Mapping[str, Any]
    ) -> Tensor:
        """See ``BatchGenerator``; sources are padded to one of a few widths up to ``limit``."""
        width = static_width(max(map(len, batch)), limit)
        inputs = _pad_batch(batch, pad, rows=self.rows, width=width)
        inputs["attention_mask"][:, 0] = 1  # a row that attends to nothing would give NaN
        active = torch.arange(self.rows) < len(batch)
        generated = self.generator.generate(**self.place(inputs), active=active, **settings)
        return generated[: len(generated) // self.rows * len(batch)]


@dataclass(frozen=True)
class SearchResult:
    """One combination of generation options and its scores."""

    settings: dict[str, Any]
    scores: dict[str, float]


def grid_search(
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
    """Generate ``sources`` with every combination of ``grid``, sorted by the first metric.

    Args:
        model: see ``generate_stream``.
        tokenizer: see ``generate_stream``.
        grid: options and their values, such as ``"num_beams=4:8 length_penalty=0.8:1.0"``.
        sources: source texts.
        references: one reference per source.
        metrics: names of ``TextMetrics``; results are sorted by the first one, best first.
        progress: called with the number of combinations done and their total.
        options: those of ``generate_stream``; the grid's values override them.

    Raises:
        UserError: a bad grid, an unknown metric, or different numbers of sources and references.
    """
    if len(sources) != len(references):
        raise UserError(
            f"{len(sources)} source lines but {len(references)} reference lines; expected one "
            "reference line per source line"
        )
    combinations = parse_grid(grid)
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
    """Token ids of each text, truncated to ``limit``; ``UserError`` beyond the vocabulary."""
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


def _pad_batch(
    batch: list[list[int]], pad: int, *, rows: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask``, LongTensors [rows, width].

    The number of rows and the width default to those of the batch.
    """
    ids = torch.full((rows or len(batch), width or max(map(len, batch))), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}
