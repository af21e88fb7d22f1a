"""Hooks that look at what a run costs: memory in the metrics, and traces of chosen steps."""

import gzip
import json
import logging
import pickle
import re
import shutil
import sys
import weakref
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

import fntrain as ft
from fntrain.hooks import memory
from fntrain.writers import process

MIB = 2**20


def fresh(**changes):
    return ft.TrainState(**{"step": 0, "position": 0, "seed": 0, "params": {"w": torch.zeros(())}} | changes)


def marked(kind, number):
    with record_function(f"{kind} {number}"):
        torch.ones(2).add_(1)


class Marking:
    """Data that leave a mark in a trace for every batch; `end` says how many there are, `broken` which can't be read."""

    def __init__(self, end=1000, broken=None):
        self.end, self.broken = end, broken

    def at(self, position):
        for number in range(position, self.end):
            marked("read", number + 1)
            if number == self.broken:
                raise OSError("disk gone")
            yield number


def step_fn(state, batch):
    marked("step", state.step + 1)
    return state.advance(params={"w": state.params["w"] + batch}, metrics={"loss": 1.0})


marking = ft.hook(
    before_step=lambda state: marked("before", state.step + 1), after_step=lambda state: marked("after", state.step)
)


def fit(hooks, max_steps, *, step=step_fn, state=None, data=None):
    return ft.fit(step, hooks, state=state or fresh(), data=data or Marking(), max_steps=max_steps)


def two_to_three(state):
    return 2 <= state.step <= 3


def read(path):
    content = path.read_bytes()
    return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)


def traces(directory):
    """The marks in every trace of a directory, by file name, in the order of time."""
    found = {}
    for path in sorted(directory.glob("*")):
        events = [event for event in read(path)["traceEvents"] if event.get("cat") == "user_annotation"]
        names = [event["name"] for event in sorted(events, key=lambda event: event["ts"])]
        found[path.name] = [name for name in names if re.match(r"(read|before|step|after) |ProfilerStep#", name)]
    assert not torch._C._autograd._profiler_enabled()
    return found


def spans(directory):
    """The steps in every trace of a directory."""
    return [[int(name[13:]) for name in marks if name[0] == "P"] for marks in traces(directory).values()]


# memory_stats.


@pytest.mark.parametrize(("every", "max_steps", "steps"), [(2, 5, [2, 4, 5]), (1, 2, [1, 2]), (20, 3, [3])])
def test_memory_reaches_the_metrics_file(tmp_path, every, max_steps, steps):
    """It is reported every n steps and after the last, and write_metrics, listed later, writes it."""
    path = tmp_path / "metrics.jsonl"
    fit([ft.hooks.memory_stats(every=every), ft.hooks.write_metrics(ft.writers.jsonl(path), every=1)], max_steps)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if "memory/peak_rss" in row] == steps
    assert [row["step"] for row in rows] == list(range(1, max_steps + 1))


def test_memory_must_be_listed_before_what_writes_it():
    """Listed after write_metrics it would not be seen: refused."""
    with pytest.raises(ValueError, match="'memory_stats' reports metrics and is listed after 'write_metrics'"):
        fit([ft.hooks.write_metrics(()), ft.hooks.memory_stats()], 1)


@pytest.mark.skipif(not process.STATUS.exists(), reason="only Linux tells the memory in use now")
def test_memory_of_the_process_is_in_bytes():
    """A tensor of 64 MiB is seen while it lives; in the peak it stays."""
    held = []

    def take_and_drop(state, batch):
        held.append(torch.ones(16 * MIB)) if state.step == 1 else held.clear()
        return state.advance(metrics={})

    seen = []
    looking = ft.hook(after_step=lambda state: seen.append(dict(state.metrics)))
    fit([ft.hooks.memory_stats(every=1), looking], 3, step=take_and_drop)
    now, peak = ([row[f"memory/{name}"] for row in seen] for name in ("rss", "peak_rss"))
    assert 60 * MIB < now[1] - now[0] < 80 * MIB
    assert now[2] < now[1] - 60 * MIB
    assert min(peak[1:]) > now[1] - MIB  # the kernel's counts differ by some pages
    assert all(name.smooth == "latest" for name in seen[0])


