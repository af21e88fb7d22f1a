"""write_metrics of several ranks: what one process writes."""

import functools
import math

import jobs
import pytest
import torch
import torch.nn.functional as F

import fntrain as ft
from fntrain.events import MetricName
from fntrain.metrics import WEIGHT, combined

APPROX = functools.partial(pytest.approx, rel=1e-9, abs=1e-12, nan_ok=True)


def reporting(loss):
    """A loss function of jobs.py that also reports metrics of every kind."""

    def loss_fn(model, batch):
        logits = model(batch["x"])
        right, mask = (logits.argmax(-1) == batch["y"]), batch["mask"]
        masked = (right * mask).double().sum() / mask.sum()  # nan where nothing counts
        ft.put_scalar("mean", masked if loss == "masked" else right.double().mean())
        ft.put_scalar("sum", right.sum(), reduce="sum")
        ft.put_scalar("large", (2**24 + 1) * right.sum(), reduce="sum", smooth=False)  # float32 would lose the 1
        ft.put_scalar("samples", len(right), reduce="sum")
        ft.put_scalar("max", logits.max(), reduce="max")
        ft.put_scalar("min", logits.min(), reduce="min")
        ft.put_scalar("shown", F.cross_entropy(logits, batch["y"], reduction="sum"), reduce="sum", smooth=False)
        if mask.sum() >= 1:  # not on every rank, nor at every step
            ft.put_scalar("seen", mask.sum(), reduce="sum")
        ft.put_scalar("gone", torch.where(mask, math.nan, 1.0).amax(), reduce="max")
        ft.put_text("note", "text")
        return jobs.LOSSES[loss](model, batch)

    return loss_fn


def fitted(
    loss="mean", hooks=(), *, max_steps=7, every=3, window=2, smoothing="median", report=True, strategy="ddp", **options
):
    """Train; return what was written by this process, the exchanges per step, and a summary of the last state."""
    loss_fn = reporting(loss) if report else None
    step_fn, state, data = jobs.parts(loss, loss_fn=loss_fn, dtype=torch.float64, **options)
    kept, opened = ft.writers.memory(), []
    final = ft.fit(
        ft.shell.distribute(step_fn, strategy),
        [*hooks, ft.hooks.write_metrics([kept, Opening(opened)], every=every, window=window, smoothing=smoothing)],
        state=state,
        data=data,
        max_steps=max_steps,
    )
    rows = [
        {"step": row.step, "scalars": dict(row.scalars), "media": sorted(row.media), "periodic": row.periodic}
        for row in kept.rows
    ]
    values = {name: kept[name].values() for name in kept}
    return {"rows": rows, "values": values, "opened": len(opened), **jobs.summary(final)}


class Opening:
    """A writer that says that it was opened."""

    def __init__(self, opened):
        self.opened = opened

    def open(self, start_step):
        self.opened.append(start_step)
        return ft.writers.memory().open(start_step)


def same(found, alone, names=None):
    """Rank 0 has written what one process writes, the others nothing."""
    assert [one["opened"] for one in found] == [1] + [0] * (len(found) - 1)
    assert not any(one["rows"] for one in found[1:])
    rows = found[0]["rows"]
    assert [(row["step"], row["media"], row["periodic"]) for row in rows] == [
        (row["step"], row["media"], row["periodic"]) for row in alone["rows"]
    ]
    for row, expected in zip(rows, alone["rows"], strict=True):
        assert row["scalars"].keys() == expected["scalars"].keys()
        for name, value in expected["scalars"].items():
            assert row["scalars"][name] == APPROX(value), (row["step"], name)
    assert found[0]["values"].keys() == alone["values"].keys()
    for name, values in alone["values"].items():
        assert [step for step, _ in found[0]["values"][name]] == [step for step, _ in values], name


