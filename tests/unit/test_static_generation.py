"""Generation with static shapes against ``model.generate``, token by token, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    M2M100Config,
    MT5Config,
    PreTrainedModel,
)

from s2s_scale.errors import UserError
from s2s_scale.generation.logits_rules import make_rules
from s2s_scale.generation.static import StaticGenerator, static_width
from tests.support.ended import ending_model, sources, text_lengths
from tests.support.families import FAMILY_NAMES, tiny_model

LIMIT = 14
BEAMS = {"num_beams": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": BEAMS,
    "early": {**BEAMS, "early_stopping": True, "num_return_sequences": 3},
    "never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "short": {**BEAMS, "length_penalty": -0.5},
    "never-short": {**BEAMS, "early_stopping": "never", "length_penalty": 0.0},
    "ngrams-1": {"no_repeat_ngram_size": 1},
    "ngrams-2": {**BEAMS, "no_repeat_ngram_size": 2},
    "ngrams-3": {"no_repeat_ngram_size": 3},
    "repetition": {"repetition_penalty": 1.7},
    "repetition-beams": {"num_beams": 2, "repetition_penalty": 1.7},
    "encoder-repetition": {"encoder_repetition_penalty": 1.5},
    "encoder-ngrams": {**BEAMS, "encoder_no_repeat_ngram_size": 2},
    "min-length": {**BEAMS, "min_length": 7},
    "min-new": {"min_new_tokens": 5},
    "forced-bos": {**BEAMS, "forced_bos_token_id": 9},
    "forced-eos": {**BEAMS, "forced_eos_token_id": 1, "min_length": LIMIT},
    "bad-words": {**BEAMS, "bad_words_ids": [[7], [8, 9], [10, 11, 12]]},
    "bias": {"sequence_bias": {(20,): 9.0, (21, 22): 5.0, (20, 23): 12.0}},
    "suppress": {"suppress_tokens": [10, 11], "begin_suppress_tokens": [13, 14]},
    "decay": {"exponential_decay_length_penalty": (2, 1.3)},
    "normalized": {**BEAMS, "renormalize_logits": True, "bad_words_ids": [[7]]},
    "valid": {"remove_invalid_values": True},
    "three-ends": {**BEAMS, "eos_token_id": [1, 2, 20]},
    "max-length": {**BEAMS, "max_length": 6, "max_new_tokens": None},
    "shortest": {**BEAMS, "max_length": 2, "max_new_tokens": None},
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    made = {}
    for family in FAMILY_NAMES:
        made[family] = ending_model(family)
        # FSMT's own max_length would win a warning from transformers at each call
        made[family].generation_config.max_length = None
    return made


def both(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """What transformers generates, and what ``StaticGenerator`` does."""
    options = {"max_new_tokens": LIMIT, **options}
    wanted = model.generate(**batch, **options)  # type: ignore[operator]
    return wanted, StaticGenerator(model).generate(**batch, **options)


def check_equal(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tokens_equal_transformers(
    family: str, name: str, models: dict[str, PreTrainedModel]
) -> None:
    model = models[family]
    wanted, found = both(model, sources(model, 12, seed=11), **OPTIONS[name])
    check_equal(found, wanted)


@pytest.mark.parametrize("options", [{}, BEAMS])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_compared_rows_end_at_different_steps(
    family: str, options: dict[str, Any], models: dict[str, PreTrainedModel]
) -> None:
    model = models[family]
    wanted, _ = both(model, sources(model, 12, seed=11), **options)
    assert len(set(text_lengths(wanted, model))) >= 3


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("greedy", "valid")])
def test_the_compared_options_change_the_text(
    name: str, models: dict[str, PreTrainedModel]
) -> None:
    options = {"max_new_tokens": LIMIT, **OPTIONS[name]}
    plain = {"max_new_tokens": LIMIT}
    if len(OPTIONS[name]) > 1 and "num_beams" in options:
        plain["num_beams"] = options["num_beams"]

    def changes(model: PreTrainedModel) -> bool:
        batch = sources(model, 12, seed=11)
        generator = StaticGenerator(model)
        found, without = (
            generator.generate(**batch, **options),
            generator.generate(**batch, **plain),
        )
        return found.tolist() != without.tolist()

    assert any(map(changes, models.values()))


@pytest.mark.parametrize("check_every", [1, 3, 100])
def test_when_the_end_is_looked_for_does_not_matter(
    check_every: int, models: dict[str, PreTrainedModel]
) -> None:
    model = models["pegasus"]
    batch = sources(model, 12, seed=11)
    steps: list[None] = []
    generator = StaticGenerator(model, sync=lambda: steps.append(None), check_every=check_every)
    options = {"max_new_tokens": 40, **BEAMS}
    found = generator.generate(**batch, **options)
    check_equal(found, model.generate(**batch, **options))  # type: ignore[operator]
    assert found.shape[1] < 30
    assert (len(steps) == 40) == (check_every == 100)


@pytest.mark.parametrize("options", [{}, {**BEAMS, "num_return_sequences": 2}])
def test_rows_that_fill_up_do_not_count(
    options: dict[str, Any], models: dict[str, PreTrainedModel]
) -> None:
    model = models["marian"]
    batch = sources(model, 6, seed=5, width=20)
    wanted = model.generate(**batch, max_new_tokens=40, **options)  # type: ignore[operator]
    assert wanted.shape[1] < 30
    filled = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((4, 20), 7)]),
        "attention_mask": torch.cat(
            [batch["attention_mask"], torch.eye(20)[:1].long().expand(4, 20)]
        ),
    }
    active = torch.arange(10) < 6
    generator = StaticGenerator(model)
    found = generator.generate(**filled, active=active, max_new_tokens=40, **options)
    check_equal(found[: len(wanted)], wanted)
    none = generator.generate(**filled, active=torch.zeros(10, dtype=torch.bool), max_new_tokens=40)
    assert none.shape == (10, 1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_wider_padding_gives_the_same_text(family: str, models: dict[str, PreTrainedModel]) -> None:
    model = models[family]
    narrow, wide = (sources(model, 12, seed=11, width=width) for width in (0, 48))
    generator = StaticGenerator(model)
    found = [generator.generate(**batch, max_new_tokens=LIMIT, **BEAMS) for batch in (narrow, wide)]
    check_equal(found[0], found[1])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_eager_attention(family: str, models: dict[str, PreTrainedModel]) -> None:
    model = models[family]
    before = model.config._attn_implementation
    batch = sources(model, 12, seed=11)
    if family != "fsmt":
        model.set_attn_implementation("eager")
    try:
        wanted, found = both(model, batch, **BEAMS)
    finally:
        model.set_attn_implementation(before)
    check_equal(found, wanted)


@pytest.mark.parametrize("options", [{}, BEAMS])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bf16_weights(
    family: str, options: dict[str, Any], models: dict[str, PreTrainedModel]
) -> None:
    """Rounding may order two tokens of nearly the same score either way: text for most rows."""
    model = ending_model(family).bfloat16()
    model.generation_config.max_length = None
    wanted, found = both(model, sources(model, 12, seed=11), **options)
    rows = min(wanted.shape[1], found.shape[1])
    same = (wanted[:, :rows] == found[:, :rows]).all(1)
    assert same.float().mean() >= 0.75


@pytest.mark.parametrize("options", [{}, BEAMS])
def test_autocast(options: dict[str, Any], models: dict[str, PreTrainedModel]) -> None:
    model = models["bart"]
    batch = sources(model, 12, seed=11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = both(model, batch, **options)
    same = [a == b for a, b in zip(wanted.tolist(), found.tolist(), strict=True)]
    assert sum(same) >= 9


def test_the_models_own_generation_config_counts(models: dict[str, PreTrainedModel]) -> None:
    model = models["mbart"]
    before = model.generation_config
    model.generation_config = GenerationConfig(
        **{**before.to_dict(), "num_beams": 3, "max_length": 9, "length_penalty": 0.3}
    )
    batch = sources(model, 8, seed=2)
    try:
        wanted = model.generate(**batch)  # type: ignore[operator]
        found = StaticGenerator(model).generate(**batch)
        chosen = GenerationConfig(num_beams=2, max_length=8, eos_token_id=2, pad_token_id=1)
        wanted_too = model.generate(**batch, generation_config=chosen)  # type: ignore[operator]
        found_too = StaticGenerator(model).generate(**batch, generation_config=chosen)
    finally:
        model.generation_config = before
    check_equal(found, wanted)
    check_equal(found_too, wanted_too)
    assert found.shape[1] <= 9 and found_too.shape[1] <= 8


def test_no_length_at_all_is_transformers_default(models: dict[str, PreTrainedModel]) -> None:
    model = models["t5"]
    batch = sources(model, 8, seed=2)
    wanted = model.generate(**batch)  # type: ignore[operator]
    check_equal(StaticGenerator(model).generate(**batch), wanted)
    assert wanted.shape[1] == 21  # some row writes on to the limit


def test_fsmt_positions_beyond_its_table(models: dict[str, PreTrainedModel]) -> None:
    model = tiny_model("fsmt", max_position_embeddings=8)
    model.generation_config.max_length = None
    table = model.get_decoder().embed_positions
    forward = table.forward
    batch = sources(model, 4, seed=2)
    found = StaticGenerator(model).generate(**batch, max_new_tokens=30)
    assert table.forward == forward
    fresh = tiny_model("fsmt", max_position_embeddings=8)
    wanted = fresh.generate(**batch, max_length=31)  # type: ignore[operator]
    assert wanted.shape[1] == 31
    check_equal(found, wanted)


# --- what cannot be static


REFUSED: dict[str, Any] = {
    "do_sample": True,
    "max_time": 2.5,
    "stop_strings": "x",
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "num_beam_groups": 2,
    "prompt_lookup_num_tokens": 3,
    "return_dict_in_generate": True,
    "output_scores": True,
    "cache_implementation": "offloaded",
    "prefix_allowed_tokens_fn": print,
    "logits_processor": [],
    "stopping_criteria": [],
    "decoder_input_ids": torch.zeros(2, 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_are_named(name: str, models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(UserError) as error:
        StaticGenerator(models["bart"]).generate(torch.ones(1, 3).long(), **{name: REFUSED[name]})
    (line,) = error.value.problems
    assert line.startswith(f"{name}=")
    assert "static shapes; " in line and "\n" not in line


def test_refused_options_of_the_models_config_too(models: dict[str, PreTrainedModel]) -> None:
    model = models["t5"]
    model.generation_config.do_sample = True
    try:
        with pytest.raises(UserError, match="do_sample=True: .* use greedy or beam search"):
            StaticGenerator(model).generate(torch.ones(1, 3).long())
        StaticGenerator(model).generate(torch.ones(1, 3).long(), do_sample=False, max_length=3)
    finally:
        model.generation_config.do_sample = None


def test_all_refused_options_at_once(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(UserError) as error:
        StaticGenerator(models["t5"]).generate(
            torch.ones(1, 3).long(), do_sample=True, max_time=1.0, output_logits=True
        )
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beems": 3}, "unknown generation option 'num_beems'"),
        ({"max_length": 1}, "max_length=1: leaves no room after the start token"),
        (
            {"num_beams": 2, "num_return_sequences": 3},
            "generation settings: .*num_return_sequences",
        ),
        ({"repetition_penalty": -1.0}, "generation settings: .*penalty"),
        ({"max_length": 200}, "max_length=200: the model has positions for 64 tokens; .*=65"),
        ({"bad_words_ids": [[500]]}, "token ids of at most 95"),
        ({"decoder_start_token_id": [3, 4]}, r"decoder_start_token_id=\[3, 4\]: expected one"),
    ],
)
def test_bad_options(
    options: dict[str, Any], message: str, models: dict[str, PreTrainedModel]
) -> None:
    with pytest.raises(UserError, match=message) as error:
        StaticGenerator(models["bart"]).generate(torch.ones(2, 3).long(), **options)
    assert len(error.value.problems) == 1


def test_sources_longer_than_the_models_positions(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(UserError, match="a source of 70 tokens: the model has positions for 64"):
        StaticGenerator(models["bart"]).generate(torch.ones(2, 70).long(), max_length=5)


def test_a_rule_without_a_static_version() -> None:
    class NewLogitsProcessor:
        pass

    with pytest.raises(UserError, match="NewLogitsProcessor: this logits processor"):
        make_rules([NewLogitsProcessor()], vocab_size=5, max_length=4, device=torch.device("cpu"))


def test_models_and_attentions_that_are_not_known() -> None:
    model = tiny_model("bart")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="attn_implementation=flash_attention_2"):
        StaticGenerator(model)
    model.config.model_type = "prophetnet"
    with pytest.raises(UserError, match="model type 'prophetnet': .* bart, t5"):
        StaticGenerator(model)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("kind", ["mt5", "m2m_100"])
def test_other_model_types(kind: str, options: dict[str, Any]) -> None:
    small = {"vocab_size": 96, "d_model": 16, "pad_token_id": 1}
    config: Any
    if kind == "mt5":
        config = MT5Config(
            **small, num_layers=2, d_kv=8, d_ff=32, num_heads=2, decoder_start_token_id=0
        )
    else:
        sides = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32}
        config = M2M100Config(**small, **sides, decoder_ffn_dim=32, init_std=0.5)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    batch = {"input_ids": torch.randint(6, 90, (5, 9)), "attention_mask": torch.ones(5, 9).long()}
    batch["attention_mask"][1, 5:] = 0
    wanted, found = both(model, batch, **options)
    check_equal(found, wanted)
    assert len({tuple(row) for row in wanted.tolist()}) > 1


def test_static_widths() -> None:
    widths = {static_width(longest, 1024) for longest in range(1, 1025)}
    assert widths == {16, 32, 64, 128, 256, 512, 1024}
    assert all(static_width(n, 1024) >= n for n in range(1, 1025))
    assert static_width(20, 24) == 24
    assert static_width(3, 8) == 8
