"""Writers and the hooks that feed them: what a run reports arrives, once, at its step, and costs no synchronisation."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from statistics import median

import attrs
import broken_io
import numpy as np
import pytest
import torch

import fntrain as ft
from fntrain import TrainState
from fntrain.events import Image, MetricName, Text
from fntrain.writers import process


@attrs.frozen(eq=False)
class Recorder:
    """A writer as a user would write one; remembers rows and whether it is open."""

    rows: list = attrs.field(factory=list)
    log: list = attrs.field(factory=list)

    @contextmanager
    def open(self, start_step):
        self.log.append(f"open {start_step}")
        try:
            yield self.rows.append
        finally:
            self.log.append("close")

    def seen(self, name):
        """(step, value) of one metric, in the order of writing."""
        return [(row.step, row.scalars[name]) for row in self.rows if name in row.scalars]


def fresh():
    return TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(())})


def report(**fns):
    """A step function that reports fn(step) under each name."""

    def step_fn(state, batch):
        return state.advance(metrics={name.replace("__", "/"): fn(state.step + 1) for name, fn in fns.items()})

    return step_fn


def fit(step_fn, hooks, max_steps, state=None):
    return ft.fit(step_fn, hooks, state=state or fresh(), data=Endless(), max_steps=max_steps)


class Endless:
    def at(self, position):
        while True:
            yield position
            position += 1


loss_is_step = report(loss=lambda step: torch.tensor(float(step)))


def read_tensorboard(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    return EventAccumulator(str(directory), size_guidance=sizes).Reload()


def read_as_shown(directory):
    """What the TensorBoard page shows: its reader also hides text of before a restart."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return EventAccumulator(str(directory)).Reload()


def read_scalars(directory):
    board = read_tensorboard(directory)
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def next_second():
    """Event files are named and read by the second in which they were made."""
    time.sleep(1.01 - time.time() % 1)


# write_metrics.


@pytest.mark.parametrize(
    ("max_steps", "every", "steps"),
    [(50, 20, [20, 40, 50]), (40, 20, [20, 40]), (3, 20, [3]), (0, 20, []), (2, 1, [1, 2])],
)
def test_writes_every_n_steps_and_after_the_last(max_steps, every, steps):
    """A row stands at every n-th step and at the last one, once."""
    recorder = Recorder()
    fit(loss_is_step, [ft.hooks.write_metrics(recorder, every=every)], max_steps)
    assert [row.step for row in recorder.rows] == steps
    assert all(row.max_steps == max_steps and row.periodic for row in recorder.rows)
    assert recorder.log == (["open 0", "close"] if max_steps else [])


@pytest.mark.parametrize("window", [1, 2, 5, 20, 30])
def test_shows_the_median_over_the_window(window):
    """A metric is shown as the median of its values in the last `window` steps."""
    values = [0.0, *torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()]
    recorder = Recorder()
    step_fn = report(loss=lambda step: torch.tensor(values[step], dtype=torch.float64))
    fit(step_fn, [ft.hooks.write_metrics(recorder, every=20, window=window)], 50)
    assert recorder.seen("loss") == [(s, median(values[max(s - window, 0) + 1 : s + 1])) for s in (20, 40, 50)]


def test_unsmoothed_metrics_show_the_latest():
    """put_scalar(smooth=False) and MetricName(smooth="latest") are shown as they were at the write."""

    def step_fn(state, batch):
        with ft.events.collecting() as collector:
            ft.put_scalar("raw", float(state.step + 1), smooth=False)
            ft.put_scalar("smooth", float(state.step + 1))
        metrics = {**ft.events.merge([(collector, 1.0)]), MetricName("lr", smooth="latest"): 0.5 / (state.step + 1)}
        return state.advance(metrics=metrics)

    recorder = Recorder()
    fit(step_fn, [ft.hooks.write_metrics(recorder, every=4, window=4)], 8)
    assert recorder.seen("raw") == [(4, 4.0), (8, 8.0)]
    assert recorder.seen("smooth") == [(4, 2.5), (8, 6.5)]
    assert recorder.seen("lr") == [(4, 0.125), (8, 0.0625)]


