"""Schedules against the scheduler of torch of the same kind, and as values."""

import pickle

import pytest
import torch
from torch.optim import lr_scheduler

import fntrain as ft
from fntrain import schedules as s

STEPS = 30


def of_torch(make):
    """The learning rates torch's scheduler gives, by running it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5, momentum=0.9)
    scheduler = make(optimizer)
    values = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


PAIRS = [
    (s.constant(0.5), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    (s.linear(0.25, 0.5, total_steps=8), lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, total_iters=8)),
    (s.exponential(0.5, gamma=0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    (s.step_decay(0.5, every=7, gamma=0.3), lambda o: lr_scheduler.StepLR(o, 7, 0.3)),
    (s.multistep(0.5, milestones=(3, 9), gamma=0.3), lambda o: lr_scheduler.MultiStepLR(o, [3, 9], 0.3)),
    (s.cosine(0.5, total_steps=STEPS, end=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 0.1)),
    (
        s.warmup(s.constant(0.5), steps=6, start_factor=0.2),
        lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, total_iters=6),
    ),
    (
        s.join((5, s.linear(0.05, 0.5, total_steps=5)), s.cosine(0.5, total_steps=25)),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 25)], [5]
        ),
    ),
]


@pytest.mark.parametrize(("schedule", "make"), PAIRS)
def test_values_are_those_of_torch(schedule, make):
    """Every step's value agrees with torch's scheduler to 1e-9."""
    assert [schedule(step) for step in range(STEPS)] == pytest.approx(of_torch(make), rel=1e-9, abs=1e-12)


def test_the_comparison_fails_for_a_schedule_one_step_late():
    """Shifting a schedule by one step is noticed."""
    schedule, make = PAIRS[2]
    assert [schedule(step + 1) for step in range(STEPS)] != pytest.approx(of_torch(make), rel=1e-9)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (lr_scheduler.OneCycleLR, {"max_lr": 0.7, "total_steps": STEPS}),
        (lr_scheduler.CyclicLR, {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 4}),
        (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 5, "T_mult": 2}),
        (lr_scheduler.PolynomialLR, {"total_iters": 9, "power": 2.0}),
        (lr_scheduler.LambdaLR, {"lr_lambda": lambda step: 1 / (step + 1)}),
    ],
)
def test_from_torch_has_the_bits_of_the_scheduler(scheduler, options):
    """Any scheduler becomes a function of the step, asked in any order."""
    schedule = s.from_torch(scheduler, lr=0.5, num_steps=STEPS, **options)
    expected = of_torch(lambda o: scheduler(o, **options))
    assert [schedule(step) for step in reversed(range(STEPS))] == expected[::-1]


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in PAIRS] + [s.warmup_cosine(1.0, warmup_steps=3, total_steps=9) * 0.5, s.inverse_sqrt(1.0, warmup_steps=4), s.from_torch(lr_scheduler.StepLR, lr=1.0, num_steps=9, step_size=3)])  # fmt: skip
def test_schedules_are_values(schedule):
    """They compare, print and pickle, so they can go into configs and to other processes."""
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert repr(again) == repr(schedule)
    assert again(3) == schedule(3)
    assert "0x" not in repr(schedule)


def test_warmup_cosine_loses_no_update_and_ends_at_the_end():
    """The first update has a rate above 0, the peak is at warmup_steps, the end value at total_steps."""
    schedule = s.warmup_cosine(1.0, warmup_steps=4, total_steps=20, end=0.1)
    values = [schedule(step) for step in range(25)]
    assert values[0] == pytest.approx(0.2)
    assert values[4] == max(values) == 1.0
    assert values[20] == values[24] == pytest.approx(0.1)


def test_table_shows_values_and_bars():
    """A schedule can be looked at before it is used."""
    text = s.table(s.cosine(1.0, total_steps=100), 100)
    assert len(text.splitlines()) == 12
    assert "100" in text and "#" in text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: s.cosine(1.0, total_steps=0), ValueError, "total_steps: got 0"),
        (lambda: s.linear(0.0, 1.0, total_steps=2.5), ValueError, "total_steps: got 2.5"),
        (lambda: s.warmup_cosine(1.0, warmup_steps=9, total_steps=9), ValueError, "warmup_steps: got 9"),
        (lambda: s.step_decay(1.0, every=-1), ValueError, "every: got -1"),
        (lambda: s.multistep(1.0, milestones=(5, 3)), ValueError, r"milestones: got \(5, 3\)"),
        (lambda: s.join((5, s.constant(1.0))), TypeError, "a schedule at the end"),
        (lambda: s.join((0, s.constant(1.0)), s.constant(1.0)), ValueError, "num_steps: got 0"),
        (lambda: s.from_torch(lr_scheduler.ReduceLROnPlateau, lr=1.0, num_steps=3), TypeError, "depends on a metric"),
        (lambda: s.from_torch(lr_scheduler.StepLR, lr=1.0, num_steps=3, step_size=1)(4), ValueError, "got step 4, it was made for num_steps=3"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=s.constant(-1.0)).init({"w": torch.ones(1)}), ValueError, "learning rate"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(call, error, message):
    """Wrong lengths and orders are errors when the schedule is made."""
    with pytest.raises(error, match=message):
        call()
