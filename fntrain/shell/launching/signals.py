"""Signals of a job: its launcher passes on to the ranks what it gets, and they end as `hooks.on_signal` says.

Schedulers and Ctrl-C signal all processes of a job at once, so a rank that has got the signal itself is left alone: to
`on_signal` a second one means "end now, without saving".
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
arrived: set[int] = set()  # signals that on_signal of this process has got: they are not passed on again


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
    """In a rank: end at once if the launcher is killed, and get the signal whose number it writes, unless it came here.

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
    time.sleep(0.3)  # one that was sent to all processes has reached the handler by then
    if number not in arrived:
        os.kill(os.getpid(), number)
