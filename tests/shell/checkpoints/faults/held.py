"""Several processes at one directory: the script of test_disk.py. `python held.py DIRECTORY`; errors are AssertionErrors."""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
from killed import ended, forked

import fntrain as ft
from fntrain import CheckpointError
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.save_load import checkpoints


def state(step):
    return ft.TrainState(step=step, position=step, seed=0, params={"w": torch.full((100,), float(step))})


def run(root, max_steps, *hooks):
    hooks = [*hooks, ft.hooks.checkpoint(root, every=1)]
    start = ft.resume_or(state(0), root)
    return ft.fit(lambda s, b: state(s.step + 1), hooks, state=start, data=iter(range(99)), max_steps=max_steps)


def two_writers(root):
    """The second is refused, naming the first; once that is killed there is nothing in the way."""
    ready, said = os.pipe()

    def hold():
        run(root, 2, ft.hook(after_step=lambda s: (os.write(said, b"x"), signal.pause())))

    pid = forked(hold)
    assert os.read(ready, 1) == b"x"
    for write in (lambda: run(root, 2), lambda: ft.save(state(9), root)):
        said = "nothing"
        try:
            write()
        except CheckpointError as error:
            said = str(error)
        assert "another process writes its checkpoints there" in said and str(pid) in said, said
    assert checkpoints(root) == []
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert run(root, 2).step == 2


def forked_while_saving(root):
    """A child forked in the middle of a save ends or lives on as it likes: the save goes on, the lock is the parent's."""
    fsync, saving, goes_on = os.fsync, threading.Event(), threading.Event()

    def slow(descriptor):
        saving.set()
        assert goes_on.wait(60)
        fsync(descriptor)

    children = []

    def fork(s):
        if s.step == 2:
            assert saving.wait(60)  # the save of step 1 is under way
            children.append(forked(lambda: None))  # ends by os._exit
            ended(children[0])
            children.append(forked(signal.pause))
            refused = forked(lambda: run(root, 9))  # says so on stderr
            _, status = os.waitpid(refused, 0)
            assert os.waitstatus_to_exitcode(status) == 1
            goes_on.set()

    os.fsync = slow
    try:
        run(root, 3, ft.hook(after_step=fork))
    finally:
        os.fsync = fsync
    assert [ft.load(path) for path in checkpoints(root)] == [state(3), state(2), state(1)]
    with LocalStore(root).hold():  # in this process
        pass
    assert ended(forked(lambda: run(root, 4)))  # and another: the child that lives on holds nothing
    os.kill(children[1], signal.SIGKILL)
    ended(children[1])
    assert ft.load(ft.latest(root)) == state(4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_writers(Path(sys.argv[1]) / "two")
    forked_while_saving(Path(sys.argv[1]) / "forked")
