"""hooks.on_signal: save everything and end the run when a signal comes (preemption, a time limit, Ctrl-C).

The handler only sets a flag. It neither logs nor raises: it may interrupt anything, a save or the logging itself.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

import attrs

from fntrain.core.hook import AnyHook, Hook, hook, resource
from fntrain.core.state import TrainState, stop
from fntrain.shell.launching.signals import arrived

_log = logging.getLogger("fntrain")


@attrs.frozen
class OnSignal:
    """The parameters of the hook; called, it gives the `SignalWatch` of one run."""

    signals: tuple[str, ...]
    exit: bool

    def __call__(self) -> "SignalWatch":
        return SignalWatch(self)


def on_signal(
    signals: str | signal.Signals | Iterable[str | signal.Signals] = ("SIGTERM", "SIGINT", "SIGUSR1"),
    *,
    exit: bool = True,  # noqa: A002
    name: str = "on_signal",
) -> AnyHook:
    """Stop after the step under way when a signal comes, save and close everything, and exit; list it first.

    `state.run.stop` names the signal. A second one ends the process at once, after Python has seen the first (C code
    that is running returns before). None is lost: one that comes when the run is ending exits all the same, one beside
    an error is a note of it. Of several ranks one is enough: all stop after the same step and exit alike.
    Schedulers and Ctrl-C signal all processes of a job: children by fork heed SIGTERM alone, and workers of
    `ft.data.stream` only their parent's. SIGTERM to all ends a DataLoader of your own, and so the run by an error.

    SLURM, in the batch script; the signal comes 2 to 3 minutes before the time limit:

        #SBATCH --signal=USR1@120 --requeue
        srun python train.py; status=$?
        [ $status = 138 ] && scontrol requeue $SLURM_JOB_ID
        exit $status

    Kubernetes sends SIGTERM to the container's first process: start it by `exec python train.py`, let
    `terminationGracePeriodSeconds` be more than a step and a save take (evaluations at the end are left out), and have
    it run again by `restartPolicy: OnFailure` (or the training operator's `ExitCode`, to
    which 128 to 255 means "again").

    Args:
      signals: names or members of signal.Signals, one or several.
      exit: raise SystemExit(128 + number) when all is closed: 143 for SIGTERM, 130 for SIGINT, on Linux 138 for
        SIGUSR1. If not, `fit` returns its state, and a signal too late for it goes to the handler from before.
      name: unique in a run; of several hooks for one signal, the last opened gets it.
    Raises:
      ValueError: no signal, an unknown one, or one that can't be caught.
      RuntimeError: (when the run starts) not in the main thread, or a handler set from C, which can't be put back.
    Example:
      >>> on_signal("SIGTERM")
      OnSignal(signals=('SIGTERM',), exit=True)
    """
    several: list[Any] = [signals] if isinstance(signals, str | signal.Signals) else list(signals)
    names = [one.name if isinstance(one, signal.Signals) else one for one in several]
    wrong = [one for one in names if one not in signal.Signals.__members__ or one in ("SIGKILL", "SIGSTOP")]
    if wrong or not names:
        got = f"{wrong[0]!r}, which is unknown here or can't be caught" if wrong else "none"
        raise ValueError(f"signals: got {got}; expected names such as 'SIGTERM'")
    return resource(OnSignal(tuple(dict.fromkeys(names)), exit), name=name, communicates=True)


class SignalWatch:
    """What the hook holds during one run: the handlers from before the run, and the signal that came."""

    def __init__(self, settings: OnSignal) -> None:
        self.settings = settings
        self.owner = os.getpid()
        self.former: dict[int, Any] = {}
        self.received: signal.Signals | None = None
        self.in_state = False  # whether the state says which signal came
        self.over = False  # whether the handlers from before are set again

    def __enter__(self) -> Hook:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("on_signal: Python handles signals in the main thread only; call fit there")
        arrived.clear()
        self.former = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in self.settings.signals}
        if foreign := [signal.Signals(one).name for one, former in self.former.items() if former is None]:
            raise RuntimeError(f"on_signal: {foreign[0]} has a handler set from C that can't be put back; leave it out")
        try:
            for one in self.former:
                signal.signal(one, self.handle)
        except BaseException:  # a handler from before has raised, as Python's own does for SIGINT
            self.restore()
            raise
        return hook(before_train=self.stop_if_received, after_step=self.stop_if_received, after_train=self.share)

    def handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.owner:  # in a forked child, which its parent ends by SIGTERM
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif self.over:  # a run that began within this one and outlived it has set this handler again
            signal.signal(number, self.former[number])
            signal.raise_signal(number)
        else:
            arrived.add(number)
            self.received = self.received or signal.Signals(number)
            for one in self.former:
                signal.signal(one, signal.SIG_DFL)

    def stop_if_received(self, state: TrainState) -> TrainState | None:
        if self.received is None:
            return None
        _log.warning("%s: stopping after step %d; a second signal ends at once", self.received.name, state.step)
        self.in_state = state.run.stop is None  # else another hook stopped the run first, and its reason stays
        return stop(state, f"{self.received.name} received", at_once=True)

    def share(self, state: TrainState) -> None:
        """Agree with all ranks on the signal that came to one of them, so that all end with the same status."""
        if number := state.run.ranks.max(self.received or 0):
            self.in_state |= self.received is None
            self.received = signal.Signals(number)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.restore()
        if self.received is None:
            return
        if error is not None and not isinstance(error, GeneratorExit):
            error.add_note(f"besides, {self.received.name} came and asked the run to end")
        elif error is None and self.settings.exit:
            if not self.in_state:
                _log.warning("%s: came when the run was ending", self.received.name)
            raise SystemExit(128 + self.received)
        elif not self.in_state:  # Python drops a SystemExit that is raised while a generator is closed
            signal.raise_signal(self.received)

    def restore(self) -> None:
        self.over = True
        with ExitStack() as stack:
            for one, former in self.former.items():
                stack.callback(_put_back, one, former)


def _put_back(number: int, handler: Any) -> None:
    """Set a handler; if the handler of a pending signal, which Python runs first, raises, try again."""
    try:
        signal.signal(number, handler)
    except BaseException:
        signal.signal(number, handler)
        raise
