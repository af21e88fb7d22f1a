"""on_signal: a signal ends the run after its step, with one save and all closed; none is lost, handlers are put back."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import signalled

import fntrain as ft
from fntrain.hooks.signal import OnSignal

NUMBERS = [signal.Signals[name] for name in signalled.SIGNALS]
on_signal = ft.hooks.on_signal


# Processes of their own.


@contextmanager
def started(kind, directory):
    """A run in a process and a session of its own, which does not outlive the test."""
    command = [sys.executable, signalled.__file__, kind, directory]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process, line):
    seen = []
    while not seen or seen[-1] not in (line, ""):
        seen.append(process.stdout.readline().strip())
    if not seen[-1]:
        raise RuntimeError(process.stderr.read())
    return seen


def law_ends_with_one_save(directory, runs):
    """Each (kind, number, send) is run and told to go in step 3, all at once; resumed, it ends like one undisturbed."""
    whole = ft.digest(signalled.train(directory / "whole"))
    with ExitStack() as stack:
        processes = [stack.enter_context(started(kind, directory / f"{kind} {n}")) for kind, n, _ in runs]
        said = []
        for process, (_, number, send) in zip(processes, runs, strict=True):
            said.append(wait_for(process, "step 3"))
            send(process.pid, number)
        for process, before, (kind, number, _) in zip(processes, said, runs, strict=True):
            name = signal.Signals(number).name
            out, err = process.communicate(timeout=30)
            assert process.returncode == 128 + number, err
            assert [word for word in before if "step" not in word] == (["child True -15"] if kind == "workers" else [])
            assert sorted(out.splitlines()) == [f"end {name} received", "saved 3"]
            assert err == f"{name}: stopping after step 3; a second signal ends at once\n"
            assert ft.load(ft.latest(directory / f"{kind} {number}")).step == 3
            assert ft.digest(signalled.train(directory / f"{kind} {number}")) == whole


def test_a_signal_ends_the_process_with_one_save_and_resuming_is_exact(tmp_path):
    """For each signal: its status, the step finished and saved once, one line; the resumed run has the same bits."""
    law_ends_with_one_save(
        tmp_path, [*(("ours", number, os.kill) for number in NUMBERS), ("saved already", 15, os.kill)]
    )


@pytest.mark.parametrize("kind", ["raises at once", "saves itself"])
def test_the_law_can_fail(tmp_path, kind):
    """An exit in the middle of a step, and a second save of the same step, are refused."""
    with pytest.raises(AssertionError):
        law_ends_with_one_save(tmp_path, [(kind, 15, os.kill)])


def test_loader_workers_outlive_a_signal_to_the_whole_group(tmp_path):
    """A scheduler and Ctrl-C reach the workers too, which go on until the run has ended; terminate() ends a child."""
    law_ends_with_one_save(tmp_path, [("workers", number, os.killpg) for number in NUMBERS])


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """Also where the interpreter is held by C code, and also if the first signal was another one."""
    with started("stuck", tmp_path) as process:
        wait_for(process, "step 3")
        process.send_signal(signal.SIGINT)
        wait_for(process, "stuck")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == -signal.SIGTERM


# In this process.


@pytest.fixture
def heard():
    """What reaches the handlers from before; in the end they must be there again."""
    log = []

    def handler(number, _):
        log.append(number)

    former = {number: signal.signal(number, handler) for number in NUMBERS}
    yield log
    left = [signal.signal(number, one) for number, one in former.items()]
    assert left == [handler] * len(NUMBERS)


def start(**fields):
    return ft.TrainState(**{"step": 0, "position": 0, "seed": 0, "params": {}} | fields)


def count(state, batch):
    return state.advance(metrics={"batch": batch})


def sends(phase, step, number=signal.SIGTERM):
    """A hook that sends a signal to this process."""
    return ft.hook(**{phase: lambda state: os.kill(os.getpid(), number) if state.step == step else None})


def fit(*hooks, max_steps=5, step_fn=count, **fields):
    return ft.fit(step_fn, hooks, state=start(**fields), data=iter(range(99)), max_steps=max_steps)


class Opened:
    """A resource that says when it is closed, and may fail then."""

    def __init__(self, log, error=None):
        self.log, self.error = log, error

    def __enter__(self):
        return ft.hook()

    def __exit__(self, *_):
        self.log.append("closed")
        if self.error:
            raise self.error


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("phase", ["before_step", "after_step"])
def test_without_exit_the_state_says_which_signal_came(heard, caplog, phase, number):
    """fit returns after the step under way (the next one, if the hook looked already), tells it once, and the handler heard none."""
    final = fit(ft.at_end(on_signal(exit=False)), sends(phase, 2, number))
    assert (final.step, final.run.stop) == (3, ft.Stop("requested", f"{number.name} received", at_once=True))
    assert caplog.messages == [f"{number.name}: stopping after step 3; a second signal ends at once"]
    assert heard == []


def test_exit_comes_after_everything_is_closed(heard):
    """SystemExit is raised once all hooks' after_train ran and resources are closed, wherever the hook is listed."""
    for first in (True, False):
        log = []
        others = [
            ft.resource(lambda log=log: Opened(log), name="r"),
            ft.hook(after_train=lambda s, log=log: log.append(s.step)),
        ]
        hooks = [on_signal(), *others] if first else [*others, on_signal()]
        with pytest.raises(SystemExit) as caught:
            fit(sends("before_step", 1), *hooks)
        assert (caught.value.code, log) == (143, [2, "closed"])


