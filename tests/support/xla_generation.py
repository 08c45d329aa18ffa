"""Generates on XLA devices, and tells how that compares with the CPU's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RUNS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "options": {
        "num_beams": 4,
        "num_return_sequences": 2,
        "early_stopping": True,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_length": 4,
        "bad_words_ids": [[7], [8, 9]],
    },
}
LIMIT, WIDTH, BATCH = 14, 16, 20


def work(backend: Any, job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Each of ``searches`` with a model of each of ``families``, on so many ``rows``."""
    return [
        _run(backend, family, name, RUNS[name], job["rows"])
        for family in job["families"]
        for name in job["searches"]
    ]


def _run(backend: Any, family: str, name: str, options: dict[str, Any], rows: int) -> Any:
    import torch

    from s2s_scale.generation.static import StaticGenerator
    from tests.support.ended import ending_model, sources, text_lengths

    reference, model = ending_model(family), ending_model(family)
    for one in (reference, model):
        one.generation_config.max_length = None
    backend.place_model(model)
    generator = StaticGenerator(model, sync=backend.flush, to_host=backend.collectives.to_host)
    batch = sources(reference, rows, seed=7, width=WIDTH)
    equal, counts, lengths = [], [], []
    for first in range(0, rows, BATCH):
        part = {key: value[first : first + BATCH] for key, value in batch.items()}
        wanted = reference.generate(**part, max_new_tokens=LIMIT, **options)
        before = backend.compilations()[0]
        result = generator.generate(**backend.place_batch(part), max_new_tokens=LIMIT, **options)
        counts.append(backend.compilations()[0] - before)
        width = max(wanted.shape[1], result.shape[1])
        padded = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (wanted, result)]
        equal += (padded[0] == padded[1]).all(1).tolist()
        lengths += text_lengths(wanted, reference)
    return {
        "family": family,
        "name": name,
        "equal": equal,
        "compilations": counts,
        "lengths": sorted(set(lengths)),
    }