def test_memory_is_what_the_kernel_says(monkeypatch, tmp_path):
    """Its kB are KiB; a kernel without one of the two numbers (sandboxes) leaves it out."""
    monkeypatch.setattr(process, "STATUS", tmp_path / "status")
    expected = {"memory/peak_rss": 3 * MIB, "memory/rss": 2 * MIB}
    for text in ("Name:\tVmRSS\nVmHWM:\t    3072 kB\nVmRSS:\t    2048 kB\n", "VmRSS:\t 2048 kB\n"):
        process.STATUS.write_text(text)
        assert dict(fit([ft.hooks.memory_stats()], 1).metrics) == {"loss": 1.0, **expected}
        expected.pop("memory/peak_rss", None)


def test_memory_without_linux(monkeypatch, tmp_path):
    """Elsewhere the peak alone is told, in KiB by most and in bytes by macOS; Windows is an error before step 1."""
    monkeypatch.setattr(process, "STATUS", tmp_path / "none")
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=2048))
    monkeypatch.setitem(sys.modules, "resource", usage)
    for platform, peak in (("freebsd", 2 * MIB), ("darwin", 2048)):
        monkeypatch.setattr(sys, "platform", platform)
        assert dict(fit([ft.hooks.memory_stats()], 1).metrics) == {"loss": 1.0, "memory/peak_rss": peak}
    monkeypatch.setitem(sys.modules, "resource", None)
    called = []
    with pytest.raises(RuntimeError, match="memory_stats: this platform tells no memory"):
        fit([ft.hooks.memory_stats()], 1, step=lambda state, batch: called.append(batch))
    assert not called


class Allocator:
    """Counts as CUDA's does: what is in use now, and the most since the last reset."""

    def __init__(self):
        self.now = self.peak = 7000  # the model

    def use(self, number):
        self.now += number
        self.peak = max(self.peak, self.now)

    def stats(self, device):
        assert device == "cuda:1"
        counts = {"allocated_bytes.all.current": self.now, "allocated_bytes.all.peak": self.peak}
        return counts | {"reserved_bytes.all.current": 10000, "num_alloc_retries": 2, "num_ooms": 1}

    def reset(self, device):
        assert device == "cuda:1"
        self.peak = self.now


def law_peaks_are_of_their_period(monkeypatch, hook):
    """Every report has the peak since the one before, and the first one that since the start of the run."""
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "memory_stats", allocator.stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset)
    allocator.use(5000)
    allocator.use(-6000)

    def borrow(state, batch):
        allocator.use([100, 300, 200, 150][state.step])
        allocator.use([-100, -300, -190, -160][state.step])
        return state.advance(metrics={})

    seen = []
    looking = ft.hook(after_step=lambda state: seen.append(dict(state.metrics)))
    on_gpu = fresh(params={"b": torch.zeros(()), "w": SimpleNamespace(is_cuda=True, device="cuda:1")})
    fit([hook, looking], 4, step=borrow, state=on_gpu)
    assert [row.get("memory/peak_allocated") for row in seen] == [None, 6300, None, 6200]
    assert [row.get("memory/allocated") for row in seen] == [None, 6000, None, 6000]
    others = {"memory/reserved": 10000, "memory/alloc_retries": 2, "memory/ooms": 1}
    assert others.items() <= seen[1].items() and len(seen[1]) == 5


def test_cuda_memory_is_of_the_device_of_the_parameters(monkeypatch):
    """Counters of CUDA take the place of the process's, and peaks start over at every report."""
    law_peaks_are_of_their_period(monkeypatch, ft.hooks.memory_stats(every=2))


