"""Signals of a job: its launcher passes on to the ranks those that it gets, and ranks end as `hooks.on_signal` says.

Schedulers and Ctrl-C signal all processes of a job at once. A rank that has got the signal by itself must not get it
again from the launcher: to `on_signal` a second one means "end now, without saving".
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
arrived: set[int] = set()  # signals that `on_signal` of this process has got: these are not passed on to it


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let a function handle the signals of a job while it runs.

    Python allows handlers in the main thread only, so a job that is launched from another thread gets no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)


def follow_launcher(signal_number: Any) -> None:
    """In a rank: end at once if the launcher is killed, and raise the signal whose number it writes, unless it arrived.

    Args:
      signal_number: an integer in shared memory, 0 until the launcher gets a signal.
    """
    for watch in (_end_with_launcher, _pass_on):
        threading.Thread(target=watch, args=(signal_number,), daemon=True).start()


def _end_with_launcher(_: Any) -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    wait([launcher.sentinel])
    os._exit(1)


def _pass_on(signal_number: Any) -> None:
    while not (number := signal_number.value):
        time.sleep(0.1)
    time.sleep(0.3)  # a signal that was sent to all processes has reached this one's handler by then
    if number not in arrived:
        os.kill(os.getpid(), number)
