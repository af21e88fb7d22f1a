"""setup: what a run does to its process and directory before it trains: logs, environment report, config."""

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fntrain.config import differences

_log = logging.getLogger("fntrain")


def setup(
    directory: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None, level: int = logging.INFO
) -> None:
    """Send the log to the console and to `log.txt` in the run's directory, report the environment, keep the config.

    Call it once, from the script. The logger is "fntrain"; calling it again for another directory changes the file. A
    config that differs from the one kept there by an earlier run is reported line by line, and takes its place.

    Args:
      directory: of the run; made if it is not there.
      config: plain values, as of `ft.to_dict(config)`; written to `config.json`.
      level: of the log.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     setup(directory, config={"lr": 0.1}, level=logging.ERROR)
      ...     sorted(path.name for path in Path(directory).iterdir())
      ['config.json', 'log.txt']

    Source: detectron2's default_setup
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    for handler in list(_log.handlers):
        if isinstance(handler, _Console | _File):
            _log.removeHandler(handler)
            handler.close()
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in (_Console(sys.stderr), _File(root / "log.txt", encoding="utf-8")):
        handler.setFormatter(formatter)
        _log.addHandler(handler)
    _log.setLevel(level)
    _log.info("command: %s", " ".join(sys.argv))
    for line in environment():
        _log.info(line)
    if config is not None:
        _keep(root / "config.json", config)


def environment() -> list[str]:
    """Describe what a run's numbers and bits depend on: versions, devices, threads; one line each.

    Example:
      >>> environment()[0].startswith("python ")
      True
    """
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"]
    lines.append(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF")
    lines += [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return lines


def _keep(path: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2) + "\n"
    for line in text.splitlines():
        _log.debug(line)
    if path.exists():
        try:
            changed = differences(json.loads(path.read_text(encoding="utf-8")), config)
        except (ValueError, AttributeError):
            changed = [f"{path} was no config"]
        for line in changed:
            _log.warning("config changed since the last run here: %s", line)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """The handler that setup has added, to be found again."""


class _File(logging.FileHandler):
    """The handler that setup has added, to be found again."""