@pytest.mark.parametrize("lost", ["before_train", "reset"])
def test_law_of_peaks_can_fail(monkeypatch, lost):
    """A hook that does not start over, at the start or at reports, is refused."""
    good = ft.hooks.memory_stats(every=2)

    def without_reset(state):
        stats = torch.cuda.memory_stats("cuda:1")
        return state.replace(metrics={name: stats[key] for name, key in memory.CUDA.items()})

    broken = {"before_train": {"before_train": None}, "reset": {"after_step": without_reset}}[lost]
    first, second = {"before_train": (12000, 6200), "reset": (6300, 6300)}[lost]
    with pytest.raises(AssertionError, match=rf"\[None, {first}, None, {second}\] == \[None, 6300, None, 6200\]"):
        law_peaks_are_of_their_period(monkeypatch, ft.every(2, attrs.evolve(good, **broken)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_is_what_torch_says():
    """On a GPU a temporary of 64 MiB is in the peak of its period, and in no other; the trace has its kernel."""

    def with_temporary(state, batch):
        if state.step == 1:
            torch.ones(16 * MIB, device="cuda").add_(1)
        return state.advance(metrics={})

    seen = []
    looking = ft.hook(after_step=lambda state: seen.append(dict(state.metrics)))
    state = fresh(params={"w": torch.zeros(MIB, device="cuda")})
    fit([ft.hooks.memory_stats(every=1), looking], 3, step=with_temporary, state=state)
    allocated, peak = ([row[f"memory/{name}"] for row in seen] for name in ("allocated", "peak_allocated"))
    assert allocated == [torch.cuda.memory_allocated()] * 3
    assert [high - low for high, low in zip(peak, allocated, strict=True)] == [0, 64 * MIB, 0]
    assert seen[2]["memory/reserved"] == torch.cuda.memory_reserved()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trace_of_a_gpu_has_its_kernels(tmp_path):
    """By default a trace covers CUDA where there is a device."""

    def on_gpu(state, batch):
        return state.advance(params={"w": state.params["w"] * 2}, metrics={})

    start = fresh(params={"w": torch.zeros(MIB, device="cuda")})
    fit([ft.hooks.profile(tmp_path, when=two_to_three, top_ops=3)], 4, step=on_gpu, state=start)
    (path,) = tmp_path.iterdir()
    assert sum(event.get("cat") == "kernel" for event in read(path)["traceEvents"]) >= 2


# profile.


def law_trace_holds_its_steps(tmp_path, profile):
    """A trace has, of every step, the reading of its batch, the hooks before it, and the step; nothing of others."""
    fit([profile(tmp_path, when=two_to_three), marking], 5)
    of_2 = ["ProfilerStep#2", "read 2", "before 2", "step 2"]
    of_3 = ["ProfilerStep#3", "read 3", "before 3", "step 3"]
    assert traces(tmp_path) == {"trace_step.00000002.pt.trace.json": [*of_2, "after 2", *of_3]}
    events = {event["name"]: event for event in read(next(tmp_path.iterdir()))["traceEvents"] if "dur" in event}
    ends = {name: event["ts"] + event["dur"] for name, event in events.items()}
    assert ends["step 2"] <= ends["ProfilerStep#2"] <= events["after 2"]["ts"]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # of torch 2.11
def test_a_trace_holds_its_steps_from_batch_to_update(tmp_path):
    """The predicate gets the number that gates count, and the stretch is one trace named by its first step."""
    law_trace_holds_its_steps(tmp_path, ft.hooks.profile)


def naive_profile(directory, when):
    """A hook that starts in before_step, as one would write it."""
    kept = []

    def before_step(state):
        if when(state.replace(step=state.step + 1)) and not kept:
            kept.append(torch.profiler.profile())
            kept[0].start()

    def after_step(state):
        if kept and not when(state.replace(step=state.step + 1)):
            kept[0].stop()
            kept.pop().export_chrome_trace(str(directory / "trace_step.00000002.pt.trace.json"))

    return ft.hook(before_step=before_step, after_step=after_step)


def test_law_of_traces_can_fail(tmp_path):
    """A profiler started in before_step misses the reading of the first batch: refused."""
    with pytest.raises(AssertionError, match="read 2"):
        law_trace_holds_its_steps(tmp_path, naive_profile)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({1, 2, 5, 6, 7}, [[1, 2], [5, 6, 7]]),
        ({4}, [[4]]),
        ({8}, [[8]]),
        ({7, 8, 9}, [[7, 8]]),
        ({9, 10}, []),
        (set(), []),
    ],
)
def test_each_stretch_is_a_trace(tmp_path, numbers, expected):
    """Two stretches give two traces; the ends of the run belong to it, and steps beyond them to none."""
    fit([ft.hooks.profile(tmp_path, when=lambda state: state.step in numbers)], 8)
    assert spans(tmp_path) == expected
    assert len(list(tmp_path.iterdir())) == len(expected)


def test_a_run_that_raises_leaves_its_trace(tmp_path):
    """The step that raised is in a readable trace, and the error is that of the step."""

    def broken_step(state, batch):
        marked("step", state.step + 1)
        return state.advance() if state.step < 2 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        fit([ft.hooks.profile(tmp_path, when=two_to_three)], 5, step=broken_step)
    (marks,) = traces(tmp_path).values()
    assert marks[-3:] == ["ProfilerStep#3", "read 3", "step 3"]


