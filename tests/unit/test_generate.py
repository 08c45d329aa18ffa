"""Generation from plain lines, and the search over generation settings."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sacrebleu
import torch
from transformers import GenerationConfig

from s2s_scale.config import ModelArguments
from s2s_scale.errors import UserError
from s2s_scale.generation.options import check_generation, parse_grid
from s2s_scale.generation.stream import generate_stream, grid_search, read_lines
from s2s_scale.models import Loaded, decoder_inputs_from_labels, load
from tests.support.families import FAMILY_NAMES, TINY_TEXTS, tiny_folder, tiny_model

WORDS = sorted(set(" ".join(TINY_TEXTS).split()))
# one word once to nine times; trained models answer with the word, twice
LINES = [" ".join([word] * (1 + i * 7 % 9)) for i, word in enumerate(WORDS[:30])]


def train_a_little(loaded: Loaded, *, steps: int = 50) -> None:
    """Until what the model generates depends on its source; fresh models repeat one token."""
    _, tokenizer, model = loaded
    chance = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        words = chance.choices(WORDS, k=24)
        texts = [" ".join([word] * chance.randint(1, 4)) for word in words]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        pad = tokenizer.pad_token_id
        targets = [f"{word} {word}" for word in words]
        labels = tokenizer(text_target=targets, padding=True, return_tensors="pt")["input_ids"]
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=decoder_inputs_from_labels(model, labels, pad),
            use_cache=False,
        ).logits
        cross_entropy = torch.nn.functional.cross_entropy
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=pad).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    base = tmp_path_factory.mktemp("generate")
    loaded = {}
    for name in FAMILY_NAMES:
        arguments = ModelArguments(model_name_or_path=str(tiny_folder(name, base / name)))
        loaded[name] = load(arguments)
        train_a_little(loaded[name])
    return loaded


def one_by_one(loaded: Loaded, line: str, **settings: object) -> list[str]:
    """The reference: one row at a time, straight through ``generate``."""
    _, tokenizer, model = loaded
    batch = tokenizer([line], return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    generated = model.eval().generate(**inputs, **settings)
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.replace("\n", " ") for text in texts]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_batched_text_equals_one_by_one_in_order(name: str, models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models[name]
    settings = {"num_beams": 2, "max_new_tokens": 6}
    expected = [one_by_one(models[name], line, **settings)[0] for line in LINES]
    assert len(set(expected)) > 5, "all rows alike: order would not show"
    found = list(
        generate_stream(model, tokenizer, LINES, batch_size=4, window_batches=3, **settings)
    )
    assert found == expected


def test_lines_are_read_as_they_are_needed(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["marian"]
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "the cat"

    stream = generate_stream(
        model, tokenizer, endless(), batch_size=2, window_batches=3, max_new_tokens=2
    )
    for _ in range(7):
        next(stream)
    assert taken == 12


def test_empty_lines_keep_their_place(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["marian"]
    lines = ["", "the cat", "  ", "a dog", ""]
    found = list(generate_stream(model, tokenizer, lines, max_new_tokens=4))
    expected = [one_by_one(models["marian"], line, max_new_tokens=4)[0] for line in lines]
    assert found == ["", expected[1], "", expected[3], ""]
    assert found[1]
    assert list(generate_stream(model, tokenizer, ["", ""])) == ["", ""]
    assert list(generate_stream(model, tokenizer, [])) == []


def test_several_sequences_follow_their_line(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["bart"]
    lines = ["the cat sees", "", "a dog"]
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    found = list(generate_stream(model, tokenizer, lines, **settings))
    first, last = (one_by_one(models["bart"], lines[i], **settings) for i in (0, 2))
    assert found == [*first, "", "", *last]
    assert len(set(found)) > 2


def test_prefix_and_source_length(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["marian"]
    options = {"max_new_tokens": 5}
    prefixed = list(generate_stream(model, tokenizer, LINES, source_prefix="a red ", **options))
    assert prefixed == list(
        generate_stream(model, tokenizer, ["a red " + line for line in LINES], **options)
    )
    assert prefixed != list(generate_stream(model, tokenizer, LINES, **options))
    cut = list(generate_stream(model, tokenizer, [TINY_TEXTS[0]], max_source_length=4, **options))
    ids = tokenizer([TINY_TEXTS[0]], truncation=True, max_length=4)["input_ids"]
    assert len(ids[0]) == 4
    generated = model.generate(input_ids=torch.tensor(ids), **options)
    assert cut == tokenizer.batch_decode(generated, skip_special_tokens=True)


def test_rows_longer_than_the_models_positions_are_cut(models: dict[str, Loaded]) -> None:
    _, tokenizer, _ = models["bart"]
    model = tiny_model("bart", vocab_size=300, max_position_embeddings=16)
    line = " ".join(["the cat"] * 60)
    assert len(tokenizer(line)["input_ids"]) > 64
    assert len(list(generate_stream(model, tokenizer, [line], max_new_tokens=3))) == 1


def test_the_model_keeps_its_mode(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["bart"]
    model.train()
    list(generate_stream(model, tokenizer, ["the cat"], max_new_tokens=2))
    assert model.training
    model.train(False)


def test_sampling_follows_the_seed(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["t5"]
    options = {"do_sample": True, "top_k": 40, "temperature": 1.5, "max_new_tokens": 6}

    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return list(generate_stream(model, tokenizer, LINES[:6], **options))

    assert sample(1) == sample(1) != sample(2)


def test_tokens_beyond_the_models_vocabulary(models: dict[str, Loaded]) -> None:
    _, tokenizer, _ = models["bart"]
    with pytest.raises(UserError, match=r"token id \d+, but the model's vocabulary ends at 49"):
        list(generate_stream(tiny_model("bart", vocab_size=50), tokenizer, ["the cat"]))


@pytest.mark.parametrize("model_limit", [{"max_length": 50}, {"max_new_tokens": 50}])
@pytest.mark.parametrize("limit", [{"max_length": 4}, {"max_new_tokens": 3}])
def test_the_asked_for_length_wins_over_the_models(
    model_limit: dict[str, int], limit: dict[str, int], models: dict[str, Loaded]
) -> None:
    tokenizer = models["marian"].tokenizer
    model = tiny_model("marian", vocab_size=len(tokenizer))  # writes on until it is stopped
    loaded = Loaded(model.config, tokenizer, model)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        **{**before.to_dict(), "max_length": None, "max_new_tokens": None, **model_limit}
    )
    try:
        found = list(generate_stream(model, tokenizer, [TINY_TEXTS[-1]], **limit))
    finally:
        model.generation_config = before
    assert found == one_by_one(loaded, TINY_TEXTS[-1], max_new_tokens=3)
    assert found != one_by_one(loaded, TINY_TEXTS[-1], max_new_tokens=50)


def test_two_lengths_are_refused(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["marian"]
    with pytest.raises(UserError, match="give one of them"):
        list(generate_stream(model, tokenizer, ["a"], max_length=5, max_new_tokens=5))


# --- reading


def test_read_lines_split_at_line_feeds_only() -> None:
    data = "\ufeffone\r\ntwo\u2028still two\n\nlast".encode()
    assert list(read_lines(io.BytesIO(data), "x")) == ["one", "two\u2028still two", "", "last"]


def test_invalid_utf8_names_file_line_and_byte(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_bytes(b"good\nna\xefve\n")
    lines = read_lines(file.open("rb"), str(file))
    assert next(lines) == "good"
    with pytest.raises(UserError) as error:
        next(lines)
    assert f"{file}:2: invalid UTF-8 at byte 3 (0xef)" in str(error.value)


# --- settings


def test_unknown_and_impossible_settings_are_named_together() -> None:
    with pytest.raises(UserError) as error:
        check_generation({"num_beam": 2, "num_beams": 0, "length_penalty": "x", "top_k": None})
    lines = error.value.problems
    assert len(lines) == 3
    assert "unknown generation setting 'num_beam' (did you mean 'num_beams'?)" in lines[0]
    assert lines[1] == "num_beams=0: expected a whole number of at least 1"
    assert lines[2] == "length_penalty=x: expected a number"


def test_none_means_the_models_own_value() -> None:
    assert check_generation({"num_beams": None, "do_sample": False}) == {"do_sample": False}


def test_settings_that_exclude_each_other(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["bart"]
    with pytest.raises(UserError, match=r"generation settings: .*num_return_sequences"):
        list(generate_stream(model, tokenizer, ["a"], num_beams=2, num_return_sequences=3))


def test_parse_grid() -> None:
    grid = parse_grid("num_beams=4:8 length_penalty=0.8:1 early_stopping=true:never")
    assert len(grid) == 8
    assert grid[0] == {"num_beams": 4, "length_penalty": 0.8, "early_stopping": True}
    assert grid[1]["early_stopping"] == "never"
    assert grid[-1] == {"num_beams": 8, "length_penalty": 1, "early_stopping": "never"}
    assert parse_grid("num_beams=2:2") == [{"num_beams": 2}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "search is empty"),
        ("num_beams", "'num_beams': expected name=value"),
        ("num_beams=4:", "expected name=value"),
        ("num_beems=4", "did you mean 'num_beams'"),
        ("num_beams=many", "num_beams=many: expected a whole number"),
        ("num_beams=2.5", "num_beams=2.5: expected a whole number"),
        ("do_sample=1", "do_sample=1: expected true or false"),
        ("early_stopping=maybe", "early_stopping"),
        ("num_beams=2 num_beams=3", "given twice"),
    ],
)
def test_bad_searches(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_grid(text)
    assert len(error.value.problems) == 1
    assert message in str(error.value)


def test_search_sorts_by_the_first_metric(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["marian"]
    sources = LINES[:8]
    # references that only one combination reproduces: the first two tokens of greedy text
    short = list(generate_stream(model, tokenizer, sources, num_beams=1, max_new_tokens=2))
    longer = list(generate_stream(model, tokenizer, sources, num_beams=1, max_new_tokens=5))
    assert short != longer
    calls: list[tuple[int, int]] = []
    results = grid_search(
        model,
        tokenizer,
        "max_new_tokens=5:2:3 num_beams=1",
        sources=sources,
        references=short,
        metrics=["exact_match", "chrf"],
        progress=lambda done, total: calls.append((done, total)),
        batch_size=3,
    )
    assert results[0].settings == {"max_new_tokens": 2, "num_beams": 1}
    assert results[0].scores["exact_match"] == 100
    values = [row.scores["exact_match"] for row in results]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    last = results[-1]
    texts = list(generate_stream(model, tokenizer, sources, **last.settings))
    assert last.scores["chrf"] == sacrebleu.corpus_chrf(texts, [short]).score


def test_search_refuses_different_numbers_of_lines(models: dict[str, Loaded]) -> None:
    _, tokenizer, model = models["marian"]
    with pytest.raises(UserError, match="2 source lines but 1 reference lines"):
        grid_search(model, tokenizer, "num_beams=1", sources=["a", "b"], references=["a"])
