"""What the trainer promises beside the loss: construction, order of rows, evaluation, saving."""

import copy
import dataclasses
import inspect
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import Dataset, IterableDataset
from transformers import GenerationConfig, TrainerCallback

from s2s_scale import Seq2SeqTrainer, Seq2SeqTrainingArguments
from s2s_scale.backends import make_backend
from s2s_scale.checkpoint import checkpoints
from s2s_scale.compat import check_register
from s2s_scale.data.collators import Seq2SeqCollator
from s2s_scale.data.samplers import PlanSampler
from s2s_scale.errors import UserError
from s2s_scale.trainer import compat
from s2s_scale.trainer.bad_steps import NonFiniteLossError
from tests.support.families import FAMILY_NAMES
from tests.support.training import fresh, history, our_trainer, ragged_rows, settings

# ---- Construction ----


def test_config_falls_back_to_the_models(tmp_path):
    model = fresh("bart")
    trainer = our_trainer(model, tmp_path, None)
    assert trainer.config is model.config
    assert trainer.vocab_size == model.config.vocab_size


def test_fsmt_counts_its_target_vocabulary(tmp_path):
    model = fresh("fsmt")
    assert model.config.tgt_vocab_size != model.config.src_vocab_size
    assert our_trainer(model, tmp_path, None).vocab_size == model.config.tgt_vocab_size


