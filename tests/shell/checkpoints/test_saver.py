"""Saving in the background: the values of the moment, one save at a time, errors told, nothing left behind."""

import concurrent.futures
import gc
import threading
import time
import weakref
from contextlib import ExitStack

import pytest
import torch

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.core import tree
from fntrain.shell.checkpoints import local, saver, tensor_file
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.checkpoints.saver import HostBuffers, Saver
from fntrain.shell.checkpoints.store import name_of, step_of


def fresh(size=3):
    return TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(size)})


def pure_step(state, batch):
    return state.advance(params={"w": state.params["w"] + 1}, metrics={})


def in_place_step(state, batch):
    """Writes over the memory of the state it was given."""
    state.params["w"].add_(1)
    return state.advance(metrics={})


def runs(root, *, step_fn=pure_step, max_steps=6, every=2, state=None, **options):
    hook = ft.hooks.checkpoint(root, every=every, **options)
    return ft.states(step_fn, hook, state=state or fresh(), data=iter(range(100)), max_steps=max_steps)


def steps(root):
    """The steps in view, newest first."""
    return [step_of(path) for path in checkpoints(root)]


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fntrain-")]


@pytest.fixture
def slow(monkeypatch):
    """A disk that takes its time: an error that overtakes it would be seen."""
    commit = saver.commit

    def slowly(*args):
        time.sleep(0.1)
        return commit(*args)

    monkeypatch.setattr(saver, "commit", slowly)


class Held:
    """Holds every commit until it is let go, and writes down what happens."""

    def __init__(self, monkeypatch):
        self.commit, self.begun, self.go, self.order = saver.commit, threading.Event(), threading.Event(), []
        monkeypatch.setattr(saver, "commit", self)

    def __call__(self, store, contents, tensors):
        self.begun.set()
        assert self.go.wait(60)
        path = self.commit(store, contents, tensors)
        self.order.append(f"{store.root.name}/{path.name}")
        return path


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.go.set()


# The values of the moment.


def law_moment(root, held):
    for state in runs(root, step_fn=in_place_step):
        if state.step == 3:
            held.go.set()
    assert steps(root) == [6, 4, 2]
    for step in (2, 4, 6):
        assert ft.load(root / name_of(step)).params["w"].tolist() == [step] * 3


def test_a_saved_file_has_the_values_of_the_moment(tmp_path, held):
    """A step that writes in place while the save is under way does not reach the file."""
    law_moment(tmp_path, held)


def test_law_moment_can_fail(tmp_path, held, monkeypatch):
    """A saver that hands the state's own tensors to its thread is refused."""
    monkeypatch.setattr(
        HostBuffers, "copy", lambda self, tensors, helper: ([tree.to_bytes(one) for one in tensors], [])
    )
    with pytest.raises(AssertionError):
        law_moment(tmp_path, held)


@pytest.mark.parametrize("dtype", tensor_file.DTYPES)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_dtype_is_saved_in_the_background_too(tmp_path, dtype, asynchronous):
    """The copy in host memory has the bits, shapes and layouts of every dtype that can be saved."""
    bits = torch.arange(24, dtype=torch.uint8) % 2 if dtype == "bool" else torch.arange(100, 148, dtype=torch.uint8)
    value = bits.view(tensor_file.DTYPES[dtype][0])
    tensors = {"x": value, "empty": value[:0], "scalar": value[0], "rows": value.view(-1, 3)}
    if dtype != "float4_e2m1fn_x2":  # torch can't copy it out of order
        tensors["transposed"] = value.view(-1, 3).t()
    state = TrainState(step=1, position=1, seed=0, params={"w": torch.ones(1)}, extra=tensors)
    with Saver(tmp_path, asynchronous=asynchronous) as one:
        one.save(state)
    assert ft.load(tmp_path / "step_00000001") == state


@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_are_copied_in_parts(tmp_path, threads):
    """With one thread of torch the saving thread copies along; with more, torch's own do. Every layout is right."""
    values = torch.arange(5_000_000).view(1000, 5000)  # 40 MB, its parts do not divide it
    extra = {"t": values.t(), "half": values[:, ::2], "odd": values.view(-1)[1:], "small": values[0, :3]}
    state = TrainState(step=1, position=1, seed=0, params={"w": values}, extra=extra)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Saver(tmp_path) as one:
            one.save(state)
    finally:
        torch.set_num_threads(before)
    assert ft.load(tmp_path / "step_00000001") == state


def test_host_memory_is_made_once(tmp_path):
    """Save after save is copied to the same memory; states of other shapes get their own, and all are right."""
    with Saver(tmp_path) as one:
        places = []
        for step, size in enumerate([40, 40, 40, 10, 4000, 4000]):
            state = TrainState(step=step, position=step, seed=0, params={"w": torch.full((size,), float(step))})
            one.save(state)
            assert one.buffers.views[0].shape == (size,)
            places.append(one.buffers.memory.data_ptr())
    assert len(set(places[:4])) == 1  # a smaller state fits
    assert places[4] == places[5]
    for step, path in enumerate(reversed(checkpoints(tmp_path))):
        assert set(ft.load(path).params["w"].tolist()) == {step}


