"""Generation in a batch that shrinks, against ``model.generate``, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from s2s_scale.generation.shrinking import generate
from tests.support.ended import ending_model, sources, text_lengths
from tests.support.families import FAMILY_NAMES
from tests.unit.test_static_generation import BEAMS, LIMIT, OPTIONS

#: which run in transformers' own loop
WHOLE: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 5},
    "sampling with beams": {"do_sample": True, "num_beams": 3},
    "more than tokens": {"return_dict_in_generate": True, "output_scores": True, **BEAMS},
    "no cache": {"use_cache": False},
    "sources repeated": {"encoder_repetition_penalty": 1.5, **BEAMS},
    "static cache": {"cache_implementation": "static"},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [1, 8 + row, 9 + row]},
    "a longer start": {"decoder_input_ids": torch.tensor([[2, 9, 10]] * 12)},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "one_row": True},
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    made = {family: ending_model(family) for family in FAMILY_NAMES}
    for model in made.values():
        model.generation_config.max_length = None
    return made


@contextmanager
def decoded_rows(model: PreTrainedModel) -> Iterator[list[int]]:
    """Rows of each call of the decoder."""
    rows: list[int] = []

    def count(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = options.get("input_ids", args[0] if args else None)
        rows.append(len(ids))

    handle = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    yield rows
    handle.remove()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", ["bart", "fsmt", "t5"])
def test_tokens_equal_transformers(
    family: str, name: str, models: dict[str, PreTrainedModel]
) -> None:
    model, batch = models[family], sources(models[family], 12, seed=11)
    options = {"max_new_tokens": LIMIT, **OPTIONS[name]}
    wanted: Tensor = model.generate(**batch, **options)  # type: ignore[operator]
    found = generate(model, **batch, **options)
    assert found.shape == wanted.shape
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("options", [{}, BEAMS, OPTIONS["early"]], ids=["greedy", "beams", "early"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_batch_shrinks_as_rows_end(
    family: str, options: dict[str, Any], models: dict[str, PreTrainedModel]
) -> None:
    model, batch = models[family], sources(models[family], 24, seed=5)
    wanted: Tensor = model.generate(**batch, max_new_tokens=40, **options)  # type: ignore[operator]
    with decoded_rows(model) as rows:
        found = generate(model, **batch, max_new_tokens=40, **options)
    assert found.tolist() == wanted.tolist()
    assert len(set(text_lengths(wanted, model))) >= 3
    beams = options.get("num_beams", 1)
    assert rows[0] == 24 and rows[1] <= 24 * beams  # the first token once a row
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 24 * beams


@pytest.mark.parametrize("name", WHOLE)
def test_other_ways_run_as_transformers_runs_them(
    name: str, models: dict[str, PreTrainedModel]
) -> None:
    model, options = models["t5"], dict(WHOLE[name])
    batch = sources(model, 1 if options.pop("one_row", False) else 12, seed=11)
    results = []
    for way in (model.generate, lambda **given: generate(model, **given)):
        torch.manual_seed(3)
        results.append(way(**batch, max_new_tokens=LIMIT, **options))  # type: ignore[operator]
    wanted, found = (getattr(result, "sequences", result) for result in results)
    assert type(results[0]) is type(results[1])
    assert found.tolist() == wanted.tolist()


def test_a_rule_of_the_users_own_sees_the_whole_batch(models: dict[str, PreTrainedModel]) -> None:
    model, batch, seen = models["bart"], sources(models["bart"], 12, seed=11), set()

    class Watch(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            seen.add(len(input_ids))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = generate(model, **batch, max_new_tokens=LIMIT, stopping_criteria=[Watch()])
    assert seen == {12}
    assert found.tolist() == model.generate(**batch, max_new_tokens=LIMIT).tolist()  # type: ignore[operator]


def test_unknown_options_are_refused_as_by_transformers(models: dict[str, PreTrainedModel]) -> None:
    batch = sources(models["t5"], 2, seed=1)
    with pytest.raises(ValueError, match="unheard_of"):
        generate(models["t5"], **batch, unheard_of=1)
