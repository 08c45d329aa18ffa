"""Our trainer against transformers' own: same rows, same order, same numbers."""

import pytest

from tests.support.families import FAMILY_NAMES
from tests.support.training import fresh, history, our_trainer, ragged_rows, stock_trainer

STEPS = 20
RELATIVE = 1e-5


class KeepPads:
    """data_args of a user who lets the model compute its own loss."""

    ignore_pad_token_for_loss = False


class ExcludePads:
    ignore_pad_token_for_loss = True


MODES = {
    "smoothed": (0.1, ExcludePads),
    "pads excluded": (0.0, ExcludePads),
    "the model's own loss": (0.0, KeepPads),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_twenty_steps_have_the_losses_of_transformers(family, mode, tmp_path):
    smoothing, data_args = MODES[mode]
    values = {
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "warmup_steps": 4,
        "weight_decay": 0.01,
    }
    model = fresh(family)
    rows = ragged_rows(model, 64)
    ours = our_trainer(
        model, tmp_path, rows, data_args=data_args, label_smoothing=smoothing, **values
    )
    theirs = stock_trainer(
        fresh(family), tmp_path, rows, label_smoothing_factor=smoothing, **values
    )
    ours.train()
    theirs.train()
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len(history(ours, name)) == STEPS
        assert history(ours, name) == pytest.approx(history(theirs, name), rel=RELATIVE), name
    expected_first = history(ours, "loss")[0]
    assert history(ours, "loss")[-1] < expected_first, "the run must have learnt something"


def test_transformers_multiplies_the_loss_by_the_accumulation_steps_and_ours_does_not(tmp_path):
    """The table of ``docs/results.md``, which must change if transformers fixes this."""
    first = {}
    for rows_per_device, accumulation in ((8, 1), (4, 2)):
        values = {
            "per_device_train_batch_size": rows_per_device,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
            "train_sampling_strategy": "sequential",
        }
        for maker in (our_trainer, stock_trainer):
            model = fresh("t5")
            trainer = maker(model, tmp_path, ragged_rows(model, 8), **values)
            trainer.train()
            first[maker.__name__, accumulation] = history(trainer, "loss")[0]
    assert first["our_trainer", 2] == pytest.approx(first["our_trainer", 1], rel=RELATIVE)
    assert first["our_trainer", 1] == pytest.approx(first["stock_trainer", 1], rel=RELATIVE)
    assert first["stock_trainer", 2] > 1.5 * first["stock_trainer", 1]