def test_a_metric_that_comes_now_and_then_is_not_repeated():
    """A metric is written only for periods in which it was reported, from the values of the window."""

    def step_fn(state, batch):
        step = state.step + 1
        return state.advance(metrics={"loss": 1.0, **({"rare": float(step)} if step in (3, 17) else {})})

    recorder = Recorder()
    fit(step_fn, [ft.hooks.write_metrics(recorder, every=5, window=5)], 25)
    assert recorder.seen("rare") == [(5, 3.0), (20, 17.0)]


@pytest.mark.parametrize(
    "order", [(5.0, math.nan, 1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 5.0, math.nan), (math.nan, 5, 3, 2, 1)]
)
def test_the_median_does_not_depend_on_where_a_nan_stands(order):
    """One nan in a window gives the same median wherever it stands in it."""
    seen = []
    for values in (order, sorted(order, key=lambda value: (math.isnan(value), value))):
        recorder = Recorder()
        fit(report(loss=lambda step, values=values: values[step - 1]), [ft.hooks.write_metrics(recorder, every=5)], 5)
        seen.append(str(recorder.seen("loss")))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("every", "window"), [(0, 20), (-1, 20), (2.5, 20), (True, 20), (20, 0), (20, -3), (20, "a")])
def test_periods_must_be_positive(every, window):
    """A period or window that is no whole positive number is refused by name when built."""
    with pytest.raises(ValueError, match="every: got" if window == 20 else "window: got"):
        ft.hooks.write_metrics(Recorder(), every=every, window=window)


@pytest.mark.parametrize("writers", ["runs/digits", [print], None])
def test_what_is_no_writer_is_refused_when_built(writers):
    """A path or function in place of a writer is a TypeError that says what a writer is."""
    with pytest.raises(TypeError, match="writers: got"):
        ft.hooks.write_metrics(writers)


# evaluate.


def law_nothing_lost(evaluate, max_steps, every, write_every):
    """Every result is written at its own step, once."""
    recorder = Recorder()
    evaluated = []
    hook = evaluate(lambda state: evaluated.append(state.step) or {"n": float(state.step)}, every=every)
    fit(loss_is_step, [hook, ft.hooks.write_metrics(recorder, every=write_every)], max_steps)
    assert evaluated == sorted({*range(every, max_steps + 1, every), max_steps})
    assert recorder.seen("eval/n") == [(step, float(step)) for step in evaluated]
    assert [step for step, _ in recorder.seen("loss")] == sorted(
        {*range(write_every, max_steps + 1, write_every), max_steps}
    )
    return recorder


@pytest.mark.parametrize(
    ("max_steps", "every", "write_every"), [(50, 15, 20), (60, 20, 20), (50, 7, 20), (50, 30, 5), (9, 50, 20)]
)
def test_no_evaluation_is_lost_or_written_twice(max_steps, every, write_every):
    """Results of evaluate appear at their own steps whatever the two periods are."""
    law_nothing_lost(ft.hooks.evaluate, max_steps, every, write_every)


def test_law_nothing_lost_can_fail():
    """Results reported as an ordinary metric are refused."""
    with pytest.raises(AssertionError):
        law_nothing_lost(broken_io.evaluate_as_latest, 50, 15, 20)