class Wrapped(torch.nn.Module):
    """A model that is no PreTrainedModel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids=None, attention_mask=None, labels=None, **rest):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **rest)


def test_a_plain_module_needs_a_config(tmp_path):
    model = fresh("t5")
    args = Seq2SeqTrainingArguments(**settings(tmp_path))
    with pytest.raises(ValueError, match="without one the model must be a PreTrainedModel"):
        Seq2SeqTrainer(model=Wrapped(model), args=args)


def test_a_plain_module_trains_with_a_config(tmp_path):
    model = fresh("t5")
    wrapped = Wrapped(model)
    trainer = Seq2SeqTrainer(
        model.config,
        SimpleNamespace(ignore_pad_token_for_loss=True),
        model=wrapped,
        args=Seq2SeqTrainingArguments(**settings(tmp_path, max_steps=3)),
        train_dataset=ragged_rows(model, 8),
        data_collator=Seq2SeqCollator(0),
    )
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_a_missing_pad_id_is_an_error_where_the_loss_needs_it(tmp_path, smoothing):
    model = fresh("bart")
    model.config.pad_token_id = None
    data_args = SimpleNamespace(ignore_pad_token_for_loss=True)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        our_trainer(model, tmp_path, None, data_args=data_args, label_smoothing=smoothing)


def test_eos_stands_in_for_a_missing_pad_with_a_warning(tmp_path, caplog):
    model = fresh("bart")
    model.config.pad_token_id = None
    transformers.utils.logging.enable_propagation()
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**settings(tmp_path, log_level="warning")),
    )
    assert "eos_token_id = 2 is used for padding" in caplog.text
    padded = trainer._pad_tensors_to_max_len(torch.tensor([[7, 8]]), 4)
    assert padded.tolist() == [[7, 8, 2, 2]]


def test_neither_pad_nor_eos_is_a_value_error_when_padding(tmp_path):
    trainer = our_trainer(fresh("bart"), tmp_path, None)
    trainer.config.pad_token_id = trainer.config.eos_token_id = None
    with pytest.raises(ValueError, match="neither config.pad_token_id nor"):
        trainer._pad_tensors_to_max_len(torch.tensor([[7, 8]]), 4)


def test_tokenizer_is_another_name_of_processing_class(tmp_path):
    tokenizer = SimpleNamespace(pad_token_id=1, eos_token_id=2)
    trainer = our_trainer(fresh("bart"), tmp_path, None, tokenizer=tokenizer)
    assert trainer.processing_class is tokenizer
    with pytest.raises(ValueError, match="two different ones"):
        Seq2SeqTrainer(model=fresh("bart"), tokenizer=tokenizer, processing_class=object())


def test_config_and_data_args_come_first_by_position(tmp_path):
    model = fresh("bart")
    data_args = SimpleNamespace(ignore_pad_token_for_loss=True)
    args = Seq2SeqTrainingArguments(**settings(tmp_path))
    trainer = Seq2SeqTrainer(model.config, data_args, model, args)
    assert trainer.model is model and trainer.data_args is data_args
    assert trainer.config is model.config and trainer.args.output_dir == args.output_dir
    assert Seq2SeqTrainer(model.config, data_args, model=model, args=args).data_args is data_args
    with pytest.raises(TypeError, match="multiple values for .*'config'"):
        Seq2SeqTrainer(model.config, data_args, config=model.config)


def test_the_signature_is_that_of_transformers_and_then_ours(tmp_path):
    stock = list(inspect.signature(transformers.Seq2SeqTrainer).parameters)
    ours = inspect.signature(Seq2SeqTrainer).parameters
    assert list(ours)[: len(stock)] == stock
    assert [(name, ours[name].kind) for name in list(ours)[len(stock) :]] == [
        (name, inspect.Parameter.KEYWORD_ONLY)
        for name in ("config", "data_args", "tokenizer", "backend", "text_evaluation_for")
    ]
    for name in ("train", "evaluate", "predict", "evaluation_loop", "prediction_step"):
        theirs = inspect.signature(getattr(transformers.Seq2SeqTrainer, name)).parameters
        assert list(inspect.signature(getattr(Seq2SeqTrainer, name)).parameters) == list(theirs)
    model, rows = fresh("t5"), ragged_rows(fresh("t5"), 4)
    args = Seq2SeqTrainingArguments(**settings(tmp_path))
    trainer = Seq2SeqTrainer(model, args, Seq2SeqCollator(0), rows)
    assert trainer.model is model and trainer.train_dataset is rows


def test_private_hooks_that_are_overridden_are_registered():
    theirs = vars(transformers.Trainer) | vars(transformers.Seq2SeqTrainer)
    ours = {n for n in vars(Seq2SeqTrainer) if n in theirs and n.startswith("_") and n[1] != "_"}
    assert ours == compat.overridden_hooks()
    files = check_register(["s2s_scale.trainer.compat"])
    found = [v for v in files if v.reliance.function.startswith("s2s_scale.trainer.compat.")]
    assert len(found) > 8 and not [verdict.error for verdict in found if verdict.error]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"batching": "tokens", "tokens_per_step": 120, "groups_per_step": 4},
        {"batching": "tokens", "tokens_per_step": 120, "auto_batch": True},
        {"torch_compile": True},
    ],
)
def test_the_arguments_of_the_user_are_not_changed(tmp_path, values):
    model = fresh("t5")
    args = Seq2SeqTrainingArguments(**settings(tmp_path, max_steps=2, report_to=["none"], **values))
    before, fields = dict(vars(args)), copy.deepcopy(dataclasses.asdict(args))
    rows = ragged_rows(model, 30)
    trainer = Seq2SeqTrainer(model, args, Seq2SeqCollator(0), rows)
    if not args.torch_compile:
        trainer.train()
        assert trainer.args.gradient_accumulation_steps > 1 or not values
    trainer.args.logging_steps = 99
    assert dict(vars(args)) == before and dataclasses.asdict(args) == fields


def test_the_default_backend_is_for_the_device_of_the_arguments(tmp_path, monkeypatch):
    found = []
    args = Seq2SeqTrainingArguments(**settings(tmp_path))
    plain = Seq2SeqTrainer(fresh("t5"), args)
    assert plain.backend.device == "cpu"
    monkeypatch.setattr(
        "s2s_scale.trainer.trainer.make_backend",
        lambda name, device: found.append((name, device)) or make_backend(name, "cpu"),
    )
    monkeypatch.setattr(Seq2SeqTrainingArguments, "device", torch.device("cuda", 0))
    with pytest.raises((AssertionError, RuntimeError)):  # there is no such device here
        Seq2SeqTrainer(fresh("t5"), args)
    assert found == [("local", "cuda")]


def overriding(name, hook, module="s2s_scale.of_a_user"):
    """A subclass with a hook of its own, in whatever module it stands."""
    return type("Own", (Seq2SeqTrainer,), {name: hook, "__module__": module})


@pytest.mark.parametrize("name", ["compute_loss", "_compute_loss", "training_step"])
def test_a_subclass_that_computes_the_loss_is_found_in_any_module(tmp_path, name):
    calls = []

    def hook(self, *args, **more):
        calls.append(name)
        return getattr(super(own, self), name)(*args, **more)

    own = overriding(name, hook)
    model = fresh("bart")
    args = Seq2SeqTrainingArguments(**settings(tmp_path, max_steps=2))
    rows = ragged_rows(model, 8)
    plain = Seq2SeqTrainer(model, args, Seq2SeqCollator(1), rows)
    assert plain.backend.autocast().memory.in_place
    trainer = own(model, args, Seq2SeqCollator(1), rows)
    assert not trainer.backend.autocast().memory.in_place
    trainer.train()
    assert len(calls) == 2


def test_hooks_of_a_subclass_win(tmp_path):
    model, used = fresh("t5"), []
    rows = ragged_rows(model, 8)

    class Own(Seq2SeqTrainer):
        def _get_train_sampler(self, train_dataset=None):
            used.append("sampler")
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

        def _get_num_items_in_batch(self, batch_samples, device):
            used.append("tokens")
            return torch.tensor(1)

        def get_decay_parameter_names(self, model):
            used.append("decay")
            return []

        def create_scheduler(self, num_training_steps, optimizer=None):
            used.append("schedule")
            rate = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda _: 0.5)
            self.lr_scheduler = rate
            return rate

    args = Seq2SeqTrainingArguments(**settings(tmp_path, max_steps=2, weight_decay=0.1))
    trainer = Own(model, args, Seq2SeqCollator(0), rows)
    trainer.train()
    assert {"sampler", "tokens", "decay", "schedule"} == set(used)
    assert history(trainer, "learning_rate") == [0.005, 0.005]
    assert trainer.parts.loaders.train_sampler is None
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.0]


def test_a_subclass_may_make_loader_and_optimizer(tmp_path):
    model = fresh("t5")

    class Own(Seq2SeqTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_size=2, collate_fn=self.data_collator
            )

        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
            return self.optimizer

    args = Seq2SeqTrainingArguments(**settings(tmp_path, num_train_epochs=1))
    trainer = Own(model, args, Seq2SeqCollator(0), ragged_rows(model, 8))
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.optimizer.param_groups[0]["lr"] < 0.5


def test_transformers_arguments_are_taken_over(tmp_path):
    theirs = transformers.Seq2SeqTrainingArguments(
        **settings(tmp_path, label_smoothing_factor=0.1, predict_with_generate=True)
    )
    trainer = Seq2SeqTrainer(model=fresh("t5"), args=theirs)
    assert trainer.args.label_smoothing == 0.1 and trainer.args.predict_with_generate


def test_model_init_is_accepted(tmp_path):
    trainer = Seq2SeqTrainer(
        model_init=lambda: fresh("t5"),
        args=Seq2SeqTrainingArguments(**settings(tmp_path, max_steps=1)),
        train_dataset=ragged_rows(fresh("t5"), 8),
        data_collator=Seq2SeqCollator(0),
    )
    assert np.isfinite(trainer.train().training_loss)


def test_a_dropout_that_the_built_model_lacks_is_refused(tmp_path):
    with pytest.raises(UserError, match="dropout=0.3: differs from the model's config"):
        our_trainer(fresh("bart", dropout=0.1), tmp_path, None, dropout=0.3)
    same = our_trainer(fresh("bart", dropout=0.3), tmp_path, None, dropout=0.3)
    assert same.config.dropout == 0.3


def test_a_bad_generation_config_is_refused_at_construction(tmp_path):
    bad = GenerationConfig(num_beams=1, length_penalty=2.0)
    with pytest.raises(ValueError, match="length_penalty"):
        our_trainer(
            fresh("bart"), tmp_path, None, predict_with_generate=True, generation_config=bad
        )


def test_a_fully_frozen_model_is_refused(tmp_path):
    model = fresh("bart").requires_grad_(False)
    trainer = our_trainer(model, tmp_path, ragged_rows(model, 4), max_steps=1)
    with pytest.raises(UserError, match="everything is frozen"):
        trainer.train()


# ---- Optimizer and schedule ----


def test_a_schedule_passed_in_is_used_and_the_flag_reported_as_unused(tmp_path, caplog):
    model = fresh("t5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    transformers.utils.logging.enable_propagation()
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            **settings(tmp_path, lr_scheduler="cosine", max_steps=2, log_level="warning")
        ),
        train_dataset=ragged_rows(model, 16),
        data_collator=Seq2SeqCollator(0),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert history(trainer, "learning_rate") == [0.5, 0.5]
    assert "lr_scheduler=cosine and warmup_steps are unused" in caplog.text


def test_create_optimizer_and_scheduler_makes_both(tmp_path):
    trainer = our_trainer(
        fresh("t5"), tmp_path, None, lr_scheduler="polynomial", lr_power=2.0, adafactor=True
    )
    trainer.create_optimizer_and_scheduler(10)
    assert type(trainer.optimizer).__name__ == "Adafactor"
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rate = (1e-2 - 1e-7) * 0.5**2 + 1e-7
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(rate)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.0]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_every_optimizer_trains(tmp_path, optim):
    model = fresh("t5")
    trainer = our_trainer(
        model, tmp_path, ragged_rows(model, 8), optim=optim, max_steps=6, weight_decay=0.01
    )
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0]


# ---- Which rows, in which order ----


class Counting(Dataset):
    """A map-style data set of its own kind that notes which rows were read."""

    def __init__(self, rows):
        self.rows = rows
        self.read = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read.append(index)
        return self.rows[index]


@pytest.mark.parametrize("batching", ["fixed", "sortish"])
def test_every_row_is_read_once_per_epoch_in_the_plans_order(tmp_path, batching):
    model = fresh("t5")
    rows = Counting(ragged_rows(model, 21))
    trainer = our_trainer(
        model,
        tmp_path,
        rows,
        batching=batching,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
    )
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, PlanSampler)
    rows.read.clear()
    trainer.train()
    assert trainer.state.global_step == 2 * 6
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert rows.read[-42:] == expected
    assert sorted(expected[:21]) == list(range(21)) and expected[:21] != expected[21:]


def test_a_stream_cannot_be_sorted(tmp_path):
    model = fresh("t5")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ragged_rows(model, 32))

    with pytest.raises(UserError, match="batching=sortish: cannot take effect"):
        our_trainer(model, tmp_path, Stream(), batching="sortish", max_steps=1).train()
    plain = our_trainer(model, tmp_path, Stream(), max_steps=2)
    plain.train()
    assert plain.state.global_step == 2


def test_resuming_goes_on_with_the_rows_and_losses_of_the_whole_run(tmp_path):
    values = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 7,
        "batching": "sortish",
        "lr_scheduler": "cosine",
    }
    model = fresh("bart", dropout=0.2)
    rows = ragged_rows(model, 20)
    whole = our_trainer(model, tmp_path / "whole", rows, **values)
    whole.train()
    again = our_trainer(fresh("bart", dropout=0.2), tmp_path / "again", rows, **values)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert again.state.global_step == whole.state.global_step == 15
    assert history(again, "loss") == history(whole, "loss")


# ---- Evaluation ----


def text_dataset(model, count):
    return datasets.Dataset.from_list(ragged_rows(model, count))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_evaluation_loss_is_the_same_at_batch_size_1_and_16(tmp_path, family, smoothing):
    model = fresh(family)
    metrics = [
        our_trainer(
            model,
            tmp_path,
            None,
            eval_dataset=text_dataset(model, 33),
            label_smoothing=smoothing,
            per_device_eval_batch_size=size,
        ).evaluate()
        for size in (1, 16)
    ]
    for name in ("eval_loss", "eval_nll_loss"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-6)
    assert (metrics[0]["eval_loss"] == metrics[0]["eval_nll_loss"]) == (smoothing == 0.0)


@pytest.mark.parametrize("batching", ["fixed", "sortish"])
def test_predictions_come_in_the_datas_order(tmp_path, batching):
    model = fresh("t5")
    rows = text_dataset(model, 37)
    seen = {}

    def compute_metrics(prediction):
        seen["labels"] = prediction.label_ids
        return {"rows": len(prediction.predictions)}

    trainer = our_trainer(
        model,
        tmp_path,
        None,
        batching=batching,
        predict_with_generate=True,
        generation_max_length=14,
        per_device_eval_batch_size=4,
        compute_metrics=compute_metrics,
    )
    output = trainer.predict(rows)
    order = trainer.get_test_dataloader(rows).row_order
    assert order.tolist() != sorted(order), "rows must have been sorted for this test to mean much"
    for labels in (output.label_ids, seen["labels"]):
        for row, label in zip(rows, labels, strict=True):
            assert label[: len(row["labels"])].tolist() == row["labels"]
    collate = Seq2SeqCollator(model.config.pad_token_id)
    for index in (0, 17, 36):
        batch = collate([{"input_ids": rows[index]["input_ids"]}])
        alone = model.generate(**batch, max_length=14)[0]
        assert output.predictions[index][: len(alone)].tolist() == alone.tolist()


def test_logits_come_in_the_datas_order_without_generation(tmp_path):
    model = fresh("t5")
    rows = text_dataset(model, 9)
    trainer = our_trainer(model, tmp_path, None, per_device_eval_batch_size=4)
    output = trainer.predict(rows)
    batch = Seq2SeqCollator(0)([rows[3]])
    with torch.no_grad():
        alone = model(**batch).logits[0].numpy()
    np.testing.assert_allclose(output.predictions[3][: len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_several_returned_sequences_stay_with_their_row(tmp_path):
    model = fresh("t5")
    rows = text_dataset(model, 7)
    trainer = our_trainer(
        model, tmp_path, None, predict_with_generate=True, per_device_eval_batch_size=3
    )
    output = trainer.predict(rows, num_beams=3, num_return_sequences=2, max_length=9)
    assert output.predictions.shape == (14, 9)
    alone = model.generate(
        input_ids=torch.tensor([rows[4]["input_ids"]]),
        num_beams=3,
        num_return_sequences=2,
        max_length=9,
    )
    for offset in range(2):
        got = output.predictions[8 + offset][: alone.shape[1]]
        assert got.tolist() == alone[offset].tolist()


def test_generation_settings_rank_call_then_arguments_then_data_args(tmp_path):
    model = fresh("t5")
    rows = text_dataset(model, 4)
    data_args = SimpleNamespace(val_max_target_length=11, eval_beams=2)
    seen = []
    generate = model.generate

    def watched(**options):
        seen.append((options.get("max_length"), options.get("num_beams")))
        return generate(**options)

    model.generate = watched
    common = {"predict_with_generate": True, "data_args": data_args}
    by_data = our_trainer(model, tmp_path, None, **common)
    by_data.predict(rows)
    by_data.predict(rows, max_length=7, num_beams=3)
    by_args = our_trainer(
        model, tmp_path, None, generation_max_length=9, generation_num_beams=1, **common
    )
    assert by_args.predict(rows).predictions.shape[1] == 9
    assert seen == [(11, 2), (7, 3), (9, 1)]


def test_gen_kwargs_reach_every_data_set_of_a_dictionary(tmp_path):
    model = fresh("t5")
    lengths = []
    trainer = our_trainer(
        model,
        tmp_path,
        None,
        predict_with_generate=True,
        eval_dataset={"a": text_dataset(model, 3), "b": text_dataset(model, 2)},
        compute_metrics=lambda p: lengths.append(p.predictions.shape) or {},
    )
    metrics = trainer.evaluate(max_length=6)
    assert lengths == [(3, 6), (2, 6)]
    assert {"eval_a_loss", "eval_b_loss"} <= set(metrics)


def test_metrics_by_batch_work(tmp_path):
    model = fresh("t5")
    calls = []

    def compute_metrics(prediction, compute_result):
        calls.append(compute_result)
        return {"batches": len(calls)}

    trainer = our_trainer(
        model,
        tmp_path,
        None,
        eval_dataset=text_dataset(model, 10),
        batch_eval_metrics=True,
        per_device_eval_batch_size=4,
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_batches"] == 3
    assert calls == [False, False, True]


def test_a_loss_function_passed_in_is_used(tmp_path):
    model = fresh("bart")
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**settings(tmp_path, max_steps=1, batching="fixed")),
        train_dataset=ragged_rows(model, 8),
        data_collator=Seq2SeqCollator(1),
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum() * 0 + 7,
    )
    trainer.train()
    assert history(trainer, "loss") == [7.0]


def test_a_subclass_may_bring_its_own_compute_loss(tmp_path):
    class Doubled(Seq2SeqTrainer):
        def _compute_loss(self, model, inputs, labels):
            loss, logits = super()._compute_loss(model, inputs, labels)
            return 2 * loss, logits

    model = fresh("t5")
    rows = ragged_rows(model, 8)
    values = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    plain = our_trainer(model, tmp_path, rows, **values)
    plain.train()
    doubled = Doubled(
        model=fresh("t5"),
        args=Seq2SeqTrainingArguments(**settings(tmp_path, **values)),
        train_dataset=rows,
        data_collator=Seq2SeqCollator(0),
    )
    doubled.train()
    assert history(doubled, "loss")[0] == pytest.approx(2 * history(plain, "loss")[0], rel=1e-5)


def test_callbacks_are_called(tmp_path):
    steps = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            steps.append(state.global_step)

    model = fresh("t5")
    our_trainer(model, tmp_path, ragged_rows(model, 8), callbacks=[Watch()], max_steps=3).train()
    assert steps == [1, 2, 3]


def test_a_batch_without_labels_says_what_is_missing(tmp_path):
    trainer = our_trainer(fresh("t5"), tmp_path, None)
    with pytest.raises(ValueError, match="a batch needs labels"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 2)})


# ---- Steps that are not finite ----


def poisoned(model, bad_step):
    """Make the decoder give NaN in the forward passes whose numbers are in ``bad_step``."""
    calls = {"n": 0}

    def hook(module, args, output):
        calls["n"] += 1
        return output * float("nan") if calls["n"] in bad_step else output

    model.get_decoder().register_forward_hook(
        lambda m, a, o: o.__class__(**{**o, "last_hidden_state": hook(m, a, o.last_hidden_state)})
    )


def test_a_bad_step_is_skipped_counted_and_the_weights_stay_finite(tmp_path):
    model = fresh("t5")
    poisoned(model, {2})
    trainer = our_trainer(model, tmp_path, ragged_rows(model, 32), max_steps=4, batching="fixed")
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert history(trainer, "nonfinite_steps") == [1, 1, 1]


def test_too_many_bad_steps_stop_the_run_and_name_the_rows_and_checkpoint(tmp_path):
    model = fresh("t5")
    poisoned(model, {3, 4, 6})
    trainer = our_trainer(
        model,
        tmp_path,
        ragged_rows(model, 32),
        batching="fixed",
        max_steps=20,
        save_strategy="steps",
        save_steps=2,
        max_nonfinite_steps=3,
    )
    rows = trainer._get_train_sampler().plan.rows(2).tolist()
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "(3, 4, 6;" in message and "learning rate" in message
    assert f"{tmp_path}/checkpoint-4" in message
    assert len(rows) == 8


# ---- Saving ----


def test_the_saved_model_loads_with_the_same_outputs(tmp_path):
    model = fresh("t5")
    trainer = our_trainer(model, tmp_path, ragged_rows(model, 16), max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[7, 8, 9, 1]])
    model.eval()
    assert torch.equal(loaded.generate(ids, max_length=9), model.generate(ids, max_length=9))
    assert not list(tmp_path.glob(".*incomplete"))


def test_the_best_checkpoint_survives_the_limit(tmp_path):
    model = fresh("t5")
    rows = ragged_rows(model, 16)
    trainer = our_trainer(
        model,
        tmp_path,
        rows,
        eval_dataset=rows,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
    )
    trainer.train()
    saved = [folder.name for folder in checkpoints(tmp_path)]
    assert len(saved) == 2 and "checkpoint-6" in saved
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert best in saved and trainer.state.best_model_checkpoint == str(tmp_path / best)
    state = json.loads((tmp_path / best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / best)
