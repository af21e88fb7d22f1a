"""Train and be killed, again and again: the script of test_kill.py, run in a process of its own.

It has torch in memory, forks each training process from there and kills it, so that most of the instants fall on the
work with files. `python killed.py DIRECTORY VARIANTS KILLS SEED` prints as JSON what it found; what breaks the law is
an AssertionError.
"""

import ctypes
import json
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import fntrain as ft
from fntrain.shell.checkpoints import saver
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.manifest import MANIFEST
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.checkpoints.store import Attempt, entries, name_of, step_of

FOREVER = 10**6
TOUCHING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def build():
    """A job of 4 MB: dropout in the step, noise in the samples, Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.Dropout(0.3), nn.ReLU(), nn.Linear(512, 128))
    optimizer = ft.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
    step_fn = ft.supervised_step(model, lambda model, batch: model(batch).square().mean(), optimizer)
    return step_fn, ft.init_state(model, optimizer, seed=3), ft.data.stream(Noisy(), 4, seed=3)


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.full((512,), index / 23) + 0.1 * torch.randn(512)


def scored(state):
    """A score that goes up and down, but depends on the state alone."""
    return state.replace(metrics={**state.metrics, "score": float((state.step * 7919) % 101)})


def hooks(variant, root):
    kept = ft.hooks.keep_best("score", mode="max", n=2) if variant == "keep_best" else ()
    best = [ft.hooks.best_checkpoint(root / "best", "score", mode="max")] if variant == "best" else []
    return [ft.hook(after_step=scored), *best, ft.hooks.checkpoint(root / "runs", every=1, keep_last=2, keep_best=kept)]


def train(variant, root, max_steps, *, saves=True):
    step_fn, state, data = build()
    if saves:
        state = ft.resume_or(state, root / "runs")
    step_fn = step_fn if variant == "pure" else ft.shell.in_place(step_fn)
    return ft.fit(step_fn, hooks(variant, root) if saves else [], state=state, data=data, max_steps=max_steps)


def forked(fn):
    """Run a function in a child, which says by its exit status whether it came to its end; returns its pid."""
    pid = os.fork()
    if not pid:
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test
            fn()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return pid


def ended(pid):
    """Wait for a child; an error of its own is one of this process."""
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) == 0


def die_before(number):
    """End the process, as SIGKILL does, before the nth time that it changes a directory or opens a file for writing."""
    left = [number]

    def count(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in TOUCHING or writes:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def names(directory):
    return {path.name for path in directory.iterdir()}


def law_whole(root, newest):
    """All that is in view is whole, nothing is lost, leftovers do not pile up; returns the newest step of the run."""
    found = {}
    for directory in (root / "runs", root / "best"):
        for path in entries(LocalStore(directory)):
            assert ft.load(path).step == step_of(path)
        if directory.is_dir():
            assert len([name for name in names(directory) if name.startswith(".partial-")]) <= 1, names(directory)
        found[directory.name] = max(map(step_of, entries(LocalStore(directory))), default=0)
    assert found["runs"] >= newest, f"step {newest} was there, now the newest is {found['runs']}"
    return found["runs"]


def law_killed(variant, root, kills, seed):
    """Killed at random instants and at chosen ones, it ends in the bits of the run that was never stopped."""
    rng, newest, steps = random.Random(seed), 0, []
    train(variant, root / "warm", 1)  # what torch imports and sets up on first use is not what is to be hit
    begin = time.perf_counter()
    pid = forked(lambda: train(variant, root, FOREVER))
    while newest < 4:  # how long a start and some saves take, however busy the machine is
        time.sleep(0.001)
        assert not os.waitpid(pid, os.WNOHANG)[0], "it ended by itself"
        newest = max(map(step_of, checkpoints(root / "runs")), default=0)
    span = time.perf_counter() - begin
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    newest = law_whole(root, newest)
    for _ in range(kills):
        if rng.random() < 0.5:
            pid = forked(lambda: train(variant, root, FOREVER))
            time.sleep(rng.uniform(0, 2 * span))
            os.kill(pid, signal.SIGKILL)
        else:
            number = rng.randrange(1, 40)
            pid = forked(lambda number=number: (die_before(number), train(variant, root, FOREVER)))
        assert not ended(pid)
        newest = law_whole(root, newest)
        steps.append(newest)
    end = newest + 3
    assert ended(forked(lambda: train(variant, root, end)))
    assert law_whole(root, newest) == end
    _, state, _ = build()
    final, whole = ft.resume_or(state, root / "runs"), train(variant, root, end, saves=False)
    for name, value in whole.params.items():
        assert torch.equal(final.params[name], value), name
    assert all(ft.core.tree.bitwise_equal(final.opt_state[name], whole.opt_state[name]) for name in whole.params)
    expected = {end - 1, end}
    ranked = sorted(range(1, end + 1), key=lambda step: (-((step * 7919) % 101), step))
    if variant == "keep_best":
        expected |= set(ranked[:2])
    if variant == "best":
        # A kill after a better one was saved and before the run's own checkpoint: put aside, as of another run.
        own = {name for name in names(root / "best") if not name.startswith("former_")}
        assert own == {".lock", name_of(ranked[0])}
    assert names(root / "runs") == {".lock", *map(name_of, expected)}
    return steps


class InView(LocalStore):
    """The broken twin: straight into the directory that others read."""

    @contextmanager
    def attempt(self, step, *, shared):
        with self.hold():
            (self.root / name_of(step)).mkdir()
            yield Attempt(name_of(step), "")

    def publish(self, attempt, step, manifest):
        (self.root / attempt.directory / MANIFEST).write_bytes(manifest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, variants, number, seed = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])
    if variants == ["broken"]:
        saver.store_at = InView
    print(json.dumps([law_killed(variant, where / variant, number, seed) for variant in variants]))