@pytest.mark.parametrize(
    ("max_steps", "every", "write_every"), [(50, 15, 20), (40, 15, 20), (60, 15, 20), (40, 20, 20)]
)
def test_a_step_has_one_row(max_steps, every, write_every):
    """Periodic metrics and results of one step share its row, also at the last step."""
    recorder = law_nothing_lost(ft.hooks.evaluate, max_steps, every, write_every)
    steps = [row.step for row in recorder.rows]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float64(0.5), np.float32(0.5), np.int64(3), torch.tensor(2), torch.tensor([0.5])]
)
def test_numbers_of_any_kind_arrive_from_evaluate(value):
    """A hand-written evaluation may return Python, NumPy and torch numbers."""
    recorder = Recorder()
    fit(loss_is_step, [ft.hooks.evaluate(lambda state: {"x": value}, every=2), ft.hooks.write_metrics(recorder)], 2)
    assert recorder.seen("eval/x") == [(2, float(value))]


def test_evaluate_names_its_results_and_refuses_others():
    """prefix names the results; a function that returns no dict, or is none, is named in the error."""
    hook = ft.hooks.evaluate(lambda state: {"n": 1.0}, every=1, prefix="test/")
    assert set(fit(loss_is_step, [hook], 1).metrics) == {"loss", "test/n"}
    with pytest.raises(TypeError, match="evaluate: the function returned float"):
        fit(loss_is_step, [ft.hooks.evaluate(lambda state: 0.5, every=1)], 1)
    with pytest.raises(TypeError, match="fn: got dict"):
        ft.hooks.evaluate({}, every=1)
    with pytest.raises(ValueError, match="every"):
        ft.hooks.evaluate(print, every=0)


# Cost.


@contextmanager
def transfers(monkeypatch):
    """Count what brings a tensor's value to the host."""
    counted = Counter()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu"):
            original = getattr(torch.Tensor, name)

            def call(self, *args, original=original, name=name, **kwargs):
                counted[name] += 1
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, call)
        yield counted


