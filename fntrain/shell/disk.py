"""What waits for the disk; a file of its own, since both checkpoints and compiled steps need it."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Wait until a file or directory is on the disk.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     fsync(Path(directory))
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
