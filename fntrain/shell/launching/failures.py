"""What a rank reports when it fails, and which of the failures came first: the other ranks fail because of it."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import attrs


@attrs.frozen
class Failure:
    """The end of a rank that failed.

    Args:
      rank: its number in the whole job.
      when: seconds since the epoch, by the clock of its machine.
      line: what happened, in one line.
      text: traceback of the error, or the text given to sys.exit; None if the rank could not say, as when it is killed.
    """

    rank: int
    when: float
    line: str
    text: str | None


@contextmanager
def reported(rank: int, report: Callable[[Failure], None]) -> Iterator[None]:
    """In a rank: hand an error to `report` and end the process at once.

    Nothing is cleaned up, because what Python does at the end of a process may wait for ranks that wait for this one.
    SystemExit with a number is no error. KeyboardInterrupt ends the process by SIGINT, as it does in any script.
    """
    try:
        yield
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            raise
        failure = Failure(rank, time.time(), str(leaving.code), str(leaving.code))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    except BaseException as error:
        line = traceback.format_exception_only(error)[0].rstrip()
        failure = Failure(rank, time.time(), line, traceback.format_exc())
    else:
        return
    report(failure)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def ended_well(code: int | None) -> bool:
    """Return whether a rank with this exit status is done, or was stopped by a signal and has saved.

    Example:
      >>> ended_well(0), ended_well(143), ended_well(1), ended_well(-9)
      (True, True, False, False)
    """
    return code == 0 or (code is not None and code > 128)


def how_it_ended(code: int | None, begun: bool) -> str:
    """Return in words how a rank ended that reported nothing.

    Example:
      >>> how_it_ended(-9, begun=True)
      'was killed by SIGKILL'
    """
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if begun:
        return f"ended with status {code} without a word"
    return (
        f"ended with status {code} before it began: its error is above; ranks import the script, which must call "
        'launch under `if __name__ == "__main__":`'
    )


def first_failure(failures: Iterable[Failure]) -> tuple[Failure, list[Failure]]:
    """Split failures, given in their order, into the first one and the others that could say what happened.

    A rank that was killed could not say so when the others saw its connections close: it was first.

    Example:
      >>> first, others = first_failure([Failure(0, 1.0, "lost 1", "..."), Failure(1, 2.0, "was killed", None)])
      >>> first.rank, [other.rank for other in others]
      (1, [0])
    """
    first, *others = sorted(failures, key=lambda failure: failure.text is not None)
    return first, [failure for failure in others if failure.text is not None]


def described(first: Failure, others: Iterable[Failure], *, of: str = "", restarts: str = "") -> str:
    """Return a message: the first failure, then a line for each rank that failed after it.

    Example:
      >>> described(Failure(1, 2.0, "was killed by SIGKILL", None), [], of=" of 2")
      'rank 1 of 2 was killed by SIGKILL'
    """
    what = f"{first.line}{restarts}" if first.text is None else f"failed{restarts}:\n{first.text.rstrip()}"
    return "\n".join(
        [f"rank {first.rank}{of} {what}", *(f"rank {other.rank} then said: {other.line}" for other in others)]
    )
