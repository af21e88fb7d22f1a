"""What a process that loads data does at its start; an effect, and the only one outside of the shell."""

import multiprocessing
import os
import signal
import threading


def heed_parent_only(_worker: int) -> None:
    """In a worker: let SIGTERM end it only if its parent sent it.

    Schedulers send it to all processes of a job, and a run that then finishes its step and saves still needs batches.

    Example:
      >>> heed_parent_only(0)  # a process without a parent by multiprocessing: nothing to do
    """
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler in a worker does