@pytest.mark.parametrize(
    ("first", "expected"), [(1, [[1, 2, 3]]), (3, [[3]]), (4, [])]
)  # the run ends with step 3, and only a later hook, the data or the caller knows
@pytest.mark.parametrize("ending", ["stop", "data end", "left", "data raise"])
def test_whatever_ends_the_run_closes_the_trace(tmp_path, ending, first, expected):
    """The trace is written when the run ends in a stretch, and none for a stretch that never had a step."""
    profiling = ft.hooks.profile(tmp_path, when=lambda state: state.step >= first)
    stopping = ft.hook(after_step=lambda state: ft.stop(state, "enough") if state.step == 3 else None)
    if ending == "stop":
        fit([profiling, stopping], 9)
    elif ending == "data end":
        fit([profiling], None, data=Marking(end=3))
    elif ending == "data raise":
        with pytest.raises(OSError, match="disk gone"):
            fit([profiling], 9, data=Marking(broken=3))
    else:
        for state in ft.states(step_fn, [profiling], state=fresh(), data=Marking(), max_steps=9):
            if state.step == 3:
                break
        state = None
    seen = spans(tmp_path)
    assert [[step for step in steps if step <= 3] for steps in seen] == expected


@pytest.mark.parametrize("ending", ["max_steps", "stop before", "stop after"])
def test_nothing_after_the_last_step_is_traced(tmp_path, ending):
    """A run that is over is not profiled on: neither the hooks after this one nor what they do at the end."""
    profiling = ft.hooks.profile(tmp_path, when=lambda state: True)
    stopping = ft.hook(after_step=lambda state: ft.stop(state, "enough"))
    ended = ft.hook(after_train=lambda state: marked("after", 99))
    hooks = {"stop before": [stopping, profiling, marking, ended], "stop after": [profiling, stopping, ended]}
    fit(hooks.get(ending, [profiling, marking, ended]), 1 if ending == "max_steps" else 9)
    (marks,) = traces(tmp_path).values()
    assert "step 1" in marks and not [mark for mark in marks if mark.startswith("after")]


def test_a_rolled_back_run_writes_its_traces_again(tmp_path):
    """After a hook listed before went back, the predicate is asked about the steps that really come."""
    kept = []

    def back(state):
        kept.append(state)
        return kept[0] if len(kept) == 5 else None

    asked = []
    profiling = ft.hooks.profile(tmp_path, when=lambda state: asked.append(state.step) or two_to_three(state))
    fit([ft.hook(after_step=back), profiling], 5)
    assert asked == [1, 2, 3, 4, 5, 2, 3, 4, 5]
    assert spans(tmp_path) == [[2, 3]]


def test_a_trace_changes_nothing(tmp_path):
    """The last state is bitwise that of a run without the hook."""
    model = torch.nn.Linear(3, 2)
    step = ft.supervised_step(model, lambda m, b: m(b).square().mean(), ft.optimizer(torch.optim.AdamW, lr=0.1))
    state = ft.init_state(model, step.optimizer, seed=0)
    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    options = {"record_shapes": True, "with_stack": True, "profile_memory": True}
    hook = ft.hooks.profile(tmp_path, when=lambda state: True, **options)
    digests = [
        ft.digest(ft.fit(step, hooks, state=ft.snapshot(state), data=batches, max_steps=4)) for hooks in ([], [hook])
    ]
    assert digests[0] == digests[1]
    (path,) = tmp_path.iterdir()
    assert {key: read(path)[key] for key in options} == dict.fromkeys(options, 1)


def test_activities_reach_torch(tmp_path, monkeypatch):
    """Those asked for, or None for all that the machine has."""
    given, real = [], torch.profiler.profile
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: given.append(options) or real(**options))
    for activities in (None, [ProfilerActivity.CPU], ProfilerActivity.CPU):
        fit([ft.hooks.profile(tmp_path, when=two_to_three, activities=activities)], 4)
    assert [options["activities"] for options in given] == [None, (ProfilerActivity.CPU,), (ProfilerActivity.CPU,)]


def test_compressed_traces_and_the_table_in_the_log(tmp_path, caplog):
    """gzip compresses the file; a line of the log names it, and top_ops adds a table."""
    with caplog.at_level(logging.INFO, "fntrain"):
        fit([ft.hooks.profile(tmp_path, when=two_to_three, gzip=True, top_ops=2)], 4)
    assert spans(tmp_path) == [[2, 3]]
    path = tmp_path / "trace_step.00000002.pt.trace.json.gz"
    line, table = [record.getMessage() for record in caplog.records]
    assert line == f"profile: steps 2 to 3 in {path}"
    assert "Self CPU" in table and table.count("aten::") + table.count("ProfilerStep") + table.count("step ") <= 2


