"""A small run for test_signal.py; as a process of its own: python signalled.py KIND DIRECTORY, which says what it does.

The broken kinds show that the law of the test can fail.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch

import fntrain as ft
from fntrain.shell.checkpoints import save_load as files
from fntrain.shell.checkpoints.saver import Saver

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
save = files.save


def say(*words):
    print(*words, flush=True)


def train(directory, *hooks, max_steps=6, every=100, before=None, **loading):
    """A run with noise in its steps and data in an order of its own."""

    def step_fn(state, batch):
        if before is not None:
            before(state.step + 1)
        ft.seed_generators(state.seed, state.step)
        params = {"w": state.params["w"] * 0.9 + torch.randn(5) * batch}
        return state.advance(params=params, metrics={})

    start = ft.TrainState(step=0, position=0, seed=3, params={"w": torch.ones(5)})
    data = ft.data.stream(torch.arange(17.0), 1, seed=0, **loading)
    saving = ft.hooks.checkpoint(directory, every=every)
    state = ft.resume_or(start, directory)
    return ft.fit(step_fn, [*hooks, saving], state=state, data=data, max_steps=max_steps)


def slow(step):
    """Step 3 takes until on_signal has seen a signal."""
    say("step", step)
    late = time.monotonic() + 20
    while step == 3 and signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL and time.monotonic() < late:
        time.sleep(0.01)


def stuck(step):
    """Step 3 ends up in C code that holds the interpreter."""
    slow(step)
    if step == 3:
        say("stuck")
        ctypes.PyDLL(None).sleep(60)


def parent(step):
    """In step 2 a child by fork that gets Ctrl-C, goes on, and is terminated."""
    if step == 2:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        os.kill(child.pid, signal.SIGINT)
        child.join(0.2)
        going_on = child.is_alive()
        child.terminate()
        child.join(10)
        say("child", going_on, child.exitcode)
    slow(step)


@contextmanager
def raises_at_once():
    def handle(number, _):
        sys.exit(128 + number)

    for name in SIGNALS:
        signal.signal(signal.Signals[name], handle)
    yield ft.hook()


def saves_itself(directory):
    return ft.hook(after_step=lambda state: files.save(directory, state) and None if state.run.stop else None)


def main(kind, directory):
    def saying(save):
        def said(where, state, *rest):
            say("saved", state.step)
            return save(where, state, *rest)

        return said

    Saver.save = saying(Saver.save)
    files.save = saying(lambda where, state: save(state, where))
    last = ft.hook(after_train=lambda state: say("end", state.run.stop.reason))
    ours = ft.hooks.on_signal(SIGNALS)
    kinds = {
        "ours": ([ours, last], {}),
        "saved already": ([ours, last], {"every": 3}),
        "workers": ([ours, last], {"before": parent, "num_workers": 2}),
        "stuck": ([ours, last], {"before": stuck}),
        "raises at once": ([ft.resource(raises_at_once, name="broken"), last], {}),
        "saves itself": ([ours, saves_itself(directory), last], {}),
    }
    hooks, options = kinds[kind]
    train(directory, *hooks, **{"before": slow} | options)
    say("not reached")


if __name__ == "__main__":
    main(*sys.argv[1:])
