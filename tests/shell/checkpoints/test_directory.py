"""Who may write to a directory of checkpoints, and what becomes of it while somebody does."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.shell.checkpoints import local, saver, store
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.save_load import checkpoints

FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def make_state(step=0):
    return TrainState(step=step, position=step, seed=0, params={"w": torch.full((3,), float(step))})


def step_fn(state, batch):
    return state.advance(params={"w": state.params["w"] + 1}, metrics={})


def runs(root, *hooks, step_fn=step_fn, max_steps=4, every=2, **options):
    first = ft.hooks.checkpoint(root, every=every, **options)
    return ft.states(step_fn, [*hooks, first], state=make_state(), data=iter(range(100)), max_steps=max_steps)


def steps(root):
    """The steps in view, newest first."""
    return [store.step_of(path) for path in checkpoints(root)]


def is_free(root):
    """Whether nobody holds the directory: a lock through another descriptor is another's lock."""
    with (root / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


# Another process.


@contextmanager
def holder(root, then=lambda: None):
    """A process that holds a directory, calls `then`, tells the number it returns, and goes on until it is killed."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with LocalStore(root).hold(alone=True):
                os.write(write, b"%d\n" % (then() or 0))
                signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as told:
        line = told.readline()
        assert line, "the holder died"
        try:
            yield pid, int(line)
        finally:
            kill(pid)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # done in the test, or of another parent


@FORKS
def test_a_second_process_is_refused(tmp_path):
    """While one process writes to a directory, another gets an error that names it; afterwards it may."""
    root = tmp_path / "runs"
    with holder(root) as (pid, _):
        with pytest.raises(CheckpointError, match=rf'runs: another process writes .*"pid": {pid}'):
            ft.save(make_state(1), root)
        begun = []
        with pytest.raises(CheckpointError, match=str(pid)):
            list(runs(root, step_fn=lambda *args: begun.append(1) or step_fn(*args)))
        assert begun == []
        assert ft.latest(root) is None  # reading needs no lock
        kill(pid)
        assert ft.save(make_state(1), root).name == "step_00000001"
    assert steps(root) == [1]


def law_children(root, fork):
    with holder(root, fork) as (pid, child):
        try:
            assert not is_free(root)
            kill(pid)
            os.kill(child, 0)  # it is still there
            ft.save(make_state(1), root)
        finally:
            os.kill(child, signal.SIGKILL)


def asleep():
    """Fork a child that stays; returns its number once it is there."""
    read, write = os.pipe()
    if pid := os.fork():
        os.read(read, 1)
        return pid
    os.write(write, b".")
    signal.pause()
    os._exit(0)


@FORKS
def test_a_lock_dies_with_its_process_not_with_the_children(tmp_path):
    """After SIGKILL a new run may start at once, though forked children of the killed one are still alive."""
    law_children(tmp_path, asleep)


@FORKS
def test_a_lock_dies_with_its_process_not_with_the_data_workers(tmp_path):
    """The workers of a DataLoader outlive a killed run by a moment, and do not hold its directory."""

    def load():
        data = ft.data.stream(torch.arange(10), 2, seed=0, num_workers=1).at(0)
        next(data)
        globals()["kept"] = data  # or it would end its worker
        [worker] = (one for one in multiprocessing.active_children() if not one.name.startswith("ranks-of-tests"))
        return worker.pid

    law_children(tmp_path, load)


@FORKS
def test_law_children_can_fail(tmp_path):
    """A child that keeps its copy of the descriptor is found out."""

    def forgetful():
        local._held.clear()
        return asleep()

    with pytest.raises(CheckpointError, match="another process"):
        law_children(tmp_path, forgetful)


@FORKS
def test_a_child_has_to_take_the_lock_itself(tmp_path):
    """What a parent holds is not held by its children: a forked child that saves there is refused."""
    with LocalStore(tmp_path).hold():
        pid = os.fork()
        if not pid:
            try:
                ft.save(make_state(1), tmp_path)
            except CheckpointError:
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert not is_free(tmp_path)
        ft.save(make_state(2), tmp_path)
    assert is_free(tmp_path)


# The same process.


@pytest.mark.parametrize("spelling", ["runs", "runs/", "./runs", "link", "other/../runs"])
def test_two_hooks_on_one_directory_are_refused(tmp_path, monkeypatch, spelling):
    """They would delete each other's checkpoints; the directory is the same however it is spelled."""
    monkeypatch.chdir(tmp_path)
    for name in ("other", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("runs")
    other = ft.hooks.checkpoint(spelling, every=3, name="other")
    best = ft.hooks.best_checkpoint(spelling, "loss", mode="min")
    for hook in (other, best):
        with pytest.raises(CheckpointError, match="two hooks of this run save there"):
            list(runs(tmp_path / "runs", hook))
        assert is_free(tmp_path / "runs")
    assert steps(tmp_path / "runs") == []
    list(runs(tmp_path / "runs"))


def test_saving_by_hand_during_a_run(tmp_path):
    """ft.save to the directory of a running hook is no other writer: a saved step is one of the run's."""
    for state in runs(tmp_path, max_steps=6):
        if state.step in (2, 3):
            ft.save(state, tmp_path)
    assert steps(tmp_path) == [6, 4, 3, 2]
    assert is_free(tmp_path)


def test_a_save_by_hand_is_not_taken_for_a_branch_left(tmp_path, monkeypatch):
    """A step saved by hand while an earlier one is being written stays: it is later, but of no roll-back."""
    commit, go = saver.commit, threading.Event()

    def held(*args):
        assert go.wait(60)
        return commit(*args)

    monkeypatch.setattr(saver, "commit", held)
    for state in runs(tmp_path, every=2, max_steps=4, keep_last=3):
        if state.step == 3:
            ft.save(state, tmp_path)
            go.set()
    assert steps(tmp_path) == [4, 3, 2]


def law_one_step_twice(root, monkeypatch):
    """Stop the run's thread between its look and its rename, and save the same step by hand."""
    rename, looked, go = Path.rename, threading.Event(), threading.Event()

    def slow(self, target):
        if threading.current_thread() is not threading.main_thread() and not looked.is_set():
            looked.set()
            go.wait(0.2)  # the other is ahead now, or waits
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slow)
    for state in runs(root, max_steps=6):
        if state.step == 2:
            assert looked.wait(60)
            ft.save(state, root)
            go.set()
    assert steps(root) == [6, 4, 2]
    assert ft.load(root / "step_00000002").params["w"].tolist() == [2.0] * 3


def test_one_step_saved_by_hand_and_by_the_run_at_once(tmp_path, monkeypatch):
    """Two threads that publish the same step take turns."""
    law_one_step_twice(tmp_path, monkeypatch)


def test_law_one_step_twice_can_fail(tmp_path, monkeypatch):
    """Threads that do not take turns are refused."""
    monkeypatch.setattr(store, "_turn", nullcontext())
    with pytest.raises(CheckpointError, match="step_00000002"):
        law_one_step_twice(tmp_path, monkeypatch)


# A directory that does not stay.


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_directory_removed_under_the_run(tmp_path, replaced, asynchronous):
    """The run ends with an error that says so, and does not write to what somebody else put there."""
    root = tmp_path / "runs"

    def step(state, batch):
        if state.step == 2:
            for one in saver._open:
                one.wait()
            shutil.rmtree(root)
            if replaced:
                root.mkdir()
                (root / ".lock").write_text("")
        return step_fn(state, batch)

    with pytest.raises(CheckpointError, match="runs: was removed or replaced while this run"):
        list(runs(root, step_fn=step, max_steps=9, asynchronous=asynchronous))
    assert not root.exists() or [path.name for path in root.iterdir()] == [".lock"]
    list(runs(root))  # the lock of the first run is let go of
    assert is_free(root)


# Letting go.


def fails(state, batch):
    raise ZeroDivisionError


def test_the_lock_is_let_go_of_after_fit(tmp_path):
    """While a run goes on the directory is held, from before its first step; then it is free."""
    for state in runs(tmp_path):
        assert is_free(tmp_path) == (state.step == 4)  # the last state comes out after everything is closed
    assert local._held == {}


def test_the_lock_is_let_go_of_after_an_error(tmp_path):
    """In the step, or in the start of a later hook."""
    with pytest.raises(ZeroDivisionError):
        list(runs(tmp_path, step_fn=fails))
    assert is_free(tmp_path)

    def refuses(_state):
        assert not is_free(tmp_path)
        raise ZeroDivisionError

    hooks = [ft.hooks.checkpoint(tmp_path, every=1), ft.hook(before_train=refuses, name="refuses")]
    with pytest.raises(ZeroDivisionError):
        ft.fit(step_fn, hooks, state=make_state(), data=iter(range(9)), max_steps=3)
    assert is_free(tmp_path)


def test_the_lock_is_let_go_of_when_the_loop_is_left(tmp_path):
    """By `break`, at the latest when the generator is collected."""
    for _ in runs(tmp_path):
        assert not is_free(tmp_path)
        break
    assert is_free(tmp_path)


def test_the_lock_is_let_go_of_when_the_start_is_refused(tmp_path):
    """A later checkpoint in the directory is an error at the start, and leaves the lock free."""
    ft.save(make_state(9), tmp_path)
    with pytest.raises(CheckpointError, match="later step"):
        list(runs(tmp_path))
    assert is_free(tmp_path)
    assert steps(tmp_path) == [9]
