"""A step's loss and gradients do not depend on how its rows are cut into micro-batches."""

import pytest
import torch.nn.functional as F

from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.models import decoder_inputs_from_labels
from tests.support.families import FAMILY_NAMES
from tests.support.training import fresh, history, our_trainer, ragged_rows

CUTS = ((8, 1), (4, 2), (1, 8))


def step_gradients(family, folder, *, smoothing, cut, **values):
    """Loss and gradients of one optimizer step over the same 8 rows."""
    model = fresh(family)
    rows = ragged_rows(model, 8)
    trainer = our_trainer(
        model,
        folder,
        rows,
        label_smoothing=smoothing,
        per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        max_steps=1,
        max_grad_norm=0.0,
        **values,
    )
    found = {}

    def keep(optimizer, args, kwargs):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return history(trainer, "loss")[0], found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_equal_whatever_the_cut(family, smoothing, tmp_path):
    loss, gradients = step_gradients(family, tmp_path, smoothing=smoothing, cut=CUTS[0])
    assert len(gradients) > 20
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for cut in CUTS[1:]:
        other_loss, others = step_gradients(family, tmp_path, smoothing=smoothing, cut=cut)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            difference = (others[name] - gradient).norm()
            assert difference <= 1e-5 * gradient.norm() + 1e-7 * scale, (name, cut)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_are_those_of_torch_in_float64(family, smoothing, tmp_path):
    """The reference: one forward pass and torch's own cross entropy over all tokens at once."""
    loss, gradients = step_gradients(family, tmp_path, smoothing=smoothing, cut=(4, 2))
    model = fresh(family)
    if family != "fsmt":  # its causal mask cannot be made in float64
        model = model.double()
    batch = Seq2SeqCollator(model.config.pad_token_id)(ragged_rows(model, 8))
    labels = batch.pop("labels")
    decoder_inputs = decoder_inputs_from_labels(model, labels, model.config.pad_token_id)
    logits = model(**batch, decoder_input_ids=decoder_inputs, use_cache=False).logits
    reference = F.cross_entropy(
        logits.double().view(-1, logits.size(-1)), labels.view(-1), label_smoothing=smoothing
    )
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-5 * parameter.grad.norm() + 1e-7, name


def test_sum_is_the_whole_steps_sum_whatever_the_cut(tmp_path):
    results = [
        step_gradients("t5", tmp_path, smoothing=0.1, cut=cut, loss_reduction="sum") for cut in CUTS
    ]
    mean, _ = step_gradients("t5", tmp_path, smoothing=0.1, cut=(8, 1))
    model = fresh("t5")
    tokens = sum(len(row["labels"]) for row in ragged_rows(model, 8))
    for loss, _ in results:
        assert loss == pytest.approx(mean * tokens, rel=1e-5)


def test_pads_written_as_pad_ids_count_no_more_than_ignored_ones(tmp_path):
    model = fresh("bart")
    rows = ragged_rows(model, 8)
    losses = []
    for pad_in_labels in (-100, model.config.pad_token_id):
        trainer = our_trainer(
            fresh("bart"), tmp_path, rows, label_smoothing=0.1, per_device_train_batch_size=8,
            max_steps=1,
        )  # fmt: skip
        trainer.data_collator = Seq2SeqCollator(
            model.config.pad_token_id, label_pad_id=pad_in_labels
        )
        trainer.train()
        losses.append(history(trainer, "loss")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
