"""Loading models, and the family table, against what transformers itself does."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    MBart50Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
)

from s2s_scale.config import ModelArguments
from s2s_scale.errors import UserError
from s2s_scale.models import (
    FAMILIES,
    apply_dropout_settings,
    apply_task_parameters,
    decoder_inputs_from_labels,
    family_of,
    freeze_embeddings,
    freeze_encoder,
    load,
    set_languages,
    settle_pad_token,
    source_vocab_size,
    target_vocab_size,
)
from tests.support.families import FAMILY_NAMES, tiny_batch, tiny_folder, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(name, base / name) for name in FAMILY_NAMES}


@pytest.fixture
def bart(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A BART folder that a test may damage."""
    return Path(shutil.copytree(folders["bart"], tmp_path / "bart"))


def arguments(folder: Path | str, **fields: object) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(folder), **fields)  # type: ignore[arg-type]


def problem(folder: Path | str, **options: object) -> str:
    """The only line of the error that loading raises."""
    with pytest.raises(UserError) as error:
        load(arguments(folder), **options)  # type: ignore[arg-type]
    assert len(error.value.problems) == 1
    line = error.value.problems[0]
    assert "\n" not in line
    return line


# --- families


def test_the_table_holds_the_six_families() -> None:
    assert set(FAMILIES) == set(FAMILY_NAMES)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("label_pad", [-100, None])
def test_decoder_inputs_equal_those_of_the_model(name: str, label_pad: int | None) -> None:
    model = tiny_model(name)
    batch = tiny_batch(model, rows=5, label_pad=label_pad)
    labels = batch["labels"].clone()
    expected = model.prepare_decoder_input_ids_from_labels(labels.clone())
    found = decoder_inputs_from_labels(model, labels, model.config.pad_token_id)
    assert found.tolist() == expected.tolist()
    assert torch.equal(labels, batch["labels"]), "labels were changed"
    assert (found >= 0).all()


@pytest.mark.parametrize("name", [n for n in FAMILY_NAMES if n != "fsmt"])
def test_logits_equal_those_from_labels_alone(name: str) -> None:
    model = tiny_model(name)
    batch = tiny_batch(model)
    inputs = decoder_inputs_from_labels(model, batch["labels"], model.config.pad_token_id)
    expected = model(**batch).logits
    del batch["labels"]
    assert torch.equal(model(**batch, decoder_input_ids=inputs).logits, expected)


def test_fsmt_decoder_inputs_are_fairseqs_shift() -> None:
    model = tiny_model("fsmt")
    labels = torch.tensor([[10, 11, 12, 2], [20, 2, -100, 1]])
    found = decoder_inputs_from_labels(model, labels, 1)
    # fairseq: prev_output_tokens begins with </s>, the row's last token, then the row itself
    assert found.tolist() == [[2, 10, 11, 12], [2, 20, 2, 1]]


def test_a_row_without_any_label_does_not_fail() -> None:
    labels = torch.full((2, 3), -100)
    assert decoder_inputs_from_labels(tiny_model("mbart"), labels, 1).shape == (2, 3)


def test_decoder_inputs_of_a_family_outside_the_table() -> None:
    config = MT5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = MT5ForConditionalGeneration(config)
    labels = torch.tensor([[7, 8, 1, -100]])
    assert decoder_inputs_from_labels(model, labels, 0).tolist() == [[0, 7, 8, 1]]
    assert labels.tolist() == [[7, 8, 1, -100]]


def test_a_missing_start_token_is_named() -> None:
    model = tiny_model("bart")
    model.config.decoder_start_token_id = None
    with pytest.raises(UserError, match="decoder_start_token_id"):
        decoder_inputs_from_labels(model, torch.tensor([[5, 2]]), 1)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_vocabulary_sizes(name: str) -> None:
    model = tiny_model(name, vocab_size=96)
    width = model.get_encoder().embed_tokens.weight.shape[0]
    assert target_vocab_size(model.config) == 96
    assert source_vocab_size(model.config) == width
    assert width == (104 if name == "fsmt" else 96)