def law_no_transfer(hooks_for, monkeypatch):
    metrics = {
        "loss": torch.tensor(1.0),
        "error": torch.tensor(2.0),
        "half": torch.tensor(1.0, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        MetricName("lr", smooth="latest"): torch.tensor(0.1),
    }
    rows, before = [], []
    monkeypatch.setattr("fntrain.hooks.series.stalls", lambda tensor: True)  # as on a GPU
    with transfers(monkeypatch) as counted:

        def step_fn(state, batch):
            before.append(sum(counted.values()))
            return state.advance(metrics=dict(metrics))

        fit(step_fn, hooks_for(rows), 12)
    # Writes after 5, 10 and 12 steps, one transfer for each of three dtypes.
    assert before == [0] * 5 + [3] * 5 + [6] * 2
    assert sum(counted.values()) == 9
    assert len(rows) == 3


def test_nothing_is_transferred_between_writes(monkeypatch):
    """Between writes no value of a tensor is asked for; a write takes one transfer for each dtype."""
    timer = ft.hooks.iteration_timer()
    law_no_transfer(lambda rows: [timer, ft.hooks.write_metrics(Recorder(rows), every=5)], monkeypatch)
    with pytest.raises(AssertionError, match="before|At index 1"):
        law_no_transfer(lambda rows: [broken_io.eager_metrics(rows.append, 5)], monkeypatch)


# The writers.


def number_after(name, line):
    """What a console line says of a metric."""
    return float(line.split(f" {name} ")[1].split()[0])


def test_console_prints_one_line_per_write(capsys):
    """The line shows step, eta, losses, other metrics, times and memory, in that order."""
    step_fn = report(
        accuracy=lambda step: 0.5, lr=lambda step: 1e-5, loss_box=lambda step: 2.0, loss=lambda step: torch.tensor(1.25)
    )
    fit(step_fn, [ft.hooks.iteration_timer(), ft.hooks.write_metrics(ft.writers.console(), every=5)], 100)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert len(lines) == 20
    assert lines[0].startswith("step   5/100  eta 0:00:0")
    assert lines[-1].startswith("step 100/100  eta 0:00:00")
    names = [" eta ", " loss ", " loss_box ", " accuracy ", " lr ", " mem "]
    for line in lines:
        assert [line.count(name) for name in names] == [1] * 6
        assert [line.index(name) for name in names] == sorted(line.index(name) for name in names)
        assert line.index(" lr ") < line.index(" data ") < line.index(" mem ")
    assert [number_after(name, lines[0]) for name in ("loss", "loss_box", "accuracy", "lr")] == [1.25, 2, 0.5, 1e-5]
    assert lines[0].endswith("MiB")


def test_console_shows_the_peak_of_this_process(capsys, monkeypatch, tmp_path):
    """Fault of before: `ru_maxrss` was shown, which a rank inherits from the program that started it."""
    monkeypatch.setattr(process, "STATUS", tmp_path / "status")
    for text, shown in (("VmHWM:\t 3072 kB\nVmRSS:\t 2048 kB\n", "mem 3 MiB"), ("VmRSS:\t 2048 kB\n", "mem 2 MiB")):
        process.STATUS.write_text(text)
        fit(report(loss=lambda step: 1.0), [ft.hooks.write_metrics(ft.writers.console(), every=1)], 1)
        assert capsys.readouterr().out.strip().endswith(shown)


@pytest.mark.skipif(not process.STATUS.exists(), reason="other systems tell only what is inherited")
def test_the_peak_of_a_process_is_not_that_of_its_parent():
    """The parent takes 256 MiB and starts a small child, by fork and exec."""
    child = f"import runpy; print(max(runpy.run_path({process.__file__!r})['process_memory']().values()))"
    parent = (
        f"import subprocess, sys; held = b'x' * 2**28; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    told = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout
    assert 0 < int(told) < 2**27


def test_console_columns_stay_in_place(capsys):
    """Lines with the same metrics have every name at the same column, whatever the numbers."""
    values = [0.25, 1.0, 12.5, 1e-5, 0.0]
    step_fn = report(accuracy=lambda step: values[step - 1], loss=lambda step: -values[step - 1])
    fit(step_fn, [ft.hooks.write_metrics(ft.writers.console(), every=1, window=1)], 5)
    lines = capsys.readouterr().out.splitlines()
    assert len({(line.index("loss"), line.index("accuracy"), line.index("mem")) for line in lines}) == 1


def test_console_has_no_line_for_media_alone(capsys):
    """A picture at a step without numbers prints nothing."""
    step_fn = report(loss=lambda step: 1.0, picture=lambda step: Image(torch.zeros(1, 2, 2)))
    fit(step_fn, [ft.hooks.write_metrics(ft.writers.console(), every=2)], 4)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 1e9, -1e-9, 3])
def test_console_prints_any_number(capsys, value):
    """nan, inf and numbers of any size have a place in the line."""
    fit(report(loss=lambda step: value), [ft.hooks.write_metrics(ft.writers.console())], 1)
    assert str(number_after("loss", capsys.readouterr().out)) == str(float(value))


def test_console_without_max_steps_prints_no_eta(capsys):
    """For data of unknown length the line has a step and no estimate."""
    ft.fit(loss_is_step, [ft.hooks.write_metrics(ft.writers.console())], state=fresh(), data=[1, 2, 3])
    out = capsys.readouterr().out
    assert out.startswith("step 3  loss ")
    assert number_after("loss", out) == 2
    assert "eta" not in out


def test_jsonl_has_one_object_per_row(tmp_path):
    """Every row is a line with its step and scalars; nan and inf are null, media are left out."""
    step_fn = report(
        loss=lambda step: torch.tensor(math.nan if step < 3 else 0.5),
        big=lambda step: math.inf,
        note=lambda step: Text("hello"),
    )
    path = tmp_path / "new" / "directory" / "metrics.jsonl"
    fit(step_fn, [ft.hooks.write_metrics(ft.writers.jsonl(path), every=2, window=1)], 3)
    assert read_jsonl(path) == [{"step": 2, "loss": None, "big": None}, {"step": 3, "loss": 0.5, "big": None}]


