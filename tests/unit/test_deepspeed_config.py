"""What a DeepSpeed configuration says against the training flags."""

from __future__ import annotations

import pytest
from transformers import TrainingArguments

from s2s_scale.backends.deepspeed.backend import DeepSpeedBackend
from s2s_scale.settings.deepspeed_config import (
    DEFAULTS,
    contradictions,
    offloads_optimizer,
    update_can_wait,
    without_sections_of_flags,
    zero_stage,
)


def test_defaults_are_those_of_the_training_arguments(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name, value in DEFAULTS.items():
        found = getattr(args, name)
        assert getattr(found, "value", found) == value, name


def test_auto_and_equal_values_contradict_nothing():
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "train_batch_size": 32,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0}},
    }
    values = {"gradient_accumulation_steps": 2, "bf16": True}
    assert contradictions(config, values, world_size=2) == []


@pytest.mark.parametrize("name", ["lr_scheduler", "lr_scheduler_type"])
def test_a_schedule_is_the_same_by_either_name(name):
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}}
    schedule = "constant_w_warmup" if name == "lr_scheduler" else "constant_with_warmup"
    assert contradictions(config, {name: schedule, "warmup_steps": 5}) == []


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            {"per_device_train_batch_size": 2},
            ("train_micro_batch_size_per_gpu is 4", "--per_device_train_batch_size is 2"),
        ),
        ({"gradient_accumulation_steps": 4}, {}, ("--gradient_accumulation_steps is 1",)),
        ({"train_batch_size": 99}, {}, ("train_batch_size is 99", "is 16")),
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 2.0}, ("0.5", "--max_grad_norm is 2.0")),
        ({"bf16": {"enabled": True}}, {}, ("bf16.enabled is True", "--bf16 is False")),
        ({"fp16": {"enabled": False}}, {"fp16": True}, ("fp16.enabled is False",)),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            {"learning_rate": 3e-4},
            ("optimizer.params.lr is 0.001", "--learning_rate is 0.0003"),
        ),
        ({"optimizer": {"type": "Lamb"}}, {}, ("optimizer.type is Lamb", "--optim")),
        ({"optimizer": {"type": "AdamW"}}, {"optim": "adafactor"}, ("--optim is adafactor",)),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.98]}}},
            {},
            ("betas", "0.98", "--adam_beta2"),
        ),
        ({"scheduler": {"type": "OneCycle"}}, {}, ("OneCycle", "--lr_scheduler is linear")),
        (
            {"scheduler": {"type": "WarmupDecayLR"}},
            {"warmup_steps": 10},
            ("logarithmic warm-up", "--lr_scheduler"),
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {"lr_scheduler": "cosine"},
            ("WarmupLR", "--lr_scheduler is cosine"),
        ),
    ],
)
def test_a_contradiction_names_both_values(config, values, words):
    found = contradictions(config, values, world_size=2)
    assert len(found) == 1
    for word in words:
        assert word in found[0]


def test_every_contradiction_is_listed():
    config = {"gradient_clipping": 0.5, "bf16": {"enabled": True}, "train_batch_size": 7}
    assert len(contradictions(config, {}, world_size=1)) == 3
    assert len(contradictions(config, {})) == 2  # processes unknown: the batch size is not checked


def test_sections_that_the_flags_make_are_left_out():
    config = {"optimizer": {"type": "AdamW"}, "scheduler": {}, "zero_optimization": {"stage": 2}}
    kept = without_sections_of_flags(config)
    assert kept == {"zero_optimization": {"stage": 2}}
    assert "optimizer" in config
    assert zero_stage(kept) == 2
    assert zero_stage({}) == 0
    assert not offloads_optimizer(kept)
    assert offloads_optimizer({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})


@pytest.mark.parametrize("values", [{"adafactor": True}, {"optim": "adafactor"}])
def test_adafactor_needs_whole_matrices(values):
    (problem,) = contradictions({"zero_optimization": {"stage": 2}}, values)
    assert "ZeRO 2 keeps flat pieces" in problem and "cpu-oss" in problem
    assert contradictions({"zero_optimization": {"stage": 0}}, values) == []


@pytest.mark.parametrize(
    ("config", "waits"),
    [
        ({}, False),
        ({"zero_optimization": {"stage": 0}}, False),
        ({"zero_optimization": {"stage": 1}}, True),
        ({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}, True),
        ({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, False),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, False),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, False),
    ],
)
def test_updates_that_cannot_be_put_off_are_known(config, waits):
    backend = DeepSpeedBackend("cpu")
    assert update_can_wait(config) is waits
    backend.training_overrides({"deepspeed": config}, trains=True)
    assert backend.can_skip_update is (waits or not config)
