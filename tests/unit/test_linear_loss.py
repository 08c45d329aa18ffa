"""Linear cross entropy: values and gradients against float64 logits, and its use in the trainer."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.fsmt import modeling_fsmt

from s2s_scale import Seq2SeqTrainer
from s2s_scale.errors import UserError
from s2s_scale.loss import linear_cross_entropy as linear_loss
from s2s_scale.loss.linear_cross_entropy import chunk_positions, linear_cross_entropy
from s2s_scale.loss.losses import mask_pads
from s2s_scale.models import LossHead, decoder_inputs_from_labels, loss_head_problem
from s2s_scale.models.loading import freeze_embeddings
from s2s_scale.trainer import loss as trainer_loss
from s2s_scale.utils import IGNORE_INDEX
from tests.support.families import FAMILY_NAMES, tiny_batch
from tests.support.training import fresh, history, our_trainer, ragged_rows

B, T, D, V = 3, 40, 12, 101
PADS_IGNORED = SimpleNamespace(ignore_pad_token_for_loss=True)


@pytest.fixture
def small_chunks(monkeypatch):
    """So small that even these tensors make many chunks, the last one short."""
    monkeypatch.setattr(linear_loss, "_CHUNK_VALUES", {"cpu": 7 * V})
    monkeypatch.setattr(linear_loss, "_LEAST_TRAINING_CHUNK", 7)
    monkeypatch.setattr(linear_loss, "_LEAST_CHUNK", 7)
    assert chunk_positions(V, device="cpu", training=True) == 7


@pytest.fixture
def exact():
    """Hidden states, weight, bias in float64, and labels with places that do not count."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*s, generator=generator).double() for s in ((B, T, D), (V, D), (V,))]
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 25:] = IGNORE_INDEX
    labels[2, 3:5] = IGNORE_INDEX
    return [*tensors, labels]


