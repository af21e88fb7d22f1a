"""Imported by the process that ranks are forked from, and by no other: a signal to all processes must not end it.

If that process ended before the ranks, the launcher could no longer see which ranks are still saving, and would end
them.
"""

import os
import signal
import sys

_IGNORED = (signal.SIGTERM, signal.SIGUSR1)
_HERE = os.getpid()


def _restore_defaults() -> None:
    if os.getppid() == _HERE:  # a rank; what a rank forks keeps the rank's own handlers
        for number in _IGNORED:
            signal.signal(number, signal.SIG_DFL)


if "multiprocessing.forkserver" in sys.orig_argv[-1]:  # not in a test that imports all modules
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.register_at_fork(after_in_child=_restore_defaults)