@pytest.mark.parametrize("config", [BertConfig(), GPT2Config()])
def test_a_model_that_is_no_encoder_decoder(config: object) -> None:
    with pytest.raises(UserError, match="not an encoder-decoder"):
        family_of(config)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_dropout_goes_into_the_familys_own_field(name: str) -> None:
    config = tiny_model(name).config
    apply_dropout_settings(config, dropout=0.25)
    assert getattr(config, "dropout_rate" if name == "t5" else "dropout") == 0.25
    others = {"attention_dropout": 0.1, "encoder_layerdrop": 0.2, "decoder_layerdrop": 0.3}
    if name == "t5":
        with pytest.raises(UserError) as error:
            apply_dropout_settings(config, dropout=0.2, **others)
        assert [line.split("=")[0] for line in error.value.problems] == list(others)
        assert config.dropout_rate == 0.25, "nothing may be applied when something is wrong"
        return
    apply_dropout_settings(config, **others)
    assert {field: getattr(config, field) for field in others} == others


def test_a_dropout_of_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"dropout=1\.0: expected a probability"):
        apply_dropout_settings(BartConfig(), dropout=1.0)


# --- loading


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_loads_every_family_in_fp32_with_dropout_applied(
    name: str, folders: dict[str, Path]
) -> None:
    config, tokenizer, model = load(arguments(folders[name]), dropout=0.35)
    assert config is model.config
    assert config.model_type == name
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    rates |= {m.dropout for m in model.modules() if isinstance(getattr(m, "dropout", None), float)}
    assert 0.35 in rates
    assert len(tokenizer) == source_vocab_size(config)


