"""--torch_compile: the same numbers, from a bounded number of graphs."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

from tests.support.training import fresh, history, our_trainer, ragged_rows

# Traced and compiled as ever, but without the C++ that inductor would write.
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}

# The loss runs between two graphs: before it the model, after it what wraps the model. The models
# of older versions hold code that torch cannot trace, which divides them further.
GRAPHS_PER_SHAPE = 2 if Version(transformers.__version__) >= Version("5.20") else 10


def test_each_shape_is_compiled_once_and_the_loss_stays_the_same(tmp_path):
    shared = {
        "batching": "tokens",
        "tokens_per_step": 300,
        "groups_per_step": 2,
        "num_buckets": 2,
        "label_smoothing": 0.1,
        "max_steps": 6,
    }
    found = {}
    torch._dynamo.reset()
    before = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    for name, more in (("plain", {}), ("compiled", COMPILED)):
        model = fresh("bart")
        trainer = our_trainer(model, tmp_path / name, ragged_rows(model, 60), **shared, **more)
        trainer.train()
        found[name] = history(trainer, "loss")
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-5)
    counts = [int(count) - before for count in history(trainer, "compilations")]
    assert 0 < counts[-1] <= GRAPHS_PER_SHAPE * shared["num_buckets"]
    assert counts[-1] == counts[2], "nothing is compiled after the first epoch"


def test_few_shapes_are_the_default_where_graphs_are_compiled(tmp_path):
    model = fresh("bart")
    trainer = our_trainer(model, tmp_path, ragged_rows(model, 4), **COMPILED)
    assert trainer.args.batching == "tokens" and trainer.parts.loaders.num_buckets == 8
    rows = our_trainer(
        model, tmp_path, ragged_rows(model, 4), per_device_train_batch_size=2, **COMPILED
    )
    assert rows.args.batching == "fixed" and rows.parts.loaders.num_buckets is None
