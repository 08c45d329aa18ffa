"""Decay groups of every family, against transformers' own list and by hand."""

import pytest
import torch
import transformers
from transformers.trainer import Trainer

from s2s_scale.errors import UserError
from s2s_scale.optim import decay_parameter_names, parameter_groups
from tests.support.families import FAMILY_NAMES, tiny_model


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_decay_names_equal_those_of_transformers(family):
    model = tiny_model(family)
    ours = set(decay_parameter_names(model))
    # The method reads nothing from the trainer.
    theirs = set(Trainer.get_decay_parameter_names(None, model))
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert ours & named == theirs & named
    assert ours and named - ours


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_norm_and_no_bias_decays(family):
    model = tiny_model(family)
    decay = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert norms
    for module in norms:
        assert all(id(p) not in decay for p in module.parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "relative_attention_bias" in name:
            assert id(parameter) not in decay, name
        # Marian's and Pegasus's sinusoidal positions are parameters that are never trained.
        is_table = parameter.dim() == 2 and "relative_attention_bias" not in name
        if is_table and parameter.requires_grad:
            assert id(parameter) in decay, name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_groups_hold_every_trainable_parameter_once(family):
    model = tiny_model(family)
    model.get_encoder().requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable) and len(set(grouped)) == len(grouped)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_a_frozen_model_is_refused():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no parameter left to train"):
        parameter_groups(model, 0.1)


def test_without_decay_all_parameters_are_in_groups_once():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    groups = parameter_groups(model, 0.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_adafactor_comes_without_relative_step_and_parameter_scaling(tmp_path):
    from s2s_scale.arguments import Seq2SeqTrainingArguments

    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), adafactor=True, learning_rate=0.01)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    assert kind is transformers.optimization.Adafactor
    assert options["relative_step"] is False and options["scale_parameter"] is False