def test_the_old_state_of_a_pure_step_is_not_kept(tmp_path, held):
    """While a save is under way nothing holds the tensors it is of: two states live, not three."""
    for state in runs(tmp_path, every=2, keep_last=2, keep_best=ft.hooks.keep_best("loss", mode="min")):
        if state.step == 2:
            old = weakref.ref(state.params["w"])
        if state.step == 3:
            gc.collect()
            assert held.begun.wait(60)
            assert old() is None
            held.go.set()
    assert steps(tmp_path) == [6, 4]


# One at a time.


def test_no_batch_is_kept(tmp_path):
    """While a batch is read the one before is gone: looking at saves between steps costs no memory."""
    alive, counts = weakref.WeakSet(), []

    def data():
        while True:
            counts.append(len(alive))
            batch = torch.zeros(1)
            alive.add(batch)
            yield batch
            del batch

    ft.fit(pure_step, ft.hooks.checkpoint(tmp_path, every=9), state=fresh(), data=data(), max_steps=4)
    assert counts == [0] * 4


def law_one_at_a_time(root, held):
    with Saver(root) as one:
        one.save(fresh(), lambda steps: held.order.append("then") or steps)

        def second():
            one.save(pure_step(fresh(), None))
            held.order.append("second is under way")

        helper = threading.Thread(target=second)
        helper.start()
        try:
            helper.join(0.2)  # a chance to go wrong; right code needs none
            assert helper.is_alive()
        finally:
            held.go.set()
            helper.join()
    name = root.name
    assert held.order[:2] == [f"{name}/step_00000000", "then"]
    assert set(held.order[2:]) == {f"{name}/step_00000001", "second is under way"}


def test_at_most_one_save_is_under_way(tmp_path, held):
    """The next save waits for the one under way: memory does not grow with a slow disk."""
    law_one_at_a_time(tmp_path, held)


def test_law_one_at_a_time_can_fail(tmp_path, held, monkeypatch):
    """A saver that does not wait, and has a second thread, is refused."""
    wait, pool = Saver.wait, saver.ThreadPoolExecutor
    monkeypatch.setattr(saver, "ThreadPoolExecutor", lambda _, **options: pool(2, **options))
    monkeypatch.setattr(Saver, "wait", lambda self: wait(self) if held.go.is_set() else None)
    with pytest.raises(AssertionError):
        law_one_at_a_time(tmp_path, held)


def law_order_of_two(root, held):
    with Saver(root / "best") as best, Saver(root / "runs") as periodic:
        best.save(fresh())
        periodic.save(fresh())
        assert held.begun.wait(60)
        done, _ = concurrent.futures.wait([periodic.pending], timeout=0.2)  # a chance to go wrong
        in_view = steps(root / "runs")
        held.go.set()
        assert not done
        assert in_view == []
    assert held.order == ["best/step_00000000", "runs/step_00000000"]


def test_a_later_save_of_one_hook_waits_for_an_earlier_one_of_another(tmp_path, held):
    """What a state remembers of another hook's save is on the disk before the state is."""
    law_order_of_two(tmp_path, held)


def test_law_order_of_two_can_fail(tmp_path, monkeypatch):
    """Savers that know nothing of each other are refused."""
    held, commit = Held(monkeypatch), saver.commit
    monkeypatch.setattr(saver, "_open", set())
    monkeypatch.setattr(
        saver, "commit", lambda store, *rest: (held.commit if store.root.name == "runs" else commit)(store, *rest)
    )
    monkeypatch.setattr(Saver, "__enter__", _without_the_others(Saver.__enter__))
    with pytest.raises(AssertionError):
        law_order_of_two(tmp_path, held)


def _without_the_others(enter):
    def entered(self):
        enter(self)
        saver._open.clear()
        return self

    return entered


def test_an_earlier_save_that_fails_does_not_hold_up_the_later(tmp_path, monkeypatch):
    """The other hook's checkpoint is written all the same, and the error is told."""
    commit = saver.commit

    def failing(store, *rest):
        if store.root.name == "best":
            raise CheckpointError(f"{store.root}: no")
        return commit(store, *rest)

    monkeypatch.setattr(saver, "commit", failing)
    with ExitStack() as stack:
        best, two = (stack.enter_context(Saver(tmp_path / name)) for name in ("best", "runs"))
        best.save(fresh())
        two.save(fresh())
        two.wait()
        with pytest.raises(CheckpointError, match="best: no"):
            best.wait()
    assert steps(tmp_path / "runs") == [0]