def test_a_signal_before_the_first_step_begins_none(heard, tmp_path):
    """A flag that is set when the run starts stops it there: nothing trained, nothing saved."""
    final = fit(sends("before_train", 0), on_signal(exit=False), ft.hooks.checkpoint(tmp_path, every=1))
    assert (final.step, final.run.stop.reason, ft.latest(tmp_path)) == (0, "SIGTERM received", None)


@pytest.mark.parametrize("hook", [sends("after_train", 3), sends("before_step", 2)])
def test_a_signal_in_the_end_still_exits_with_all_saved(heard, tmp_path, hook, caplog):
    """In the last step or after it: the run is done, and the process is told to run again all the same."""
    with pytest.raises(SystemExit, match="143"):
        fit(on_signal(), hook, ft.hooks.checkpoint(tmp_path, every=9), max_steps=3)
    assert ft.load(ft.latest(tmp_path)).step == 3
    assert len(caplog.messages) == 1


def test_a_signal_that_no_state_tells_of_is_sent_again(heard):
    """Too late for the state, beside another hook's reason, or while states() is left early: it goes on to who was before."""
    fit(on_signal(exit=False), sends("after_train", 3), max_steps=3)
    assert heard == [15]
    enough = ft.hook(after_step=lambda state: ft.stop(state, "enough"))
    assert fit(sends("before_step", 0), enough, on_signal(exit=False)).run.stop.reason == "enough"
    assert heard == [15, 15]
    for state in ft.states(count, on_signal(), state=start(), data=iter(range(9)), max_steps=9):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            break
    assert heard == [15, 15, 2]


