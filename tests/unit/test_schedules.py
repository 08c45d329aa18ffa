"""Each schedule against its closed form, at every step."""

import math

import pytest
import torch

from s2s_scale.errors import UserError
from s2s_scale.optim import arg_to_scheduler, build_schedule

PEAK, WARMUP, TOTAL = 2.0, 10, 60


def progress(step):
    return (step - WARMUP) / (TOTAL - WARMUP)


def warmed(form):
    return lambda step: step / WARMUP if step < WARMUP else form(step)


def restarts(cycles):
    def form(step):
        if progress(step) >= 1:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * ((cycles * progress(step)) % 1.0)))

    return warmed(form)


def polynomial(power, end):
    return warmed(lambda s: ((PEAK - end) * (1 - progress(s)) ** power + end) / PEAK)


CLOSED_FORMS = [
    ("linear", {}, warmed(lambda s: 1 - progress(s))),
    ("cosine", {}, warmed(lambda s: 0.5 * (1 + math.cos(math.pi * progress(s))))),
    (
        "cosine",
        {"num_cycles": 1.5},
        warmed(lambda s: max(0.0, 0.5 * (1 + math.cos(math.pi * 3 * progress(s))))),
    ),
    ("cosine_w_restarts", {}, restarts(1)),
    ("cosine_w_restarts", {"num_cycles": 3.0}, restarts(3)),
    ("polynomial", {}, polynomial(1.0, 1e-7)),
    ("polynomial", {"power": 2.5, "lr_end": 0.1}, polynomial(2.5, 0.1)),
    ("constant", {}, lambda s: 1.0),
    ("constant_w_warmup", {}, lambda s: min(1.0, s / WARMUP)),
]


def test_every_schedule_has_a_closed_form_here():
    assert {name for name, _, _ in CLOSED_FORMS} == set(arg_to_scheduler)


@pytest.mark.parametrize(("name", "options", "form"), CLOSED_FORMS)
def test_schedule_equals_closed_form_at_every_step(name, options, form):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = build_schedule(
        name, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL, **options
    )
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [PEAK * form(step) for step in range(TOTAL)]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_unknown_schedule_names_the_nearest():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    with pytest.raises(UserError, match=r"'cosin' \(did you mean 'cosine'"):
        build_schedule("cosin", optimizer, num_warmup_steps=0, num_training_steps=1)