def test_tensorboard_reads_back(tmp_path):
    """Scalars, images, histograms, text and hyperparameters are found by TensorBoard's own reader."""

    def step_fn(state, batch):
        with ft.events.collecting() as collector:
            ft.put_image("digit", torch.full((1, 8, 8), 0.5))
            ft.put_histogram("weights", torch.arange(10, dtype=torch.bfloat16))
            ft.put_text("sample", f"text of step {state.step + 1}")
            ft.put_scalar("loss", float(state.step + 1))
        return state.advance(metrics=ft.events.merge([(collector, 1.0)]))

    writer = ft.writers.tensorboard(tmp_path, hparams={"lr": 0.25, "name": "small"})
    fit(step_fn, [ft.hooks.write_metrics(writer, every=2, window=1)], 4)
    board = read_tensorboard(tmp_path)
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(2, 2.0), (4, 4.0)]
    images = board.Images("digit")
    assert {(image.step, image.width, image.height) for image in images} == {(step, 8, 8) for step in (1, 2, 3, 4)}
    assert [histogram.step for histogram in board.Histograms("weights")] == [1, 2, 3, 4]
    assert board.Histograms("weights")[0].histogram_value.num == 10
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors("sample/text_summary")}
    assert texts == {step: f"text of step {step}" for step in (1, 2, 3, 4)}
    assert "_hparams_/session_start_info" in board.summary_metadata
    [hparams] = board.Tensors("hparams/text_summary")
    assert b"| lr | 0.25 |" in hparams.tensor_proto.string_val[0]


def test_tensorboard_refuses_what_it_cannot_show(tmp_path):
    """A metric that is no number and no medium is named."""
    with pytest.raises(TypeError, match=r"metrics\['odd'\]: got str"):
        fit(report(odd=lambda step: "text"), [ft.hooks.write_metrics(ft.writers.tensorboard(tmp_path))], 1)


def test_default_writers_share_a_directory(tmp_path, capsys):
    """The default is console, jsonl and TensorBoard with the same rows."""
    fit(loss_is_step, [ft.hooks.write_metrics(ft.writers.default(tmp_path), every=2, window=1)], 4)
    assert read_scalars(tmp_path)["loss"] == [(2, 2.0), (4, 4.0)]
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 4.0}]
    assert len(capsys.readouterr().out.splitlines()) == 2


# Resume.


class Killed(BaseException):
    """Ends a run as a kill does: see `killed`."""


def killed(step_fn, at):
    """The step function that dies at a step."""

    def dying(state, batch):
        if state.step + 1 == at:
            raise Killed
        return step_fn(state, batch)

    return dying


def interrupted(writers, directory, *, dies_at, max_steps=50, evaluate=None):
    """A run that is killed and resumed; what the first left open or would still write when closed is undone."""

    def hooks():
        return [
            *([evaluate] if evaluate else []),
            ft.hooks.write_metrics(writers, every=20),
            ft.hooks.checkpoint(directory / "checkpoints", every=15, asynchronous=False),  # looked at below
        ]

    start = fresh()
    left = {}

    def first_run():
        resumed = ft.resume_or(start, directory / "checkpoints")
        for state in ft.states(killed(loss_is_step, dies_at), hooks(), state=resumed, data=Endless()):
            if state.step == dies_at - 1:
                left.update({path: path.read_bytes() for path in directory.rglob("*") if path.is_file()})

    with pytest.raises(Killed):
        first_run()
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        if path in left:
            path.write_bytes(left[path])  # a killed process closes nothing and writes no last row
        else:
            path.unlink()
    return fit(loss_is_step, hooks(), max_steps, state=ft.resume_or(start, directory / "checkpoints"))