def test_an_error_wins_and_says_that_a_signal_came(heard, tmp_path, monkeypatch):
    """A step or the last save that fails is seen: no SystemExit hides it."""

    def failing(state, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("in the model")

    with pytest.raises(ValueError, match="in the model") as caught:
        fit(on_signal(), step_fn=failing)
    assert "besides, SIGTERM came and asked the run to end" in caught.value.__notes__

    def full(*_):
        raise ft.CheckpointError("disk full")

    monkeypatch.setattr("fntrain.shell.checkpoints.saver.commit", full)
    with pytest.raises(ft.CheckpointError, match="disk full"):
        fit(on_signal(), sends("before_step", 1), ft.hooks.checkpoint(tmp_path, every=9))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_resource_that_fails_to_close_is_seen_besides_the_exit(heard, error):
    """SystemExit prints nothing: the other error wins whichever comes first, with a note."""
    for first in (True, False):
        other = ft.resource(lambda: Opened([], error("cannot close")), name="r")
        with pytest.raises(error, match="cannot close") as caught:
            fit(sends("before_step", 1), *([on_signal(), other] if first else [other, on_signal()]))
        assert caught.value.__notes__ == ["besides SystemExit: 143"]


def test_handlers_are_put_back_whatever_ends_the_run(heard, monkeypatch):
    """After the end, an error, a break, a hook that can't open, and a former handler that raises; and again."""
    fit(on_signal(), on_signal("SIGTERM", name="inner"))
    fit(on_signal())
    with pytest.raises(ZeroDivisionError):
        fit(on_signal(), step_fn=lambda state, batch: 1 / 0)
    next(ft.states(count, on_signal(), state=start(), data=iter(range(9)), max_steps=9))
    with pytest.raises(TypeError, match="open"):
        fit(on_signal(), ft.resource(lambda: ExitStack(), name="no hook"))
    calls, to_set = [], signal.signal

    def interrupted(number, handler):
        calls.append(number)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        to_set(number, handler)

    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(on_signal())
    assert len(calls) == 2 + 4


def test_of_two_runs_the_inner_one_gets_the_signal(heard):
    """A run within a step of another one has the signal to itself, and hands the handlers back."""
    inner = []

    def step_fn(state, batch):
        if state.step == 1:
            inner.append(fit(on_signal(exit=False), sends("before_step", 2)).step)
        return count(state, batch)

    assert (fit(on_signal(exit=False), step_fn=step_fn).step, inner) == (5, [3])
    assert fit(on_signal(exit=False), sends("before_step", 3), step_fn=step_fn).step == 4


def test_runs_left_in_the_wrong_order_swallow_nothing(heard):
    """Two interleaved runs: the handler that the later one puts back belongs to a run that is over, and passes it on."""
    one, two = (ft.states(count, on_signal(), state=start(), data=iter(range(9)), max_steps=9) for _ in range(2))
    next(one), next(two)
    one.close()
    two.close()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [15]
    fit(on_signal("SIGINT"))
    for number in NUMBERS[1:]:
        signal.raise_signal(number)
    assert heard == [15, *NUMBERS[1:]]


def test_a_run_that_waits_for_its_batch_ends_after_that_step(heard):
    """The wait is not broken off: the batch comes, its step is made, and then the run ends."""

    def data():
        yield 0
        os.kill(os.getpid(), signal.SIGUSR1)
        yield 1

    final = ft.fit(count, on_signal(exit=False), state=start(), data=data(), max_steps=9)
    assert (final.step, final.metrics["batch"]) == (2, 1)


def test_the_hook_is_a_value():
    """It compares, prints and pickles; names and members are the same."""
    hook = on_signal([signal.SIGTERM, "SIGINT", "SIGTERM"], exit=False, name="x")
    assert hook == on_signal(("SIGTERM", "SIGINT"), exit=False, name="x") == pickle.loads(pickle.dumps(hook))
    assert repr(hook) == "OnSignal(signals=('SIGTERM', 'SIGINT'), exit=False)"
    assert on_signal(signal.SIGINT).open == OnSignal(("SIGINT",), True)


@pytest.mark.parametrize("signals", [(), "TERM", ["SIGTERM", "SIGNONE"], "SIGKILL", signal.SIGSTOP, [15]])
def test_signals_that_can_not_be_caught_are_refused(signals):
    """Empty, unknown and uncatchable ones are a ValueError when the hook is made."""
    with pytest.raises(ValueError, match="signals: got .*; expected names such as 'SIGTERM'"):
        on_signal(signals)


def test_where_handlers_can_not_be_set_or_put_back_it_says_so(monkeypatch):
    """Outside the main thread, and over a handler set from C: a RuntimeError before the first step."""
    errors = []

    def run():
        with pytest.raises(RuntimeError, match="main thread only; call fit there") as caught:
            fit(on_signal())
        errors.append(caught.value)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(errors) == 1
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with pytest.raises(RuntimeError, match="SIGTERM has a handler set from C that can't be put back"):
        fit(on_signal())


def test_a_signal_saves_and_does_not_evaluate(heard, tmp_path):
    """What may take longer than the time that is left is not begun: of what is due at the end only the saving is."""
    evaluated = []
    hooks = [
        on_signal(exit=False),
        ft.hooks.evaluate(lambda state: evaluated.append(state.step) or {"x": 1.0}, every=100),
        sends("before_step", 2),
        ft.hooks.checkpoint(tmp_path, every=100),
    ]
    fit(*hooks)
    assert evaluated == []
    assert ft.latest(tmp_path).name == "step_00000003"
    fit(*hooks[1:2], ft.hook(after_step=lambda state: ft.stop(state, "enough")))
    assert evaluated == [1]
