"""What detectron2's documentation says of metrics, as facts about fntrain.

detectron2 numbers its iterations from 0 and asks `(iteration + 1) % period == 0`; here step 1 is the first that is
done, so its iterations 19, 39 and 49 are the steps 20, 40 and 50 below.
"""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fntrain as ft
from fntrain.writers.history import History


class Head(nn.Module):
    """A sub-module that reports from its forward, without anything handed to it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        logits = self.linear(x)
        ft.put_scalar("mean_logit", logits.mean())
        ft.put_scalar("temperature", 0.5, smooth=False)
        ft.put_histogram("logits", logits)
        return logits


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Head()

    def forward(self, x):
        with ft.name_scope("roi_head"):
            return self.head(x)


def loss_fn(model, batch):
    images, labels = batch
    ft.put_image("input", images[0].reshape(1, 2, 2).sigmoid())
    loss = F.cross_entropy(model(images), labels)
    return {"loss_cls": loss, "loss_reg": 0.5 * loss}


class Data:
    """Batch number s is a function of s."""

    def at(self, position):
        while True:
            generator = torch.Generator().manual_seed(position)
            yield torch.randn(8, 4, generator=generator), torch.randint(2, (8,), generator=generator)
            position += 1


def train(hooks, max_steps, state=None, **options):
    torch.manual_seed(0)
    model = Model()
    optimizer = ft.optimizer(torch.optim.SGD, lr=ft.schedules.warmup_cosine(0.1, warmup_steps=5, total_steps=100))
    step_fn = ft.supervised_step(model, loss_fn, optimizer, **options)
    state = ft.init_state(model, optimizer, seed=0) if state is None else state
    return ft.fit(step_fn, hooks, state=state, data=Data(), max_steps=max_steps)


def evaluate_every(every, seen=None, results=None):
    def fn(state):
        if seen is not None:
            seen.append(state.step)
        return results or {"AP": float(state.step)}

    return ft.hooks.evaluate(fn, every=every)


def read_board(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    return EventAccumulator(str(directory), size_guidance=sizes).Reload()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# PeriodicWriter.


def law_periods(write_metrics):
    kept = ft.writers.memory()
    train([evaluate_every(30), write_metrics([kept], every=20)], 50)
    assert [row.step for row in kept.rows if row.periodic] == [20, 40, 50]
    last = kept.rows[-1]
    assert (last.step, last.scalars["eval/AP"]) == (50, 50.0)
    assert last.scalars["loss"] == kept["loss"].median(20)


def test_a_50_step_run_writes_at_20_40_and_50_and_after_the_final_evaluation():
    """PeriodicWriter writes every `period` iterations and after the last one; the results of an EvalHook that is listed
    before it and runs at the end too are in what it writes last."""
    law_periods(ft.hooks.write_metrics)


def test_law_periods_can_fail():
    """A writer that forgets after_train is refused."""

    def without_the_end(writers, every):
        whole = ft.hooks.write_metrics(writers, every=every)

        @contextmanager
        def opened():
            with whole.open() as live:
                yield attrs.evolve(live, after_train=None)

        return attrs.evolve(whole, open=opened)

    with pytest.raises(AssertionError):
        law_periods(without_the_end)


def test_the_default_writers_are_console_json_and_tensorboard(tmp_path, capsys):
    """default_writers: CommonMetricPrinter, JSONWriter to metrics.json, TensorboardXWriter; each has the same rows."""
    train([evaluate_every(30), ft.hooks.write_metrics(ft.writers.default(tmp_path), every=20)], 50)
    printed = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    in_file = [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert printed == in_file == [20, 30, 40, 50]
    board = read_board(tmp_path)
    assert [event.step for event in board.Scalars("loss")] == [20, 40, 50]
    assert [event.step for event in board.Scalars("eval/AP")] == [30, 50]


# EvalHook.


@pytest.mark.parametrize(
    ("max_steps", "every", "steps"),
    [(31, 15, [15, 30, 31]), (30, 15, [15, 30]), (10, 15, [10]), (0, 15, []), (3, 1, [1, 2, 3])],
)
def test_evaluation_of_31_steps_every_15_runs_three_times(max_steps, every, steps):
    """EvalHook is executed every `eval_period` iterations and after the last one, not twice when that is one of them,
    and not when nothing was trained."""
    seen, kept = [], ft.writers.memory()
    train([evaluate_every(every, seen), ft.hooks.write_metrics(kept, every=20)], max_steps)
    assert seen == steps
    if steps:
        assert kept["eval/AP"].values() == [(step, float(step)) for step in steps]


@pytest.mark.parametrize("by_hand", [True, False])
def test_nested_results_are_flattened(by_hand):
    """EvalHook's function returns a nested dict of metrics (here it takes the state); the names of all levels are joined
    with "/"."""
    results = {"bbox": {"AP": 0.5, "by_size": {"APs": 0.25}}, "loss": 1.0}
    kept = ft.writers.memory()
    if by_hand:
        evaluate = evaluate_every(2, results=results)
    else:
        evaluation = ft.evaluation(Model(), lambda model, batch: results, torch.zeros(4, 4))
        evaluate = ft.hooks.evaluate(evaluation, every=2)
    train([evaluate, ft.hooks.write_metrics(kept)], 2)
    got = {name: kept[name].latest() for name in kept if name.startswith("eval/")}
    assert got == {"eval/bbox/AP": 0.5, "eval/bbox/by_size/APs": 0.25, "eval/loss": 1.0}


@pytest.mark.parametrize("bad", ["high", None, [0.5], {"AP": "high"}, torch.zeros(2)])
def test_results_that_are_no_numbers_are_refused(bad):
    """EvalHook refuses what is no nested dict of floats; here the metric is named."""
    with pytest.raises(ValueError, match=r"evaluate: 'bbox(/AP)?' (is|has shape)"):
        train([evaluate_every(1, results={"bbox": bad})], 1)


# EventStorage and HistoryBuffer.


def test_histories_hold_exactly_the_gathered_steps():
    """EventStorage.history(name): every scalar put in an iteration is in its history with that iteration, no other;
    here those that writes have read, which are all while the window is at least the period."""
    seen, kept, late = {}, ft.writers.memory(), ft.writers.memory()
    watch = ft.hook(after_step=lambda state: seen.update({state.step: state.metrics["loss"].item()}))
    writes = [
        ft.hooks.write_metrics(kept, every=20, name="all"),
        ft.hooks.write_metrics(late, every=20, window=5, name="late"),
    ]
    train([watch, *writes], 50)
    assert kept["loss"].values() == list(seen.items()) == [(step, seen[step]) for step in range(1, 51)]
    assert late["loss"].steps == (16, 17, 18, 19, 20, 36, 37, 38, 39, 40, 46, 47, 48, 49, 50)


def test_a_history_buffer_has_latest_median_avg_global_avg_and_values():
    """HistoryBuffer: latest(), median(window_size), avg(window_size), global_avg() and values()."""
    kept = ft.writers.memory()
    train([ft.hooks.write_metrics(kept, every=20)], 50)
    loss = kept["loss"]
    assert isinstance(loss, History)
    ordered = sorted(loss.numbers[-20:])
    assert loss.latest() == loss.values()[-1][1]
    assert loss.median(20) == (ordered[9] + ordered[10]) / 2
    assert loss.average(20) == pytest.approx(sum(ordered) / 20)
    assert loss.global_average() == pytest.approx(sum(loss.numbers) / 50)


def test_the_latest_values_are_smoothed_by_the_hint():
    """latest_with_smoothing_hint: the median of 20 values where smoothing_hint is True, the latest value otherwise."""
    kept = ft.writers.memory()
    train([ft.hooks.write_metrics(kept, every=20, window=20)], 50)
    last = kept.rows[-1].scalars
    schedule = ft.schedules.warmup_cosine(0.1, warmup_steps=5, total_steps=100)
    assert last["roi_head/mean_logit"] == kept["roi_head/mean_logit"].median(20)
    assert last["roi_head/temperature"] == 0.5
    assert last["lr"] == pytest.approx(schedule(49))
    assert kept["lr"].values() == [(step, pytest.approx(schedule(step - 1))) for step in (20, 40, 50)]


def test_every_loss_and_their_sum_are_reported():
    """SimpleTrainer.write_metrics: each loss of the dict under its name, and their sum."""
    metrics = train([], 1).metrics
    assert metrics["loss"].item() == pytest.approx(metrics["loss_cls"].item() + metrics["loss_reg"].item())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sub_module_reports_under_its_name_scope(accumulate):
    """get_event_storage().put_scalar works from anywhere in the model while it trains, and name_scope prefixes what is
    put inside; micro-batches of one step combine to one value."""
    final = train([], 3, accumulate=accumulate)
    names = {name for name in final.metrics if name.startswith("roi_head/")}
    assert names == {"roi_head/mean_logit", "roi_head/temperature", "roi_head/logits"}
    alone = train([], 3).metrics["roi_head/mean_logit"]
    assert final.metrics["roi_head/mean_logit"].item() == pytest.approx(alone.item(), abs=1e-6)


def test_outside_of_a_step_there_is_no_storage():
    """get_event_storage throws an error if no EventStorage is enabled; so does put_scalar here."""
    with pytest.raises(RuntimeError, match=r"put_scalar\('x'\): called outside of a step"):
        ft.put_scalar("x", 1.0)
    with pytest.raises(RuntimeError, match=r"put_scalar\('mean_logit'\): called outside of a step"):
        Model()(torch.zeros(1, 4))


def test_images_and_histograms_reach_tensorboard(tmp_path):
    """put_image and put_histogram are shown by TensorBoard, each at the step that put it, under its scope."""
    train([ft.hooks.write_metrics(ft.writers.tensorboard(tmp_path), every=2)], 5)
    board = read_board(tmp_path)
    images, histograms = board.Images("input"), board.Histograms("roi_head/logits")
    assert [(image.step, image.width, image.height) for image in images] == [(step, 2, 2) for step in range(1, 6)]
    assert [(one.step, one.histogram_value.num) for one in histograms] == [(step, 16) for step in range(1, 6)]


# JSONWriter and CommonMetricPrinter.


def test_a_resumed_json_file_goes_on(tmp_path):
    """JSONWriter: one json object per line, appended to by a resumed run; here without the overlap, and strict."""
    path = tmp_path / "metrics.jsonl"
    hooks = [evaluate_every(15), ft.hooks.write_metrics(ft.writers.jsonl(path), every=20)]
    train(hooks, 50)
    whole = rows_of(path)
    train(hooks, 50, state=train([], 30))
    assert [row["step"] for row in rows_of(path)] == [row["step"] for row in whole] == [15, 20, 30, 40, 45, 50]
    assert [row["eval/AP"] for row in rows_of(path) if "eval/AP" in row] == [15.0, 30.0, 45.0, 50.0]


def test_the_console_line_has_what_detectron2s_has(capsys):
    """CommonMetricPrinter prints iteration time, ETA, memory, all losses, and the learning rate."""
    train([ft.hooks.iteration_timer(), ft.hooks.write_metrics(ft.writers.console(), every=20)], 60)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, step in zip(lines, (20, 40, 60), strict=True):
        assert line.startswith(f"step {step}/60  eta 0:00:0")
        assert all(
            f" {name} " in line for name in ("loss", "loss_cls", "loss_reg", "lr", "step", "data", "total", "mem")
        )


def test_eta_is_the_time_per_step_times_what_is_left(capsys, monkeypatch):
    """CommonMetricPrinter's ETA is the seconds of an iteration times those that are left; unknown after the first."""
    now = [0.0]
    monkeypatch.setattr(sys.modules["fntrain.writers.console"], "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step_fn(state, batch):
        now[0] += 100.0 if state.step == 10 else 2.0  # the first step of a run compiles and warms up
        return state.advance(metrics={"loss": 1.0})

    start = ft.TrainState(step=10, position=10, seed=0, params={})
    ft.fit(step_fn, [ft.hooks.write_metrics(ft.writers.console(), every=1)], state=start, data=Data(), max_steps=14)
    etas = [line.split("eta ")[1].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert etas == ["-:--:--", "0:00:04", "0:00:02", "0:00:00"]