def off(found, expected):
    """Largest difference, relative to the largest expected value."""
    assert expected.abs().max() > 0
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def by_logits(hidden, weight, bias, labels, smoothing):
    """Loss, NLL and gradients of torch's own cross entropy over whole logits."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(*leaves).view(-1, V)
    flat = labels.view(-1)
    loss = F.cross_entropy(logits, flat, label_smoothing=smoothing, reduction="sum")
    loss.backward()
    nll = F.cross_entropy(logits, flat, reduction="sum")
    return loss.item(), nll.item(), [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_equal_those_of_logits(
    exact, smoothing, with_bias, static_shapes, dtype
):
    hidden, weight, bias, labels = exact
    bias = bias if with_bias else None
    loss, nll, gradients = by_logits(hidden, weight, bias, labels, smoothing)
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    part = linear_cross_entropy(
        *leaves[:2], labels, bias=leaves[2], smoothing=smoothing, static_shapes=static_shapes
    )
    (part.loss / 4).backward()
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    assert part.loss.item() == pytest.approx(loss, rel=bound)
    assert part.nll.item() == pytest.approx(nll, rel=bound) and not part.nll.requires_grad
    assert part.tokens.item() == B * T - 15 - 2
    found = [leaf.grad * 4 for leaf in leaves if leaf is not None]
    for one, other in zip(found, gradients, strict=True):
        assert one.dtype == dtype and off(one, other) < 10 * bound


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("static_shapes", [False, True])
def test_a_batch_without_targets_has_loss_and_gradients_of_zero(exact, static_shapes):
    hidden, weight = (t.float().requires_grad_() for t in exact[:2])
    labels = torch.full((B, T), IGNORE_INDEX)
    part = linear_cross_entropy(hidden, weight, labels, smoothing=0.1, static_shapes=static_shapes)
    part.loss.backward()
    assert part.loss.item() == part.nll.item() == part.tokens.item() == 0
    assert hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_places_that_do_not_count_may_hold_anything(exact):
    hidden, weight, _, labels = exact
    expected = linear_cross_entropy(hidden, weight, labels, smoothing=0.1).loss
    hidden[labels == IGNORE_INDEX] = 1e300  # its logits are infinite
    found = linear_cross_entropy(hidden, weight, labels, smoothing=0.1, static_shapes=True).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)


def test_only_wanted_gradients_are_computed(exact):
    hidden, weight, _, labels = exact
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).loss.requires_grad


def test_a_second_backward_pass_is_refused(exact):
    hidden, weight, _, labels = exact
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward through the loss a second time"):
        loss.backward()


@pytest.mark.usefixtures("small_chunks")
def test_in_bf16_it_is_no_further_off_than_logits_are(exact):
    hidden, weight, _, labels = exact
    loss, _, (_, expected) = by_logits(hidden, weight, None, labels, 0.1)
    found = {}
    for name in ("linear", "logits"):
        w = weight.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if name == "linear":
                value = linear_cross_entropy(hidden.float(), w, labels, smoothing=0.1).loss
            else:
                logits = F.linear(hidden.float(), w).float().view(-1, V)
                value = F.cross_entropy(
                    logits, labels.view(-1), label_smoothing=0.1, reduction="sum"
                )
        value.backward()
        assert value.dtype == w.grad.dtype == torch.float32
        found[name] = (abs(value.item() / loss - 1), off(w.grad, expected))
    assert found["linear"][0] < 2e-3 and found["linear"][1] < 1e-2
    assert found["linear"][1] < 2 * found["logits"][1]


def with_bias(model):
    """The model with a bias on its logits, where its family has one."""
    if hasattr(model, "final_logits_bias"):
        generator = torch.Generator().manual_seed(1)
        model.final_logits_bias = torch.randn(model.final_logits_bias.shape, generator=generator)
    return model


def model_gradients(model):
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_gives_the_gradients_of_its_float64_logits(family, smoothing, monkeypatch):
    # FSMT's own goes by way of float32, whose range is not enough for float64's lowest number.
    monkeypatch.setattr(
        modeling_fsmt, "fill_with_neg_inf", lambda t: t.fill_(torch.finfo(t.dtype).min)
    )
    model = with_bias(fresh(family))
    batch = tiny_batch(model, rows=5)
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = decoder_inputs_from_labels(
        model, labels, model.config.pad_token_id
    )
    assert (labels == IGNORE_INDEX).any()
    reference = copy.deepcopy(model).double()
    logits = reference(**batch, use_cache=False).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="sum"
    )
    loss.backward()
    assert loss_head_problem(model) is None
    head = LossHead(model, smoothing=smoothing)
    with head.ends_in_loss(labels):
        part = head.read(model(**batch, use_cache=False)[0], labels)
    part.loss.backward()
    assert part.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    expected, found = model_gradients(reference), model_gradients(model)
    assert set(found) == set(expected) and len(found) > 20
    whole = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * whole, name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_model_is_as_before_after_the_call_and_after_an_error(family):
    model = with_bias(fresh(family)).eval()
    batch = tiny_batch(model)
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = labels.clamp(min=0)
    before = model(**batch, use_cache=False).logits
    head = LossHead(model)
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    with head.ends_in_loss(labels):
        assert model(**batch, use_cache=False).logits.numel() == 2
    with pytest.raises(ZeroDivisionError), head.ends_in_loss(labels):
        raise ZeroDivisionError
    assert torch.equal(model(**batch, use_cache=False).logits, before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules


def run(family, folder, *, linear, smoothing, **values):
    """Losses, gradient norms and weights of four steps, each of two micro-batches."""
    model = with_bias(fresh(family))
    if values.pop("frozen", False):
        freeze_embeddings(model)
    trainer = our_trainer(
        model,
        folder,
        ragged_rows(model, 24),
        data_args=PADS_IGNORED,
        label_smoothing=smoothing,
        linear_cross_entropy=linear,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=4,
        **values,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    return history(trainer, "loss"), history(trainer, "grad_norm"), weights


@pytest.fixture
def no_logits(monkeypatch):
    """A function that makes every loss from whole logits fail."""

    def refuse(*_args, **_options):
        raise AssertionError("logits were built")

    return lambda: monkeypatch.setattr(trainer_loss, "cross_entropy", refuse)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_training_takes_the_same_steps_as_with_logits(family, smoothing, tmp_path, no_logits):
    expected = run(family, tmp_path, linear="off", smoothing=smoothing)
    no_logits()
    found = run(family, tmp_path, linear="on", smoothing=smoothing)
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert off(found[2], expected[2]) < 1e-5


FROZEN, CHECKPOINTING = {"frozen": True}, {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("family", "values"),
    [  # FSMT of transformers has no checkpointing
        *((family, FROZEN) for family in ("bart", "fsmt", "t5")),
        *((family, CHECKPOINTING) for family in ("bart", "t5")),
    ],
)
def test_frozen_embeddings_and_checkpointing_change_nothing(family, values, tmp_path, no_logits):
    expected = run(family, tmp_path, linear="off", smoothing=0.1, **values)
    no_logits()
    found = run(family, tmp_path, linear="on", smoothing=0.1, **values)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert off(found[2], expected[2]) < 1e-5


def evaluating(folder, *, linear="auto", model=None, **values):
    model = fresh("bart") if model is None else model
    rows = ragged_rows(model, 24)
    options = {"eval_dataset": rows, "data_args": PADS_IGNORED, "label_smoothing": 0.1, **values}
    return our_trainer(
        model, folder, rows, linear_cross_entropy=linear, per_device_eval_batch_size=5, **options
    )


@pytest.mark.parametrize("generate", [False, True])
def test_evaluation_gives_the_losses_of_logits(generate, tmp_path, no_logits):
    options = {"predict_with_generate": generate, "generation_max_length": 5}
    if generate:
        options["compute_metrics"] = lambda _prediction: {}
    expected = evaluating(tmp_path, linear="off", **options).evaluate()
    no_logits()
    found = evaluating(tmp_path, linear="on", **options).evaluate()
    for name in ("eval_loss", "eval_nll_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_an_end_token_that_also_pads_is_learnt_once_per_row(tmp_path, no_logits):
    model = fresh("bart")
    model.config.pad_token_id = model.config.eos_token_id
    batch = tiny_batch(model, label_pad=None)
    losses = []
    for linear in ("off", "on"):
        if linear == "on":
            no_logits()
        trainer = evaluating(tmp_path, linear=linear, model=model)
        losses.append(trainer.compute_loss(model, dict(batch)).item())
    targets = mask_pads(batch["labels"], 2, 2)
    assert (targets == 2).sum() == len(targets) and (batch["labels"] == 2).sum() > len(targets)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_logits_are_there_where_they_are_asked_for(tmp_path):
    trainer = evaluating(tmp_path)
    model, batch = trainer.model, tiny_batch(trainer.model)
    shape = (*batch["labels"].shape, 96)
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert outputs.logits.shape == shape
    assert trainer._compute_loss(model, batch, batch["labels"])[1].shape == shape
    assert trainer.prediction_step(model, dict(batch), False)[1].shape == shape
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(loss.item(), rel=1e-6)
    assert trainer.prediction_step(model, dict(batch), True)[1] is None


class OwnLoss(Seq2SeqTrainer):
    """Adds to the loss something that it reads from the logits."""

    def _compute_loss(self, model, inputs, labels):
        loss, logits = super()._compute_loss(model, inputs, labels)
        return loss + logits.pow(2).mean(), logits


def test_an_overridden_loss_gets_logits(tmp_path):
    plain = evaluating(tmp_path)
    own = OwnLoss(model=plain.model, args=plain.args, data_args=PADS_IGNORED)
    batch = tiny_batch(plain.model)
    assert own.compute_loss(plain.model, dict(batch)) > plain.compute_loss(plain.model, dict(batch))


class OtherForward(type(fresh("bart"))):
    """A model that does something of its own with logits."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def adapted(model):
    model.lm_head = nn.Sequential(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("make", "values", "reason"),
    [
        (lambda: fresh("bart"), {"label_smoothing": 0, "data_args": None}, "its own loss"),
        (lambda: OtherForward(fresh("bart").config), {}, "forward method of its own"),
        (lambda: adapted(fresh("bart")), {}, "not a plain nn.Linear"),
    ],
)
def test_on_is_refused_where_it_cannot_take_effect(make, values, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        evaluating(tmp_path, linear="on", model=make(), **values)
    trainer = evaluating(tmp_path, linear="auto", model=make(), **values)
    assert trainer.compute_loss(trainer.model, tiny_batch(trainer.model)).isfinite()
