"""Imported by the process that ranks are forked from: a signal to all processes of a job must not end it before them.

Else the launcher would lose sight of ranks that are still saving, and end them.
"""

import os
import signal
import sys

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_HERE = os.getpid()


def _as_usual() -> None:
    if os.getppid() == _HERE:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)


if "multiprocessing.forkserver" in sys.orig_argv[-1]:  # not where all modules are imported, to be tested
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.register_at_fork(after_in_child=_as_usual)