def law_once_jsonl(writer, directory, dies_at):
    path = directory / "metrics.jsonl"
    interrupted(writer(path), directory, dies_at=dies_at)
    assert [row["step"] for row in read_jsonl(path)] == [20, 40, 50]


@pytest.mark.parametrize("dies_at", [10, 16, 25, 35, 42, 46])
def test_no_step_appears_twice_in_jsonl_after_a_kill(tmp_path, dies_at):
    """Wherever the kill was, between checkpoint and writes or before both, every row is there once."""
    law_once_jsonl(ft.writers.jsonl, tmp_path, dies_at)


def test_law_once_jsonl_can_fail(tmp_path):
    """Appending without looking is refused."""
    with pytest.raises(AssertionError):
        law_once_jsonl(lambda path: broken_io.AppendingJsonl(str(path)), tmp_path, 42)


def law_once_tensorboard(writer, directory, dies_at):
    next_second()

    class Slow:
        """Puts the second file into a later second than the first."""

        @contextmanager
        def open(self, start_step):
            next_second()
            yield lambda row: None

    interrupted([Slow(), writer(directory / "board")], directory, dies_at=dies_at)
    assert [step for step, _ in read_scalars(directory / "board")["loss"]] == [20, 40, 50]


@pytest.mark.parametrize("dies_at", [42, 46])
def test_no_step_appears_twice_in_tensorboard_after_a_kill(tmp_path, dies_at):
    """TensorBoard's reader sees every step once after a run was killed and resumed."""
    law_once_tensorboard(ft.writers.tensorboard, tmp_path, dies_at)


def test_law_once_tensorboard_can_fail(tmp_path):
    """A second event file that hides nothing of the first is refused."""
    with pytest.raises(AssertionError):
        law_once_tensorboard(lambda path: broken_io.UnpurgedTensorBoard(str(path)), tmp_path, 42)


def test_a_run_killed_before_its_first_checkpoint_leaves_no_overlap(tmp_path):
    """Started again from step 0, neither log shows what the first attempt wrote."""
    writers = ft.writers.tensorboard(tmp_path, hparams={"lr": 1}), ft.writers.jsonl(tmp_path / "metrics.jsonl")
    hook = ft.hooks.write_metrics(writers, every=2, window=1)
    next_second()
    fit(loss_is_step, [hook], 6)
    next_second()
    fit(loss_is_step, [hook], 4)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [2, 4]
    assert [step for step, _ in read_scalars(tmp_path)["loss"]] == [2, 4]
    assert len(read_as_shown(tmp_path).Tensors("hparams/text_summary")) == 1


@pytest.mark.parametrize("dies_at", [10, 25, 31, 35, 42, 46])
def test_no_evaluation_is_lost_by_a_kill(tmp_path, dies_at):
    """A result of before the checkpoint that is resumed is in the log, whatever the periods are."""
    path = tmp_path / "metrics.jsonl"
    evaluate = ft.hooks.evaluate(lambda state: {"n": float(state.step)}, every=7)
    interrupted(ft.writers.jsonl(path), tmp_path, dies_at=dies_at, evaluate=evaluate)
    got = [(row["step"], row["eval/n"]) for row in read_jsonl(path) if "eval/n" in row]
    assert got == [(step, float(step)) for step in (7, 14, 21, 28, 35, 42, 49, 50)]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{"step": 6, "lo', [2, 4]),
        ('{"step": 6', [2, 4]),
        ("{", [2, 4]),
        ("\x00\x00\x00", [2, 4]),
        ('{"step": 5, "loss": 1.0}', [2, 4, 5]),
        ('{"step": 9, "loss": 1.0}', [2, 4]),
        ("", [2, 4]),
        ("[1]\n", [2, 4]),
    ],
)
def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path, tail, kept):
    """After a resume every line of the file is one whole row, also when the cut was just before the line's end."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n' + tail)
    start = fresh().replace(step=5, position=5)
    fit(loss_is_step, [ft.hooks.write_metrics(ft.writers.jsonl(path), every=2)], 8, state=start)
    assert [row["step"] for row in read_jsonl(path)] == [*kept, 6, 8]
    assert path.read_text().endswith("}\n")


def test_a_log_that_is_no_text_is_not_an_obstacle(tmp_path):
    """Broken bytes at the end of a log do not keep a run from starting."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n\xff\xfe\x80')
    fit(loss_is_step, [ft.hooks.write_metrics(ft.writers.jsonl(path))], 6, state=fresh().replace(step=5, position=5))
    assert [row["step"] for row in read_jsonl(path)] == [2, 6]


