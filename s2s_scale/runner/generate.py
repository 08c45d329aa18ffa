"""``generate``: texts for source lines, scored against references if there are any."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from s2s_scale import models
from s2s_scale.arguments import Seq2SeqTrainingArguments
from s2s_scale.backends import Backend
from s2s_scale.config import DataArguments, ModelArguments
from s2s_scale.errors import UserError, raise_problems
from s2s_scale.evaluation.metrics import TextMetrics
from s2s_scale.generation.engines import ENGINE, package_problems
from s2s_scale.generation.static import StaticGenerator
from s2s_scale.generation.stream import (
    EngineBatches,
    OwnBatches,
    StaticBatches,
    generate_stream,
    read_lines,
    search,
)
from s2s_scale.runner.build import open_backend, source_prefix_of, wanted_device
from s2s_scale.settings import Settings, split_settings
from s2s_scale.settings.commands import GenerateOptions
from s2s_scale.utils import atomic_file, table_console

DEFAULT_SEED = 42
GENERATION_OPTIONS = (
    "num_beams length_penalty max_length max_new_tokens num_return_sequences no_repeat_ngram_size "
    "temperature top_k top_p"
).split()


def generate(settings: Settings) -> int:
    """Write one text per source line, or ``num_return_sequences`` texts, best first.

    With ``--reference`` the texts are scored; the table goes to standard error, so that standard
    output contains only texts. With ``--search`` every combination of the grid is scored instead,
    and the table of scores goes to standard output.
    """
    with open_backend(settings) as backend:
        own: GenerateOptions = settings.options
        model_values, data_values, training_values = split_settings(
            settings.values, ModelArguments, DataArguments, Seq2SeqTrainingArguments
        )
        data = DataArguments(**data_values)
        engine = training_values.get("generation_engine")
        if engine == "ctranslate2":
            _check_engine(backend)
        references = None
        if own.reference:
            with Path(own.reference).open("rb") as stream:
                references = list(read_lines(stream, own.reference))
        loaded = models.load(
            ModelArguments(**model_values),
            src_lang=data.src_lang,
            tgt_lang=data.tgt_lang,
            task=data.task,
        )
        model: Any = loaded.model
        model.to(dtype=_precision(training_values))
        if backend.static_shapes:
            backend.place_model(model)
        else:
            model.to(device=wanted_device(settings))
        transformers.set_seed(training_values.get("seed", DEFAULT_SEED))
        with _own_batches(backend, model, own.batch_size, engine) as batches:
            chosen = {name: getattr(own, name) for name in GENERATION_OPTIONS}
            options = {
                "batch_size": own.batch_size,
                "source_prefix": source_prefix_of(data, loaded.config),
                "max_source_length": data.max_source_length,
                "own": batches,
                **{name: value for name, value in chosen.items() if value is not None},
                **({"do_sample": True} if own.do_sample else {}),
            }
            if own.search:
                _search(loaded, own, references or [], data.metrics, options)
            else:
                _generate(loaded, own, references, data.metrics, options)
    return 0


def _check_engine(backend: Backend) -> None:
    problems = package_problems()
    if backend.static_shapes:
        problems.append(
            f"{ENGINE}: runs only on CPUs and GPUs; omit --generation_engine, or generate "
            "under another profile"
        )
    raise_problems(problems)


@contextmanager
def _own_batches(
    backend: Backend, model: Any, batch_size: int, engine: str | None
) -> Iterator[OwnBatches | None]:
    """What replaces the model's own ``generate``, if anything."""
    if engine == "ctranslate2":
        from s2s_scale.generation.ctranslate2 import ctranslate2_engine

        with ctranslate2_engine(model) as found:
            yield EngineBatches(found)
    elif backend.static_shapes:
        generator = StaticGenerator(model, sync=backend.flush, fetch=backend.collectives.to_host)
        rows = math.ceil(batch_size / backend.rows_multiple) * backend.rows_multiple
        yield StaticBatches(generator, rows, backend.place_batch)
    else:
        yield None


def _precision(values: dict[str, Any]) -> torch.dtype:
    """The dtype to cast weights to: fp32 unless --bf16_full_eval or --fp16_full_eval."""
    chosen = [
        dtype
        for name, dtype in (("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16))
        if values.get(name)
    ]
    if len(chosen) > 1:
        raise UserError(
            "--bf16_full_eval and --fp16_full_eval: expected at most one; omit one of them"
        )
    return chosen[0] if chosen else torch.float32


def _generate(
    loaded: models.Loaded,
    own: GenerateOptions,
    references: list[str] | None,
    metrics: list[str],
    options: dict[str, Any],
) -> None:
    returned = int(options.get("num_return_sequences") or 1)
    scores = TextMetrics(metrics) if references is not None else None
    with _source_lines(own.input) as lines, _output(own.output) as out:
        texts = generate_stream(loaded.model, loaded.tokenizer, lines, **options)
        bar = tqdm(
            texts, desc="generating", unit=" rows", file=sys.stderr, disable=not sys.stderr.isatty()
        )
        written = 0
        for text in bar:
            out.write(text + "\n")
            row, rank = divmod(written, returned)
            # A difference in the number of lines is reported below.
            if scores is not None and references and rank == 0 and row < len(references):
                scores.add([text], [references[row]])
            written += 1
    if scores is not None and references is not None:
        if written // returned != len(references):
            raise UserError(
                f"{own.reference}: {len(references)} lines, but the input has "
                f"{written // returned}; give one reference line per source line"
            )
        _print_scores(scores)


def _print_scores(scores: TextMetrics) -> None:
    table = Table(title=f"{scores.rows} rows", title_justify="left")
    table.add_column("metric")
    table.add_column("score", justify="right")
    for name, value in scores.result().items():
        table.add_row(name, f"{value:.2f}")
    console = Console(stderr=True)
    console.print(table)
    for metric, signature in scores.signatures().items():
        console.print(f"{metric}: {signature}", highlight=False, soft_wrap=True)


def _search(
    loaded: models.Loaded,
    own: GenerateOptions,
    references: list[str],
    metrics: list[str],
    options: dict[str, Any],
) -> None:
    assert own.search is not None
    with _source_lines(own.input) as lines:
        sources = list(lines)
    with tqdm(desc="search", unit=" settings", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = search(
            loaded.model,
            loaded.tokenizer,
            own.search,
            sources=sources,
            references=references,
            metrics=metrics,
            progress=progress,
            **options,
        )
    table = Table(title="best first", title_justify="left")
    for name in found[0].settings:
        table.add_column(name, justify="right")
    for name in found[0].scores:
        table.add_column(name, justify="right", style="bold" if name == "bleu" else "")
    for row in found:
        table.add_row(
            *(str(value) for value in row.settings.values()),
            *(f"{score:.2f}" for score in row.scores.values()),
        )
    table_console().print(table)


@contextmanager
def _source_lines(name: str) -> Iterator[Iterable[str]]:
    """Yield the lines of a file, or of standard input for ``-``."""
    if name == "-":
        if sys.stdin.isatty():
            print("reading source lines from standard input; end with Ctrl-D", file=sys.stderr)
        yield read_lines(sys.stdin.buffer, "standard input")
        return
    with Path(name).open("rb") as stream:
        yield read_lines(stream, name)


@contextmanager
def _output(name: str) -> Iterator[IO[str]]:
    """Yield standard output for ``-``, else a file that is written atomically."""
    if name == "-":
        yield sys.stdout
        return
    try:
        with atomic_file(Path(name)) as out:
            yield out
    except OSError as error:
        raise UserError(
            f"--output {name}: cannot be written ({error.strerror}); give another file"
        ) from error