# Errors.


def fail_once(monkeypatch, error):
    """The next write to a file fails."""
    write, left = tensor_file.Writer.write, [error]

    def failing(self, *data):
        if left:
            raise left.pop()
        return write(self, *data)

    monkeypatch.setattr(tensor_file.Writer, "write", failing)


def pending():
    """The saves under way."""
    return [one.pending for one in saver._open if one.pending is not None]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_of_a_save_is_told_at_the_next_step(tmp_path, monkeypatch, asynchronous):
    """Whatever `every`, the step after the save raises what went wrong, once, with the path."""
    fail_once(monkeypatch, OSError(28, "No space left on device"))
    begun = []

    def step_fn(state, batch):
        begun.append(state.step + 1)
        concurrent.futures.wait(pending())
        return pure_step(state, batch)

    with pytest.raises(CheckpointError, match=r"step_00000005: could not be written.*No space left") as error:
        list(runs(tmp_path, step_fn=step_fn, every=5, max_steps=50, asynchronous=asynchronous))
    assert begun == [1, 2, 3, 4, 5, 6][: 6 if asynchronous else 5]
    assert not any("besides" in note for note in error.value.__notes__)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_of_the_last_save_is_told_at_the_end(tmp_path, monkeypatch, slow, asynchronous):
    """`fit` does not return as if all were well; it says so once."""
    fail_once(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"step_00000003: could not be written.*No space left") as error:
        list(runs(tmp_path, every=9, max_steps=3, asynchronous=asynchronous))
    assert not any("besides" in note for note in error.value.__notes__)


def test_an_error_of_deleting_is_told_too(tmp_path, monkeypatch):
    """What goes wrong after the commit is raised as well; the checkpoint is there."""

    def failing(self, path):
        raise CheckpointError(f"{path}: can't be deleted")

    monkeypatch.setattr(LocalStore, "remove", failing)
    with pytest.raises(CheckpointError, match="step_00000002: can't be deleted"):
        list(runs(tmp_path, every=2, max_steps=4, keep_last=1))
    assert steps(tmp_path) == [4, 2]


def test_an_error_of_the_run_comes_before_one_of_a_save(tmp_path, monkeypatch, slow):
    """The step's own error is raised; that the save failed besides is in its notes."""
    fail_once(monkeypatch, OSError(28, "No space left on device"))

    def step_fn(state, batch):
        if state.step == 2:
            raise ZeroDivisionError
        return pure_step(state, batch)

    with pytest.raises(ZeroDivisionError) as error:
        list(runs(tmp_path, step_fn=step_fn, every=2))
    [note] = [note for note in error.value.__notes__ if "besides" in note]
    assert "step_00000002" in note


# The end.


@pytest.mark.parametrize("asynchronous", [True, False])
def test_fit_returns_after_the_last_commit(tmp_path, slow, asynchronous):
    """With a slow disk the last checkpoint is whole when `fit` returns, and is what it returned."""
    hook = ft.hooks.checkpoint(tmp_path, every=2, asynchronous=asynchronous)
    final = ft.fit(pure_step, hook, state=fresh(), data=iter(range(9)), max_steps=5)
    assert steps(tmp_path) == [5, 4, 2]
    assert ft.load(tmp_path / "step_00000005") == final
    assert threads() == []


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_under_way_is_committed_whatever_ends_the_run(tmp_path, slow, error, asynchronous):
    """Ctrl-C, an exit or an error right after a save do not cost the checkpoint, and no thread is left."""

    def step_fn(state, batch):
        if state.step == 2:
            raise error
        return pure_step(state, batch)

    with pytest.raises(error):
        list(runs(tmp_path, step_fn=step_fn, asynchronous=asynchronous))
    assert steps(tmp_path) == [2]
    assert threads() == []
    assert local._held == {}


def test_a_save_under_way_is_committed_when_the_loop_is_left(tmp_path, slow):
    """`break` out of ft.states waits for it too."""
    for state in (run := runs(tmp_path)):
        if state.step == 3:
            break
    run.close()
    assert steps(tmp_path) == [3, 2]
    assert threads() == []


def test_without_a_thread_the_same_files_are_written(tmp_path):
    """asynchronous=False saves in the training thread, copies nothing, and gives the same bytes."""
    seen = []
    for asynchronous in (True, False):
        root = tmp_path / str(asynchronous)
        for state in runs(root, asynchronous=asynchronous, keep_last=2):
            seen += [(asynchronous, state.step, name) for name in threads()]
    assert seen
    assert all(asynchronous for asynchronous, *_ in seen)
    for path in sorted((tmp_path / "True").glob("step_*/*")):
        assert path.read_bytes() == (tmp_path / "False" / path.parent.name / path.name).read_bytes()
    assert steps(tmp_path / "True") == steps(tmp_path / "False") == [6, 4]