@pytest.mark.parametrize("compressed", [False, True])
def test_tensorboard_takes_traces_for_spans_of_one_worker(tmp_path, compressed):
    """The names are those that its profiler plug-in looks for: one worker, the step as span."""
    fit([ft.hooks.profile(tmp_path, when=lambda state: state.step % 2 == 0, gzip=compressed)], 4)
    names = [re.fullmatch(r"(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?", path.name) for path in sorted(tmp_path.iterdir())]
    assert [name.groups() for name in names] == [("trace_step", ".00000002"), ("trace_step", ".00000004")]


def test_a_trace_within_a_trace_is_refused(tmp_path):
    """torch lets a second profiler end the first: the hook does not."""
    with torch.profiler.profile() as outer:
        with pytest.raises(RuntimeError, match="profile: another torch profiler is running"):
            fit([ft.hooks.profile(tmp_path, when=two_to_three)], 4)
        marked("step", 99)
    assert "step 99" in {event.key for event in outer.key_averages()}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_a_trace_that_can_not_be_written_is_an_error(tmp_path, compressed):
    """torch alone prints a line and goes on."""
    directory = tmp_path / "gone"
    removing = ft.hook(before_step=lambda state: shutil.rmtree(directory) if state.step == 2 else None)
    with pytest.raises(OSError, match="gone"):
        fit([ft.hooks.profile(directory, when=two_to_three, gzip=compressed), removing], 4)
    assert not torch._C._autograd._profiler_enabled()


def test_a_trace_of_an_earlier_run_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    """What could not be written again is an error, whether or not there was one before."""
    fit([ft.hooks.profile(tmp_path, when=two_to_three)], 4)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: None)
    with pytest.raises(OSError, match="torch could not write the trace of steps 2 to 3"):
        fit([ft.hooks.profile(tmp_path, when=two_to_three)], 4)


def test_no_batch_is_kept(tmp_path):
    """While a batch is read the one before is gone: watching the reading costs no memory."""
    alive = weakref.WeakSet()
    counts = []

    def data():
        while True:
            counts.append(len(alive))
            batch = torch.zeros(1)
            alive.add(batch)
            yield batch
            del batch

    fit([ft.hooks.profile(tmp_path, when=two_to_three)], 4, step=lambda state, batch: state.advance(), data=data())
    assert counts == [0] * 4


def test_an_activity_that_is_not_there_is_refused_before_the_first_step(tmp_path):
    """torch alone warns and goes on without it."""
    here = torch.profiler.supported_activities()
    absent = next(one for one in ProfilerActivity.__members__.values() if one not in here)
    with pytest.raises(ValueError, match=rf"activities: \['{absent.name}'\] can't be profiled"):
        fit([ft.hooks.profile(tmp_path / "new", when=two_to_three, activities=[absent])], 4)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ft.hooks.profile("x", when=10), TypeError, "when: got int"),
        (lambda: ft.hooks.profile("x", when=two_to_three, activities=[]), ValueError, "activities: got none"),
        (lambda: ft.hooks.profile("x", when=two_to_three, activities=["cpu"]), TypeError, "activities: got 'cpu'"),
        (lambda: ft.hooks.profile("x", when=two_to_three, activities="cpu"), TypeError, "activities: got 'cpu'"),
        (lambda: ft.hooks.profile("x", when=two_to_three, top_ops=-1), ValueError, "top_ops: got -1"),
        (lambda: ft.hooks.profile(3, when=two_to_three), TypeError, "int"),
        (lambda: ft.hooks.memory_stats(every=0), ValueError, "every: got 0"),
    ],
)
def test_misuse_names_what_was_wrong(call, error, message):
    """Every wrong argument is an error when the hook is built."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ft.hooks.memory_stats(every=7),
        lambda: ft.hooks.profile("traces", when=two_to_three, activities=[ProfilerActivity.CPU], with_stack=True),
    ],
)
def test_hooks_are_frozen_values(make):
    """They compare, print and pickle, hold nothing, and can't be changed."""
    one = make()
    assert one == make() and pickle.loads(pickle.dumps(one)) == one
    assert one != ft.hooks.profile("traces", when=two_to_three) and one != ft.hooks.memory_stats()
    assert repr(pickle.loads(pickle.dumps(one))) == repr(one)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.name = "other"


def test_hooks_print_what_they_are():
    """The text names the settings, and the predicate by its name."""
    assert repr(ft.hooks.memory_stats(every=7)).startswith("at_end(every(7, hook('memory_stats', before_train=")
    assert ft.hooks.memory_stats(name="gpu").name == "gpu"
    assert ft.hooks.profile("traces", when=two_to_three, name="start").name == "start"
    shown = repr(ft.hooks.profile("traces", when=two_to_three))
    assert shown.startswith("on_main(Profile(directory='traces', when=two_to_three, activities=None, ")
