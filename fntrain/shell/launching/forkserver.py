"""Imported by the process that ranks are forked from, and by no other: a signal to all processes must not end it.

If it ended before the ranks, the launcher would lose sight of those that are still saving, and end them.
"""

import os
import signal
import sys

_IGNORED = (signal.SIGTERM, signal.SIGUSR1)
_HERE = os.getpid()


def _restore_defaults() -> None:
    if os.getppid() == _HERE:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_DFL)


if "multiprocessing.forkserver" in sys.orig_argv[-1]:  # a test that imports all modules is another process
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.register_at_fork(after_in_child=_restore_defaults)