# Closing.


@pytest.mark.parametrize("dies_at", [1, 7, 25])
def test_writers_are_closed_when_a_step_raises(dies_at):
    """What was reported before the error is written, and every writer is closed."""
    recorder, second = Recorder(), Recorder()
    with pytest.raises(Killed):
        fit(killed(loss_is_step, dies_at), [ft.hooks.write_metrics([recorder, second], every=20, window=1)], 50)
    assert recorder.log == second.log == (["open 0", "close"] if dies_at > 1 else [])
    steps = [step for step in (20, dies_at - 1) if 0 < step < dies_at]
    assert recorder.seen("loss") == [(step, float(step)) for step in dict.fromkeys(steps)]


def test_writers_are_closed_when_the_loop_is_left_early_or_a_writer_fails():
    """break out of states, and a second writer that can't open or write, close the others."""
    recorder = Recorder()
    for _ in ft.states(loss_is_step, [ft.hooks.write_metrics(recorder)], state=fresh(), data=Endless()):
        break
    assert recorder.log == ["open 0", "close"]

    class Unopenable:
        def open(self, start_step):
            raise OSError("no space")

    class Unwritable:
        @contextmanager
        def open(self, start_step):
            def write(row):
                raise OSError("no space")

            yield write

    for bad in (Unopenable(), Unwritable()):
        recorder = Recorder()
        with pytest.raises(OSError, match="no space"):
            fit(loss_is_step, [ft.hooks.write_metrics([recorder, bad], every=2)], 4)
        assert recorder.log == ["open 0", "close"]


def test_a_custom_writer_gets_rows_with_media():
    """A record with `open` is a writer: it gets step, scalars and media of every row, and the step of the start."""
    recorder = Recorder()
    step_fn = report(loss=lambda step: 1.0, picture=lambda step: Image(torch.zeros(1, 2, 2)))
    fit(step_fn, [ft.hooks.write_metrics(recorder, every=2)], 6, state=fresh().replace(step=4, position=4))
    assert recorder.log == ["open 4", "close"]
    assert [(row.step, dict(row.scalars), list(row.media)) for row in recorder.rows] == [
        (5, {}, ["picture"]),
        (6, {"loss": 1.0}, ["picture"]),
    ]


# progress_bar and iteration_timer.


def test_progress_bar_counts_the_steps(capsys):
    """The bar ends at max_steps, also when the run was resumed."""
    fit(loss_is_step, [ft.hooks.progress_bar()], 8, state=fresh().replace(step=5, position=5))
    err = capsys.readouterr().err
    assert "8/8" in err
    assert "100%" in err


def test_progress_bar_names_the_missing_extra(monkeypatch):
    """Without tqdm the error says what to install, when the run starts."""
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    hook = ft.hooks.progress_bar()
    with pytest.raises(ft.MissingExtraError, match=r"fntrain\[cli\]"):
        fit(loss_is_step, [hook], 1)


class Sleepy:
    """Data that takes its time."""

    def __init__(self, seconds):
        self.seconds = seconds

    def at(self, position):
        while True:
            time.sleep(self.seconds)
            yield position