def test_torch_weights_load_too(bart: Path) -> None:
    expected = load(arguments(bart)).model.state_dict()
    torch.save(expected, bart / "pytorch_model.bin")
    (bart / "model.safetensors").unlink()
    found = load(arguments(bart)).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Malicious:
    """What a pickle could do if torch weights were loaded without ``weights_only``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_with_code_is_not_run(bart: Path, tmp_path: Path) -> None:
    (bart / "model.safetensors").unlink()
    torch.save({"model.shared.weight": Malicious(tmp_path / "ran")}, bart / "pytorch_model.bin")
    assert "could not load the weights" in problem(bart)
    assert not (tmp_path / "ran").exists()


def test_remote_code_is_not_run_unless_allowed(bart: Path, tmp_path: Path) -> None:
    config = json.loads((bart / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (bart / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (bart / "strange.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    assert "give --trust_remote_code" in problem(bart)
    assert not marker.exists()


def test_no_model_given() -> None:
    with pytest.raises(UserError, match="model_name_or_path is missing"):
        load(ModelArguments())


def test_missing_folder(tmp_path: Path) -> None:
    line = problem(tmp_path / "nowhere")
    assert "nowhere: no such folder" in line


def test_a_missing_folder_in_one_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not looked for on the hub, which takes half a minute where there is no network."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "models/new: no such folder ('models' is a folder here" in problem(Path("models/new"))


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "found a file" in problem(tmp_path / "file")


def test_an_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = problem("some-owner/some-model-that-is-not-here")
    assert "no such folder here" in line
    assert "some-owner/some-model-that-is-not-here" in line


def test_folder_without_config(bart: Path) -> None:
    (bart / "config.json").unlink()
    assert "no config.json" in problem(bart)


@pytest.mark.parametrize("content", ["", "{", "not json"])
def test_invalid_config(bart: Path, content: str) -> None:
    (bart / "config.json").write_text(content)
    line = problem(bart)
    assert "config.json: not valid JSON" in line


def test_unknown_model_type(bart: Path) -> None:
    (bart / "config.json").write_text('{"model_type": "no_such_type"}')
    assert "could not load the config" in problem(bart)


def test_folder_without_weights_names_the_expected_files(bart: Path) -> None:
    (bart / "model.safetensors").unlink()
    line = problem(bart)
    assert "no weights in this folder" in line
    assert "model.safetensors" in line
    assert "pytorch_model.bin" in line


def test_missing_shards_are_named(bart: Path) -> None:
    (bart / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (bart / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in problem(bart)


def test_truncated_weights(bart: Path) -> None:
    file = bart / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "could not load the weights" in problem(bart)


def test_missing_weights_are_never_fresh(bart: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(bart / "model.safetensors")
    removed = "model.encoder.layers.1.fc1.weight"
    del weights[removed]
    save_file(weights, bart / "model.safetensors", metadata={"format": "pt"})
    line = problem(bart)
    assert removed in line
    assert line.startswith(f"{bart}: 1 weights")


def test_weights_of_another_shape(bart: Path) -> None:
    config = json.loads((bart / "config.json").read_text())
    config["encoder_ffn_dim"] *= 2
    (bart / "config.json").write_text(json.dumps(config))
    line = problem(bart)
    assert "another shape" in line
    assert "expected [" in line


def test_unused_weights_are_warned_about(bart: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    weights = {**load_file(bart / "model.safetensors"), "odd.weight": torch.ones(2)}
    save_file(weights, bart / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="s2s_scale"):
        load(arguments(bart))
    assert "odd.weight" in caplog.text


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_folder_without_tokenizer(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors", "generation_config.json"):
            file.unlink()
    assert "no tokenizer in this folder" in problem(folder)


def test_tokenizer_and_config_of_another_folder(bart: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(bart / name, elsewhere / name)
    shutil.copy(bart / "config.json", elsewhere / "config.json")
    options = {"tokenizer_name": str(elsewhere), "config_name": str(elsewhere)}
    assert len(load(arguments(bart, **options)).tokenizer) > 0
    with pytest.raises(UserError, match="no such folder"):
        load(arguments(bart, tokenizer_name=str(tmp_path / "none")))


# --- pad token


def test_eos_pads_where_pad_is_missing(bart: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bart)
    tokenizer.pad_token = None
    config = BartConfig(pad_token_id=None)
    with caplog.at_level(logging.WARNING, logger="s2s_scale"):
        pad = settle_pad_token(config, tokenizer)
    assert pad == tokenizer.pad_token_id == config.pad_token_id == tokenizer.eos_token_id == 2
    assert "EOS token '</s>' is used for padding" in caplog.text


def test_the_configs_pad_id_serves_the_tokenizer(bart: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bart)
    tokenizer.pad_token = None
    assert settle_pad_token(BartConfig(pad_token_id=1), tokenizer) == 1
    assert tokenizer.pad_token == "<pad>"


def test_neither_pad_nor_eos(bart: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bart)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an EOS token"):
        settle_pad_token(BartConfig(pad_token_id=None), tokenizer)


def test_disagreeing_pad_ids_are_warned_about(bart: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="s2s_scale"):
        settle_pad_token(BartConfig(pad_token_id=7), AutoTokenizer.from_pretrained(bart))
    assert "pads with id 1" in caplog.text


# --- task parameters


def test_task_parameters_reach_config_and_generation_config(bart: Path, tmp_path: Path) -> None:
    config = json.loads((bart / "config.json").read_text())
    config["task_specific_params"] = {
        "summarization": {"num_beams": 3, "length_penalty": 2.5, "prefix": "sum: ", "dropout": 0.2}
    }
    (bart / "config.json").write_text(json.dumps(config))
    loaded = load(arguments(bart), task="summarization")
    generation = loaded.model.generation_config
    assert (generation.num_beams, generation.length_penalty) == (3, 2.5)
    assert loaded.config.dropout == 0.2
    assert loaded.config.prefix == "sum: "
    loaded.model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["num_beams"] == 3
    line = problem(bart, task="summarisation")
    assert "did you mean 'summarization'?" in line


def test_a_task_of_a_model_without_tasks() -> None:
    with pytest.raises(UserError, match="leave --task out"):
        apply_task_parameters(BartConfig(), "summarization")
    assert apply_task_parameters(BartConfig(), None) == {}


# --- languages


def test_mbart_languages_reach_tokenizer_config_and_saved_files(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(arguments(folders["mbart"]), src_lang="ro_RO", tgt_lang="fr_XX")
    french = loaded.tokenizer.convert_tokens_to_ids("fr_XX")
    romanian = loaded.tokenizer.convert_tokens_to_ids("ro_RO")
    assert loaded.tokenizer("cat")["input_ids"][-1] == romanian
    assert loaded.tokenizer(text_target="cat")["input_ids"][-1] == french
    assert loaded.config.decoder_start_token_id == french
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["decoder_start_token_id"] == french
    again = load(arguments(tmp_path))
    assert (again.tokenizer.src_lang, again.tokenizer.tgt_lang) == ("ro_RO", "fr_XX")
    assert again.model.generation_config.decoder_start_token_id == french


def test_mbart_generates_from_the_start_that_training_uses(folders: dict[str, Path]) -> None:
    _, tokenizer, model = load(arguments(folders["mbart"]), src_lang="en_XX", tgt_lang="fr_XX")
    labels = tokenizer(text_target=["the cat"], return_tensors="pt")["input_ids"]
    trained = decoder_inputs_from_labels(model, labels, tokenizer.pad_token_id)[0].tolist()
    source = tokenizer(["the cat"], return_tensors="pt")
    generated = model.generate(**source, max_new_tokens=3)[0].tolist()
    assert generated[0] == trained[0] == tokenizer.convert_tokens_to_ids("fr_XX")
    assert model.generation_config.forced_bos_token_id is None


def test_mbart50_forces_the_language_as_first_token() -> None:
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]
    tokenizer = MBart50Tokenizer(vocab=vocab, src_lang="en_XX", tgt_lang="de_DE")
    model = tiny_model("mbart", decoder_start_token_id=None)
    set_languages(model, tokenizer, src_lang="en_XX", tgt_lang="fr_XX")
    french = tokenizer.convert_tokens_to_ids("fr_XX")
    labels = torch.tensor([tokenizer(text_target="a")["input_ids"]])
    assert labels[0, 0] == french
    assert model.generation_config.forced_bos_token_id == french
    start = int(decoder_inputs_from_labels(model, labels, 1)[0, 0])
    assert model.generation_config.decoder_start_token_id == start == tokenizer.eos_token_id


def test_unknown_language_codes_name_the_near_one(folders: dict[str, Path]) -> None:
    line = problem(folders["mbart"], src_lang="en_XX", tgt_lang="de")
    assert "unknown language code 'de' (did you mean 'de_DE'?)" in line
    assert line.endswith("change --tgt_lang")


def test_mbart_without_any_target_language(folders: dict[str, Path]) -> None:
    _, tokenizer, model = load(arguments(folders["mbart"]))
    tokenizer.tgt_lang = None
    with pytest.raises(UserError, match="give --src_lang and --tgt_lang"):
        set_languages(model, tokenizer, src_lang=None, tgt_lang=None)


def test_languages_leave_other_families_alone(folders: dict[str, Path]) -> None:
    before = load(arguments(folders["marian"]))
    after = load(arguments(folders["marian"]), src_lang="en", tgt_lang="de")
    assert before.model.generation_config.to_dict() == after.model.generation_config.to_dict()


# --- freezing


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_frozen_embeddings_keep_their_values(name: str) -> None:
    model = tiny_model(name)
    freeze_embeddings(model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    tables = {"shared.weight", "embed_tokens.weight", "embed_positions.weight"}
    expected = {n for n, _ in model.named_parameters() if any(n.endswith(t) for t in tables)}
    assert frozen == expected
    assert len(frozen) < len(list(model.parameters()))
    assert frozen


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_frozen_encoder_gets_no_gradient(name: str) -> None:
    model = tiny_model(name)
    freeze_encoder(model)
    batch = tiny_batch(model)
    inputs = decoder_inputs_from_labels(model, batch.pop("labels"), model.config.pad_token_id)
    model(**batch, decoder_input_ids=inputs, use_cache=False).logits.sum().backward()
    decoder = {id(p) for p in model.get_decoder().parameters()}
    own = [p for p in model.get_encoder().parameters() if id(p) not in decoder]
    assert own
    assert all(p.grad is None and not p.requires_grad for p in own)
    assert any(p.grad is not None for p in model.get_decoder().parameters())


def test_freezing_flags(folders: dict[str, Path]) -> None:
    model = load(arguments(folders["t5"], freeze_embeds=True, freeze_encoder=True)).model
    assert not model.shared.weight.requires_grad
    assert not any(p.requires_grad for p in model.get_encoder().parameters())
    assert any(p.requires_grad for p in model.get_decoder().parameters())