def exact(found, alone):
    """Whole numbers are the same, not only close."""
    for row, expected in zip(found[0]["rows"], alone["rows"], strict=True):
        for name in ("sum", "large", "samples", "seen"):
            assert row["scalars"].get(name) == expected["scalars"].get(name)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", jobs.LOSSES)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_what_one_process_writes(ranks, size, loss, accumulate):
    """Mean, sum, max, min, terms of the loss, with ragged shares, masks, micro-batches and a period of 3 in 7 steps."""
    found = ranks(size)(functools.partial(fitted, loss, accumulate=accumulate))
    alone = fitted(loss)
    same(found, alone)
    exact(found, alone)
    assert WEIGHT not in found[0]["values"]


@pytest.mark.parametrize("window", [1, 2, 20])
@pytest.mark.parametrize(
    "smoothing", ["mean", "latest", "global_mean", {"max": "mean", "s*": "latest", "*": "global_mean"}], ids=str
)
def test_windows_and_smoothing_are_those_of_one_process(ranks, smoothing, window):
    """Whatever stands for the values of a period."""
    found = ranks(2)(functools.partial(fitted, "masked", smoothing=smoothing, window=window))
    alone = fitted("masked", smoothing=smoothing, window=window)
    same(found, alone)
    exact(found, alone)


@pytest.mark.parametrize("loss", jobs.LOSSES)
def test_ranks_that_hold_parts_write_the_same(ranks, loss):
    """With strategy="fsdp" too."""
    found, alone = ranks(2)(functools.partial(fitted, loss, strategy="fsdp")), fitted(loss)
    same(found, alone)
    exact(found, alone)


def unweighted():
    """A twin that forgets the weights."""
    from fntrain.hooks import metrics

    right, metrics.combined = (
        metrics.combined,
        lambda name, parts: combined(name, [(number, 1.0) for number, _ in parts]),
    )
    try:
        return fitted("masked")
    finally:
        metrics.combined = right


def test_the_law_can_fail(ranks):
    """Metrics that are combined without weights are not those of one process."""
    with pytest.raises(AssertionError, match="mean"):
        same(ranks(2)(unweighted), fitted("masked"))


def counting():
    """How often a rank talks to others by gather, at each step of a run that writes at 3, 6 and 7."""
    from fntrain.shell.distributed.connected import Connected

    calls, right, now = [], Connected.gather, [0]

    def gather(self, value, **options):
        calls.append(now[0])
        return right(self, value, **options)

    def look(state):
        now[0] = state.step

    Connected.gather = gather
    try:
        fitted("masked", [ft.hooks.iteration_timer(), ft.hook(before_step=look, after_step=look)])
    finally:
        Connected.gather = right
    return calls[1:]  # without that of the start


def test_each_write_is_one_exchange(ranks):
    """One at each of the three writes, however many metrics there are, and none between."""
    assert ranks(2)(counting) == [[3, 6, 7]] * 2


def slow_data():
    """A run whose batches come late on rank 1."""
    import time

    class Slow(ft.data.Stream):
        def at(self, position):
            for batch in super().at(position):
                time.sleep(0.05 * self.rank)
                yield batch

    step_fn, state, data = jobs.parts()
    slow = Slow(data.dataset, data.batch_size, seed=0)
    kept = ft.writers.memory()
    ft.fit(
        ft.shell.distribute(step_fn),
        [ft.hooks.iteration_timer(), ft.hooks.write_metrics(kept, every=1)],
        state=state,
        data=slow,
        max_steps=2,
    )
    return [row.scalars["time/data"] for row in kept.rows]


def test_time_for_data_is_that_of_the_slowest_rank(ranks):
    """Rank 0 waits for no batch, and yet writes the time of rank 1."""
    assert min(ranks(2)(slow_data)[0]) >= 0.05


def own_names(state):
    rank = state.run.ranks.rank
    mine = {f"of rank {rank}": float(rank), "both": float(rank)}
    if (state.step + rank) % 2:
        mine["in turns"] = float(state.step)
    return state.replace(metrics={**state.metrics, **mine})


def with_own_names():
    return fitted("mean", [ft.hook(after_step=own_names)], report=False, every=4, max_steps=9)


