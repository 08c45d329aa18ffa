"""Generation with CTranslate2 against ``model.generate``, and what it refuses."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel

from s2s_scale import Seq2SeqTrainingArguments, cli
from s2s_scale.errors import UserError
from s2s_scale.generation import ctranslate2
from tests.support.ended import ending_model, sources, text_lengths
from tests.support.families import TINY_TEXTS, tiny_folder, tiny_model
from tests.support.training import our_trainer, ragged_rows

pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (extra: ctranslate2)")

BEAMS = {"num_beams": 4, "early_stopping": True}
#: those whose texts are transformers' on every row
SAME: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": BEAMS,
    "short-beams": {**BEAMS, "length_penalty": 0.6},
    "min-length": {"min_length": 7},
    "bad-words": {"bad_words_ids": [[7], [8, 9]]},
    "suppress": {"suppress_tokens": [10, 11]},
    "forced-start": {"forced_bos_token_id": 9},
    "ngrams": {"no_repeat_ngram_size": 2},
    "limit": {"max_new_tokens": 5},
}
FAMILIES = ("bart", "mbart", "pegasus", "marian", "t5")


@pytest.fixture(scope="module")
def engines_of() -> Any:
    """family -> (model, engine)"""
    from s2s_scale.generation.ctranslate2 import ctranslate2_engine

    opened, found = [], {}
    for family in FAMILIES:
        model = ending_model(family)
        model.generation_config.max_length = None
        context = ctranslate2_engine(model)
        found[family] = (model, context.__enter__())
        opened.append(context)
    yield found
    for context in opened:
        context.__exit__(None, None, None)


def texts(tokens: torch.Tensor, model: PreTrainedModel) -> list[list[int]]:
    rows = zip(tokens.tolist(), text_lengths(tokens, model), strict=True)
    return [row[: length + 1] for row, length in rows]


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_transformers(family: str, name: str, engines_of: Any) -> None:
    model, engine = engines_of[family]
    batch = sources(model, 24, seed=11)
    options = {"max_new_tokens": 30, **SAME[name]}
    wanted = model.generate(**batch, **options)
    found = engine.generate(**batch, **options)
    assert texts(found, model) == texts(wanted, model)
    different = set(map(tuple, texts(wanted, model)))
    assert len(different) >= 10 or name == "forced-start"  # which some of them answer in one way


def test_beams_without_early_stopping_differ_in_few_rows(engines_of: Any) -> None:
    """These hardly trained models are the hard case: their beams are near to one another."""
    differ = rows = 0
    for model, engine in engines_of.values():
        batch = sources(model, 24, seed=11)
        options = {"max_new_tokens": 30, "num_beams": 4, "early_stopping": False}
        wanted, found = model.generate(**batch, **options), engine.generate(**batch, **options)
        pairs = zip(texts(found, model), texts(wanted, model), strict=True)
        differ += sum(one != other for one, other in pairs)
        rows += 24
    assert differ < 0.2 * rows


def test_the_model_is_left_as_it_was(engines_of: Any) -> None:
    from s2s_scale.generation.ctranslate2 import ctranslate2_engine

    model = tiny_model("marian")
    before = model.config.to_dict(), model.model.shared.weight.clone()
    with ctranslate2_engine(model):
        pass
    assert model.config.to_dict() == before[0]
    assert torch.equal(model.model.shared.weight, before[1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_sample": True}, "do_sample=True"),
        ({"repetition_penalty": 1.5}, "RepetitionPenalty"),
        ({"sequence_bias": {(20,): 3.0}}, "SequenceBias"),
        ({"num_beams": 2, "early_stopping": "never"}, "early_stopping=never"),
    ],
)
def test_options_that_it_lacks_are_named(
    options: dict[str, Any], named: str, engines_of: Any
) -> None:
    model, engine = engines_of["bart"]
    with pytest.raises(UserError, match=named):
        engine.generate(**sources(model, 2, seed=1), max_new_tokens=4, **options)


def test_a_family_without_a_converter_is_refused(tmp_path: Any) -> None:
    model = tiny_model("fsmt")
    with pytest.raises(UserError, match="model type 'fsmt'; expected one of bart, mbart"):
        our_trainer(
            model, tmp_path, None, predict_with_generate=True, generation_engine="ctranslate2"
        )


def test_it_has_no_effect_without_text(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="generation_engine=ctranslate2: has no effect without"):
        Seq2SeqTrainingArguments(output_dir=str(tmp_path), generation_engine="ctranslate2")


def test_a_missing_package_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctranslate2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 's2s-scale\[ctranslate2\]'"):
        Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), generation_engine="ctranslate2", predict_with_generate=True
        )


def test_evaluation_gives_the_rows_in_order_after_each_change_of_weights(tmp_path: Any) -> None:
    model = ending_model("bart").requires_grad_(True)
    rows = datasets.Dataset.from_list(ragged_rows(model, 9))
    seen: dict[str, list[Any]] = {"transformers": [], "ctranslate2": []}
    trainers = [
        our_trainer(
            model,
            tmp_path / engine,
            None,
            predict_with_generate=True,
            generation_engine=engine,
            eval_dataset=rows,
            compute_metrics=lambda p, kept=kept: kept.append(p.predictions.tolist()) or {},
        )
        for engine, kept in seen.items()
    ]
    for scale in (1.0, -1.0):
        with torch.no_grad():
            model.model.decoder.layers[0].fc2.weight.mul_(scale)
        losses = [trainer.evaluate(max_length=20)["eval_loss"] for trainer in trainers]
        assert losses[0] == pytest.approx(losses[1])
    first, second = seen["transformers"]
    assert first != second
    assert seen["ctranslate2"] == [first, second]


def test_the_command_generates_the_same_lines(tmp_path: Any) -> None:
    folder = tiny_folder("bart", tmp_path / "model")
    lines = tmp_path / "lines"
    lines.write_text("\n".join(TINY_TEXTS) + "\n", encoding="utf-8")
    outputs = []
    for engine in ("transformers", "ctranslate2"):
        words = ["generate", "--model", str(folder), "--input", str(lines), "--profile", "cpu"]
        with redirect_stdout(io.StringIO()) as out:
            code = cli.main([*words, "--max_length", "9", "--generation_engine", engine])
        assert code == 0
        outputs.append(out.getvalue())
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == len(TINY_TEXTS)
