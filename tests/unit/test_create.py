"""New models and tokenizers of all six architectures."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from s2s_scale.config import DataArguments
from s2s_scale.errors import UserError
from s2s_scale.models.create import (
    ARCHITECTURES,
    SHAPES,
    SIZES,
    fresh_config,
    new_model,
    run_new_model,
)
from s2s_scale.models.tokenizers import draw_lines
from tests.support.families import FAMILY_NAMES, TINY_TEXTS, tiny_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("new")
    return {name: tiny_folder(name, base / name) for name in FAMILY_NAMES}


def make(output_dir: Path, **changes: object) -> Path:
    values = {"architecture": "t5", "size": "tiny", "vocab_size": 300, "texts": TINY_TEXTS}
    return new_model(**{**values, **changes}, output_dir=output_dir)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_six_families_in_all_sizes_are_there() -> None:
    assert set(SHAPES) == set(ARCHITECTURES) == set(FAMILY_NAMES)
    assert all(tuple(sizes) == SIZES for sizes in SHAPES.values())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_text_survives_the_tokenizer(name: str, folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    for text in TINY_TEXTS:
        for ids in (tokenizer(text)["input_ids"], tokenizer(text_target=text)["input_ids"]):
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_digits_stay_single(name: str, folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the 1568 and 27")["input_ids"])
    digits = [token.replace("</w>", "") for token in tokens if any(c.isdigit() for c in token)]
    assert digits == list("156827")


def test_digits_may_merge_when_asked(tmp_path: Path) -> None:
    texts = [f"in {year} we go" for year in range(1990, 2030)] * 3
    for name in FAMILY_NAMES:
        tokenizer = AutoTokenizer.from_pretrained(
            make(tmp_path / name, architecture=name, texts=texts, split_digits=False)
        )
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 2021 we go")["input_ids"])
        assert any(sum(c.isdigit() for c in token) > 1 for token in tokens), name


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_model_and_tokenizer_agree(name: str, folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[name])
    config, generation = model.config, model.generation_config
    assert config.model_type == name
    assert config.pad_token_id == tokenizer.pad_token_id == generation.pad_token_id
    eos = tokenizer.convert_tokens_to_ids("</s>")
    assert config.eos_token_id == generation.eos_token_id == eos
    ids = tokenizer("the cat")["input_ids"]
    assert ids[-2 if name == "mbart" else -1] == eos
    assert model.get_encoder().embed_tokens.weight.shape == (len(tokenizer), 128)
    logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([ids])).logits
    assert logits.shape[-1] == len(tokenizer)
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    start = {"bart": "</s>", "fsmt": "</s>", "mbart": "de_DE"}.get(name, "<pad>")
    assert config.decoder_start_token_id == tokenizer.convert_tokens_to_ids(start)


def test_marian_pads_with_its_last_id(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["marian"])
    assert tokenizer.pad_token_id == len(tokenizer) - 1


def test_marian_keeps_language_codes_whole(tmp_path: Path) -> None:
    texts = [f">>{code}<< {text}" for code in ("fra", "ron") for text in TINY_TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(
        make(tmp_path / "m", architecture="marian", texts=texts)
    )
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(">>ron<< the cat")["input_ids"])
    assert tokens[0] == ">>ron<<"
    assert not any("<" in token or ">" in token for token in tokens[1:-1])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_same_seed_gives_the_same_files(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(123)  # the caller's random state must not matter
    state = torch.random.get_rng_state()
    same = files(tiny_folder(name, tmp_path / "same"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same == files(folders[name])
    other = files(tiny_folder(name, tmp_path / "other", seed=1))
    assert other["model.safetensors"] != same["model.safetensors"]


def test_loads_in_a_fresh_process(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T\n"
        "for folder in sys.argv[1:]:\n"
        "    model, tokenizer = M.from_pretrained(folder), T.from_pretrained(folder)\n"
        "    batch = tokenizer(['the cat', 'a dog runs'], padding=True, return_tensors='pt')\n"
        "    print(type(model).__name__, model.generate(**batch, max_new_tokens=3).shape[0])\n"
    )
    command = [sys.executable, "-c", code, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = "Bart T5 MBart FSMT Pegasus".split()
    lines = [f"{name}ForConditionalGeneration 2" for name in expected] + ["MarianMTModel 2"]
    assert done.stdout.splitlines() == lines


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_sizes_grow(name: str, folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    counts = []
    for size in SIZES:
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(fresh_config(name, size, tokenizer))
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts[0] * 4 < counts[1] < counts[2] / 3
    assert counts[0] < 2_000_000


def test_base_is_the_published_shape(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["bart"])
    bart = fresh_config("bart", "base", tokenizer)
    found = (bart.d_model, bart.encoder_layers, bart.decoder_layers, bart.encoder_ffn_dim)
    assert found == (768, 6, 6, 3072)
    t5 = fresh_config("t5", "base", AutoTokenizer.from_pretrained(folders["t5"]))
    assert (t5.d_model, t5.num_layers, t5.num_heads, t5.d_kv, t5.d_ff) == (768, 12, 12, 64, 3072)


def test_t5_begins_with_position_biases_that_matter(folders: dict[str, Path]) -> None:
    weights = AutoModelForSeq2SeqLM.from_pretrained(folders["t5"]).state_dict()
    biases = [w for name, w in weights.items() if "relative_attention_bias" in name]
    assert len(biases) == 2
    assert all(2.0 < float(bias.std()) < 3.0 for bias in biases)


def test_mbart_languages(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", architecture="mbart", src_lang="ro_RO", tgt_lang="fr_XX")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("ro_RO", "fr_XX")
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["decoder_start_token_id"] == tokenizer.convert_tokens_to_ids("fr_XX")
    with pytest.raises(UserError, match=r"unknown language code 'en_UK'"):
        make(tmp_path / "x", architecture="mbart", src_lang="en_UK")
    assert not (tmp_path / "x").exists()


def test_a_vocabulary_larger_than_the_texts_support_shrinks_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="s2s_scale"):
        folder = make(tmp_path / "m", vocab_size=5000)
    size = len(AutoTokenizer.from_pretrained(folder))
    assert 50 < size < 5000
    assert f"support {size} tokens of the 5000 asked for" in caplog.text


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_vocabulary_is_as_large_as_asked_for(name: str, tmp_path: Path) -> None:
    texts = [f"{a}{b}{c} {b}{a}{d}" for a in "bdkt" for b in "aeiou" for c in "lmn" for d in "rs"]
    folder = make(
        tmp_path / "m", architecture=name, texts=texts, vocab_size=290 if name == "bart" else 55
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == (290 if name == "bart" else 55)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_vocabulary_smaller_than_the_alphabet(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size=20: too small .* expected at least (\d+)"):
        make(tmp_path / "m", architecture=name, vocab_size=20)
    assert list(tmp_path.iterdir()) == [], "a failed attempt left something behind"


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_least_vocabulary_that_the_error_names_works(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        make(tmp_path / "m", architecture=name, vocab_size=20)
    least = int(str(error.value).split("expected at least ")[1].split(";")[0])
    assert (
        len(
            AutoTokenizer.from_pretrained(make(tmp_path / "m", architecture=name, vocab_size=least))
        )
        == least
    )


def test_bad_requests_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        make(tmp_path / "m", architecture="brat", size="tinny", vocab_size=0)
    lines = error.value.problems
    assert len(lines) == 3
    assert "unknown architecture 'brat' (did you mean 'bart'?)" in lines[0]
    assert "unknown size 'tinny' (did you mean 'tiny'?)" in lines[1]
    assert "vocab_size=0" in lines[2]


@pytest.mark.parametrize("texts", [[], ["", "  ", "\n"]])
def test_no_text(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        make(tmp_path / "m", texts=texts)


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    make(folder)
    (folder / "notes.txt").write_text("mine")
    before = files(folder)
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        make(folder, seed=1)
    assert files(folder) == before
    make(folder, seed=1, overwrite=True)
    after = files(folder)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert after["notes.txt"] == b"mine"


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("x")
    with pytest.raises(UserError, match="expected a folder to write to, found a file"):
        make(tmp_path / "m", overwrite=True)
    with pytest.raises(UserError, match="cannot write there"):
        make(tmp_path / "m" / "below")


def test_lines_are_drawn_evenly_and_deterministically() -> None:
    texts = [f"row {i}" for i in range(1000)] + ["", " "]
    assert draw_lines(texts, seed=0) == texts[:1000]
    some = draw_lines(texts, seed=0, limit=100)
    assert (
        some == draw_lines(iter(texts), seed=0, limit=100) != draw_lines(texts, seed=1, limit=100)
    )
    assert len(set(some)) == 100
    assert 350 < sum(int(row.split()[1]) for row in some) / 100 < 650


def test_from_a_data_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.source").write_text("the cat\nthe dog\n" * 10, encoding="utf-8")
    (data / "train.target").write_text("die Katze\nder Hünd\n" * 10, encoding="utf-8")
    folder = run_new_model(
        architecture="marian",
        size="tiny",
        data=DataArguments(data_dir=str(data), source_prefix="Quickly: "),
        vocab_size=200,
        output_dir=tmp_path / "m",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("Quickly: the cat", "der Hünd"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
