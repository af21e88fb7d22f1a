"""What ranks do in test_launch.py; as a script of its own: python launched.py KIND DIRECTORY ... [option=number ...].

The broken kinds show that the laws of the test can fail.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import jobs
import torch
import torch.distributed as dist

import fntrain as ft
from fntrain.shell.checkpoints.saver import Saver
from fntrain.shell.launching import signals
from fntrain.shell.launching.launch import launch
from fntrain.shell.launching.local import PRELOAD

STEPS = 8
save = Saver.save


def say(*words):
    print(" ".join(map(str, words)) + "\n", end="", flush=True)


def until(condition, seconds=300):
    late = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > late:
            raise TimeoutError(f"nothing after {seconds} s")
        time.sleep(0.02)


# Functions for launch.


def report(directory):
    """Write down who this rank is, and a sum over all."""
    total = torch.tensor(2.0 ** dist.get_rank())
    dist.all_reduce(total)
    with (Path(directory) / f"rank {dist.get_rank()}").open("a") as file:
        file.write(f"{dist.get_world_size()} {total:g} {os.environ.get('LOCAL_RANK')} {os.environ.get('FOR_RANKS')}\n")


def wait_alone(directory):
    """Rank 1 never comes to where rank 0 waits."""
    here = ft.shell.ranks()
    aside = here.channel()
    here.barrier()
    if here.rank == 0:
        (Path(directory) / "failed at").write_text(repr(time.time()))
        aside.gather(1)
    until(lambda: False)


def nested(directory):
    launch(partial(report, directory), 5)


def fail(how, others, directory):
    """Rank 1 fails; rank 0 waits for it, in a collective or not, or does not even heed SIGTERM."""
    if dist.get_rank() == 0:
        (Path(directory) / "deaf").touch()
        if others == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        until(lambda: False) if others != "waits" else dist.barrier()
    until((Path(directory) / "deaf").exists)
    print("before it failed")  # in a buffer, if stdout is no terminal
    (Path(directory) / "failed at").write_text(repr(time.time()))
    if how == "raises":
        error = ValueError("of rank 1")
        error.add_note("and a note")
        raise error
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(3)
    if how == "says":
        sys.exit("enough of it")
    if how == "says at length":  # more than a pipe holds
        sys.exit("!" * 1_000_000)
    if how == "interrupted":
        raise KeyboardInterrupt
    if how == "returns":
        return
    raise AssertionError(how)


def train(directory, *hooks, every=100, max_steps=STEPS):
    """Train with the others, from the last checkpoint on."""
    Saver.save = lambda saver, state, *rest: say("saved", state.step) or save(saver, state, *rest)
    step_fn, start, data = jobs.parts()
    step_fn = ft.shell.distribute(step_fn)
    stops = ft.hook(after_train=lambda state: say("end", dist.get_rank(), state.step, state.run.stop.reason))
    hooks = [ft.hooks.on_signal(), *hooks, stops, ft.hooks.checkpoint(directory, every=every)]
    return ft.fit(step_fn, hooks, state=ft.resume_or(start, directory), data=data, max_steps=max_steps)


def at(step, do):
    return ft.hook(before_step=lambda state: do() if state.step + 1 == step else None)


def slow(directory, *, long=1.5):
    """Step 3 takes until on_signal of some rank has seen a signal, and longer than the launcher may take to pass it on."""
    told = Path(directory) / "told"
    told.parent.mkdir(exist_ok=True)

    def wait():
        say("step", dist.get_rank(), os.getpid())

        def seen():
            if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
                told.touch()
            return told.exists()

        until(seen)
        if long > 10:
            say("told")
        time.sleep(long)

    train(directory, at(3, wait))


def stubborn(directory):
    slow(directory, long=60)


def idle(directory):
    """A function that knows nothing of signals; or one that heeds them, and whose rank 1 fails then."""

    def handle(*_):
        raise ValueError("when all was to be saved")

    if Path(directory).name == "fails":
        signal.signal(signal.SIGTERM, handle if dist.get_rank() == 1 else signal.SIG_IGN)
    say("step", dist.get_rank(), os.getpid())
    time.sleep(60)


def raise_in_hook(directory):
    def fails():
        if dist.get_rank() == 1:
            raise ValueError("in a hook of rank 1")

    train(directory, at(6, fails), every=1)


def die_once(directory, always=False):
    """Rank 1 ends itself in step 5 of the first attempt."""
    attempts = Path(directory) / "attempts"

    def die():
        if dist.get_rank() == 1 and (always or not attempts.exists()):
            with attempts.open("a") as file:
                file.write("x")
            if always:
                raise ValueError("again")
            os.kill(os.getpid(), signal.SIGKILL)

    train(directory, at(5, die), every=2)


def held(directory):
    """Wait in step 5 of the first attempt; each rank says which process it is."""
    go = Path(directory) / "go"
    say("rank", dist.get_rank(), dist.get_world_size(), os.getpid())

    def wait():
        say("step", dist.get_rank(), os.getpid())
        until(go.exists)

    train(directory, at(5, wait), every=2)


class _Deaf(set):
    def add(self, _):
        pass


KINDS = {name: globals()[name] for name in ("report", "slow", "stubborn", "idle", "held")}

if __name__ in ("__main__", "__mp_main__"):
    if "twice" in sys.argv:  # signals that ranks have got are passed on all the same
        signals.arrived = _Deaf()
    if "unprotected" in sys.argv:  # the process that ranks are forked from ends by a signal to all
        PRELOAD.remove("fntrain.shell.launching.forkserver")

if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    options = dict(one.split("=") for one in rest if "=" in one)
    numbers = {name: int(value) if value.isdigit() else value for name, value in options.items()}
    *places, last = [one for one in rest if "/" in one and "=" not in one]
    for place in places:  # one job after another, each ended by a signal
        try:
            launch(partial(KINDS[kind], place), **{"num_processes": 2} | numbers)
        except SystemExit as leaving:
            say("status", leaving.code)
    launch(partial(KINDS[kind], last), **{"num_processes": 2} | numbers)
