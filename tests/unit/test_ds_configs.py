"""The shipped DeepSpeed configs: complete, and ``auto`` wherever a training flag decides."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from transformers.integrations import deepspeed as integration

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}
FLAG_DECIDES = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
}
MODEL_DECIDES = {
    f"zero_optimization.{name}"
    for name in (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    )
}


def read(name):
    def no_doubles(pairs):
        names = [key for key, _ in pairs]
        assert len(set(names)) == len(names), f"{name}.json: a key is given twice"
        return dict(pairs)

    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text, object_pairs_hook=no_doubles)


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def automatic(config):
    return {key for key, value in flat(config) if value == "auto"}


def test_these_configs_are_shipped_and_no_others():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.json" for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_the_name_says_stage_and_offload(name):
    zero = read(name)["zero_optimization"]
    assert zero["stage"] == STAGES[name]
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert ("offload_param" in zero) == (name == "zero3_offload")


@pytest.mark.parametrize("name", STAGES)
def test_flags_have_one_source(name):
    config = read(name)
    assert automatic(config) == FLAG_DECIDES | (MODEL_DECIDES if STAGES[name] == 3 else set())
    assert "optimizer" not in config  # ours are used, under every stage
    assert "scheduler" not in config
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("name", STAGES)
def test_transformers_fills_every_auto(name):
    """The keys that transformers' source fills in, against the keys that we leave to it."""
    source = inspect.getsource(integration)
    filled = set(re.findall(r'fill_(?:match|only)\(\s*"([\w.]+)"', source))
    assert "train_batch_size" in filled
    assert automatic(read(name)) <= filled


@pytest.mark.parametrize("name", STAGES)
def test_transformers_and_deepspeed_accept_the_config(name, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (extra: deepspeed)")
    from transformers import Seq2SeqTrainingArguments

    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2
    )
    config = integration.HfTrainerDeepSpeedConfig(str(FOLDER / f"{name}.json"))
    config.trainer_config_process(args)
    assert config.config["train_micro_batch_size_per_gpu"] == 3
    assert config.config["gradient_accumulation_steps"] == 2
    assert config.config["gradient_clipping"] == args.max_grad_norm
    assert automatic(config.config) <= MODEL_DECIDES
