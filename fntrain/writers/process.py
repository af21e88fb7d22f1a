"""What a writer shows of the process: its memory, and times as text."""

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")  # of Linux
_LINES = {"rss": "VmRSS:", "peak_rss": "VmHWM:"}


def process_memory() -> dict[str, int]:
    """Return bytes of memory of this process without its children: "rss" now, which Linux alone tells, and "peak_rss".

    On Linux the peak is not `ru_maxrss`, which a process inherits from the program that started it: a rank would show
    the peak of its launcher. https://man7.org/linux/man-pages/man2/getrusage.2.html

    Returns:
      what the platform tells; nothing on Windows.
    Example:
      >>> all(size > 0 for size in process_memory().values())
      True
    """
    if STATUS.exists():
        words = STATUS.read_text(encoding="utf-8", errors="replace").split()
        return {name: int(words[words.index(key) + 1]) * 1024 for name, key in _LINES.items() if key in words}
    try:
        import resource
    except ImportError:  # no such module on Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss": peak if sys.platform == "darwin" else peak * 1024}


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds.

    Example:
      >>> duration(3671.4), duration(90_000)
      ('1:01:11', '25:00:00')
    """
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