@pytest.mark.parametrize("slow", ["data", "step", "hook"])
def test_time_is_billed_to_who_takes_it(slow):
    """A slow hook is billed neither to data nor to the step, and the total has all three."""
    long = 0.03

    def step_fn(state, batch):
        time.sleep(long * (slow == "step"))
        return state.advance(metrics={})

    seen = []
    hooks = [
        ft.hooks.iteration_timer(),
        ft.hook(after_step=lambda state: time.sleep(long * (slow == "hook"))),
        ft.hook(after_step=lambda state: seen.append(dict(state.metrics))),
    ]
    ft.fit(step_fn, hooks, state=fresh(), data=Sleepy(long * (slow == "data")), max_steps=6)
    middle = {name: median(float(one[name]) for one in seen[1:]) for name in seen[0]}
    assert set(middle) == {"time/step", "time/data", "time/total"}
    for part in ("data", "step"):
        share = middle[f"time/{part}"] / middle["time/total"]
        assert share > 0.7 if part == slow else share < 0.3


def test_a_refused_start_leaves_the_logs_alone(tmp_path):
    """A run that forgot resume_or is refused by its checkpoints; the rows of the good run stay."""

    def hooks():
        writer = ft.writers.jsonl(tmp_path / "metrics.jsonl")
        return [ft.hooks.write_metrics(writer, every=1), ft.hooks.checkpoint(tmp_path, every=5)]

    fit(loss_is_step, hooks(), 10)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ft.CheckpointError, match="is of a later step"):
        fit(loss_is_step, hooks(), 10)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_skipped_updates_are_counted_per_period():
    """One bad step in a period shows as 1, not as a median of 0."""
    skipped = ft.events.MetricName("skipped", smooth="sum")
    recorder = Recorder()
    step_fn = lambda state, batch: state.advance(metrics={skipped: float(state.step in (2, 9, 10))})  # noqa: E731
    fit(step_fn, [ft.hooks.write_metrics(recorder, every=8)], 16)
    assert [row.scalars["skipped"] for row in recorder.rows] == [1.0, 2.0]


def test_a_roll_back_takes_its_measurements_along():
    """What was measured in steps that were rolled back is in no median any more."""
    recorder, kept = Recorder(), {}

    def back(state):
        kept.setdefault(state.step, state)
        return kept[2].replace(position=state.position) if state.position == 5 else None

    step_fn = lambda state, batch: state.advance(metrics={"loss": float("nan") if state.position == 4 else 1.0})  # noqa: E731
    fit(step_fn, [ft.hook(after_step=back), ft.hooks.write_metrics(recorder, every=4)], 8)
    assert [(row.step, row.scalars["loss"]) for row in recorder.rows][-2:] == [(4, 1.0), (8, 1.0)]


def test_the_last_row_after_a_roll_back_has_no_abandoned_steps():
    """Going back to the state of step 5 and stopping writes what was measured up to step 5."""
    recorder, kept = Recorder(), {}
    count = ft.events.MetricName("n", smooth="sum")

    def back(state):
        kept.setdefault(state.step, state)
        return ft.stop(kept[5], "best") if state.step == 9 else None

    step_fn = lambda state, batch: state.advance(metrics={"loss": float(state.step + 1), count: 1.0})  # noqa: E731
    fit(step_fn, [ft.hooks.write_metrics(recorder, every=100), ft.hook(after_step=back)], 50)
    assert [(row.step, dict(row.scalars)) for row in recorder.rows] == [(5, {"loss": 3.0, "n": 5.0})]


def test_the_latest_value_is_written_however_long_ago():
    """An unsmoothed value reported once in a long period is in the row of that period."""
    recorder, latest = Recorder(), ft.events.MetricName("x", smooth="latest")
    step_fn = lambda state, batch: state.advance(metrics={latest: 7.0} if state.step == 24 else {"loss": 1.0})  # noqa: E731
    fit(step_fn, [ft.hooks.write_metrics(recorder, every=50, window=20)], 50)
    assert recorder.rows[-1].scalars["x"] == 7.0