def test_ranks_may_report_different_names(ranks):
    """Each rank has a metric of its own and one that it reports every second step: all are written, nothing hangs."""
    found = ranks(2)(with_own_names)[0]
    rows = {row["step"]: row["scalars"] for row in found["rows"]}
    assert sorted(rows) == [4, 8, 9]
    assert rows[4]["of rank 0"] == 0.0 and rows[4]["of rank 1"] == 1.0 and rows[4]["in turns"] == 3.5
    assert rows[4]["both"] == pytest.approx(5 / 11)  # shares of 6 and 5 samples
    assert [step for step, _ in found["values"]["in turns"]][-1] == 9


def spiking(state):
    """A loss that jumps at batch 5, on rank 0 more."""
    spike = 1000.0 if state.position == 5 else 1.0
    return state.replace(metrics={**state.metrics, "x": spike * (2.0 - state.run.ranks.rank), "y": float(state.step)})


def rolled_back(every=2, max_steps=8):
    hooks = [
        ft.hook(after_step=spiking),
        ft.hooks.rollback_on_spike("x", window=2, snapshot_every=2, look_every=1),
    ]
    return fitted("mean", hooks, every=every, max_steps=max_steps)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_roll_back_leaves_the_rows_of_one_process(ranks, every):
    """Of the branch that was left nothing stays, and the branch that counts is written once."""
    found, alone = ranks(2)(functools.partial(rolled_back, every)), rolled_back(every)
    assert [row["step"] for row in found[0]["rows"]] == [row["step"] for row in alone["rows"]]
    for row, expected in zip(found[0]["rows"], alone["rows"], strict=True):
        for name in expected["scalars"].keys() - {"x"}:
            assert row["scalars"][name] == APPROX(expected["scalars"][name]), (row["step"], name)
    assert found[0]["values"]["y"] == alone["values"]["y"]
    assert [step for step, _ in alone["values"]["y"]][-2:] == [7, 8]


def reserved(state):
    return state.replace(metrics={**state.metrics, "x": 1.0})


def takes_the_name():
    def loss_fn(model, batch):
        ft.put_scalar("batch_weight", 1.0)
        return jobs.mean_loss(model, batch)

    step_fn, state, data = jobs.parts(loss_fn=loss_fn)
    step_fn = ft.shell.distribute(step_fn)
    try:
        step_fn(state, next(data.at(0)))
    except ValueError as error:
        return str(error)


def test_the_name_of_the_weight_is_taken(ranks):
    """A metric of that name is refused, by one process too, where it could still be renamed in peace."""
    message = "metrics: ['batch_weight'] are reported by the step or the loss; rename put_scalar or term"
    assert ranks(2)(takes_the_name) == [message] * 2 and takes_the_name() == message


@pytest.mark.parametrize(
    ("name", "parts", "result"),
    [
        ("x", [(1.0, 3), (5.0, 1)], 2.0),
        ("x", [(math.nan, 0), (5.0, 2)], 5.0),
        ("x", [(math.nan, 1), (5.0, 2)], math.nan),
        ("x", [(0.1, 3), (0.1, 4), (0.1, 9)], 0.1),
        (MetricName("x", "sum"), [(2**53, 1), (1, 1), (1, 1)], 2.0**53 + 2),
        (MetricName("x", "sum"), [(math.inf, 1), (-math.inf, 1)], math.nan),
        (MetricName("x", "max"), [(1.0, 1), (math.nan, 1)], math.nan),
        (MetricName("x", "min"), [(2.0, 0), (1.0, 0)], 1.0),
        (MetricName("x", "same"), [(0.3, 1), (0.3, 2)], 0.3),
    ],
)
def test_values_combine_as_their_names_say(name, parts, result):
    """Whatever the order of the ranks."""
    assert combined(name, parts) == pytest.approx(result, rel=0, abs=0, nan_ok=True)
    assert combined(name, parts[::-1]) == pytest.approx(result, rel=0, abs=0, nan_ok=True)
